"""Sharing hints: which layer's keys and values each layer of a model is to use while it serves one agent.

An agent that thinks needs all of its model; one that retrieves or routes may do with less of the cache. A hint says,
for the agent's role and mode, which layers share, as a `layer_types` string and layer by layer, and what that saves of
the model's own keys and values (KV). It is JSON, so that whoever decides (an agent framework) and whoever serves (an
engine) need not know each other; `hint_schema.json` is its schema. No torch here.

Nothing is said about quality: a model that was not trained for a pattern does far worse under it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lckv.config.hints import UPPER, GroupConfig
from lckv.config.model_arguments import check_owners
from lckv.errors import UserError, check_choice, check_whole_number
from lckv.loading.model_files import find_files
from lckv.serving.schema import check_schema
from lckv.sharing.costs import DTYPE_BYTES, ModelSizes
from lckv.sharing.layout import kv_layout
from lckv.sharing.model_values import OURS, stored_plan
from lckv.sharing.patterns import SharingPlan, build_layer_types, describe_split, parse_layer_types

VERSION = 1
"""Of the schema."""

VLLM = "vllm"
DEFAULT_DTYPE = "bfloat16"

_LLAMA = {
    *("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size"),
    "max_position_embeddings",
}
_READ_HERE = {"llama": _LLAMA, OURS: _LLAMA | {"sliding_window"}}
"""Families whose `config.json` is read here, and what it has to hold: for other sizes transformers has defaults."""


@dataclass(frozen=True)
class ModelKV:
    """What a hint has to know of a model.

    Attributes:
        plan: the model's own sharing pattern.
        sizes: `None` where only the number of layers is known.
        sliding_window: tokens in its windows, if it says so.
        dtype: type of its weights, and so of its keys and values.
        name: what the user calls it.
    """

    plan: SharingPlan
    sizes: ModelSizes | None = None
    sliding_window: int | None = None
    dtype: str = DEFAULT_DTYPE
    name: str | None = None

    @classmethod
    def of_layers(cls, num_layers: int) -> ModelKV:
        """A model of which no more is known than that it has so many layers, each with KV of its own."""
        check_whole_number("num_layers", num_layers)
        return cls(parse_layer_types(build_layer_types("llama", num_layers)))

    @classmethod
    def from_values(cls, values: Mapping[str, Any], name: str | None = None) -> ModelKV:
        """Reads what the `config.json` of a Llama or of one of our models holds."""
        plan = stored_plan(values)
        assert plan is not None
        dtype = str(values.get("dtype") or values.get("torch_dtype"))
        return cls(
            plan,
            ModelSizes.from_config(values),
            values["sliding_window"] if values["model_type"] == OURS else None,
            dtype if dtype in DTYPE_BYTES else DEFAULT_DTYPE,
            name,
        )

    def shared(self, group: GroupConfig) -> SharingPlan:
        """The pattern that a group configuration asks for.

        Raises:
            UserError: if it is for another number of layers, or lets layers read what is not there.
        """
        if group.layer_types is None:
            return share_groups(self.plan, group)
        plan, num_layers = parse_layer_types(group.layer_types), self.plan.num_hidden_layers
        if plan.num_hidden_layers != num_layers:
            raise UserError(
                f"layer_types={group.layer_types!r}: has {plan.num_hidden_layers} entries, but the model has "
                f"{num_layers} layers; give one entry per layer"
            )
        check_owners(plan, self.plan, f"layer_types={group.layer_types}", "the model")
        return plan

    def check_latents(self, plan: SharingPlan) -> None:
        """Refuses patterns under which other layers than in the model read some latents.

        Raises:
            UserError: naming the layer.
        """
        latents = (self.sizes and self.sizes.kv_latents) or [None] * plan.num_hidden_layers
        for layer, given in zip(self.plan.layers, plan.layers, strict=True):
            for before, after in zip(layer.sources, given.sources, strict=True):
                # A layer's projections make keys and values of one owner's latents, and nothing of another's.
                if before != after and (latents[before] or latents[after]):
                    raise UserError(
                        f"model={self.name}: layer {layer.layer_idx} would read layer {after}, not {before}, but "
                        "latents are read only by the layers that were made for them; allowed are layers with keys "
                        "and values"
                    )

    def num_bytes(self, plan: SharingPlan, sliding_window: int | None, context_length: int, itemsize: int) -> int:
        """Bytes that a sequence takes under some pattern; of an unknown model, one number for each key and value."""
        window = sliding_window or 1  # of no consequence where no layer has one
        if self.sizes is None:
            layout = kv_layout(plan, num_key_value_heads=1, head_dim=1, sliding_window=window)
        else:
            layout = replace(self.sizes, sliding_window=window).layout(plan)
        return layout.num_bytes(context_length, itemsize)


def find_model(name: str, *, revision: str | None = None, key: str = "model") -> ModelKV:
    """Reads the configuration of a model, without its weights.

    A folder with a Llama or one of our models needs no more than its `config.json`. For other families, GGUF files and
    the Hub, torch and transformers are imported.

    Args:
        name: a run folder, a folder with a model, its `config.json`, a GGUF file, or a name on the Hub.
        revision: only for the Hub: branch, tag or commit.
        key: what the user gave the name under, for error messages.

    Raises:
        UserError: if there is none, or it is of another family.
    """
    given = str(Path(name).parent) if Path(name).name == "config.json" else name
    found = find_files(given, revision=revision, key=key)
    if found.is_folder:
        values = found.stored_values()
        needed = _READ_HERE.get(values["model_type"])
        if needed is not None and needed.issubset(values):
            found.stored_plan()  # which names the model if it is wrong
            return ModelKV.from_values(values, name)
    from lckv.loading.models import find_checkpoint

    return ModelKV.from_values(find_checkpoint(given, revision=revision, key=key).load_config().to_dict(), name)


def share_groups(own: SharingPlan, group: GroupConfig) -> SharingPlan:
    """The pattern in which the layers of each group attend to what one of them attends to in `own`.

    In a model whose layers all have KV of their own that is this layer's KV; in one that shares already, the KV that
    it reads. Layers keep their windows.

    Raises:
        UserError: if the range ends outside of the model.
    """
    num_layers = own.num_hidden_layers
    max_layer = num_layers - 1 if group.max_layer is None else group.max_layer
    for name, value in ("min_layer", group.min_layer), ("max_layer", max_layer):
        check_whole_number(name, value, 0, num_layers - 1)
    sources = list(own.sources)
    for first in range(group.min_layer, max_layer + 1, group.group_size):
        last = min(first + group.group_size - 1, max_layer)
        target = last if group.direction == UPPER else first
        sources[first : last + 1] = [own.sources[target]] * (last + 1 - first)
    return own.with_sources(sources)


@dataclass(frozen=True)
class SavedBytes:
    """Bytes of the keys and values of one sequence: as the model is, with the hint, and the difference."""

    context_length: int
    dtype: str
    model: int
    hint: int
    saved: int


@dataclass(frozen=True, kw_only=True)
class SharingHint:
    """A sharing hint; what its attributes are says `hint_schema.json`."""

    version: int = VERSION
    role: str
    thinking: bool
    model: str | None
    num_layers: int
    group: GroupConfig
    ignored: bool
    ignored_reason: str | None
    kv_source: list[int | list[int]]
    layer_types: str
    sliding_window: int | None
    saved_fraction: float
    kv_bytes: SavedBytes | None
    not_served: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """The hint as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SharingHint:
        """Reads what `as_dict` gives, or JSON of the same.

        Raises:
            UserError: if the schema does not allow it, its role is none of its group's, or it contradicts itself.
        """
        check_schema(values, schema())
        group = GroupConfig(**values["group"])
        group.validate("group.")
        reason = group.why_ignored(values["role"], values["thinking"])
        if values["ignored"] != (reason is not None):
            given = str(values["ignored"]).lower()
            raise UserError(f"ignored={given}: does not follow from role, thinking and group; make the hint once more")
        plan = parse_layer_types(values["layer_types"], values["num_layers"])
        if list(values["kv_source"]) != _read_by_layer(plan):
            raise UserError(f"kv_source={values['kv_source']}: is not what layer_types={plan.layer_types} says")
        if plan.has_windows and values["sliding_window"] is None:
            raise UserError(f"sliding_window=null: layer_types={plan.layer_types} has windows; give their tokens")
        kv_bytes = values["kv_bytes"] and SavedBytes(**values["kv_bytes"])
        if kv_bytes and kv_bytes.saved != kv_bytes.model - kv_bytes.hint:
            raise UserError(f"kv_bytes.saved={kv_bytes.saved}: is not {kv_bytes.model} - {kv_bytes.hint}")
        if kv_bytes and abs(values["saved_fraction"] - kv_bytes.saved / kv_bytes.model) > 1e-6:
            of_bytes = f"{kv_bytes.saved} of {kv_bytes.model} bytes"
            raise UserError(f"saved_fraction={values['saved_fraction']}: is not that of kv_bytes, {of_bytes}")
        return cls(**{**values, "group": group, "kv_bytes": kv_bytes})


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of hints."""
    text = Path(__file__).with_name("hint_schema.json").read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text)
    return values


def _read_by_layer(plan: SharingPlan) -> list[int | list[int]]:
    """For every layer the layer that it reads, or the two whose keys and whose values it reads."""
    return [list(layer.sources) if layer.is_split else layer.key_source for layer in plan.layers]


def emit_hint(
    role: str,
    model: ModelKV | int,
    group: GroupConfig | None = None,
    *,
    thinking: bool = False,
    sliding_window: int | None = None,
    context_length: int | None = None,
    kv_dtype: str | None = None,
    experimental: bool = False,
) -> SharingHint:
    """Makes the hint for an agent: the groups' pattern, or the model as it is where the role or the mode forbid more.

    Args:
        role: what the agent does: one of the group configuration's roles.
        model: what is known of the model, or its number of layers; see [`find_model`].
        group: which layers share, for whom.
        thinking: whether the agent thinks before it answers.
        sliding_window: tokens of the windows in `group.layer_types`; `None`: the model's.
        context_length: tokens for which bytes are counted; `None`: as many as the model allows.
        kv_dtype: type of the cache whose bytes are counted; `None`: the model's.
        experimental: whether vLLM serves layers that read upward.

    Raises:
        UserError: if there is no such role, or the model cannot share so.
    """
    group = group or GroupConfig()
    group.validate()
    kv = ModelKV.of_layers(model) if isinstance(model, int) else model
    reason, shared = group.why_ignored(role, thinking), kv.shared(group)
    plan = shared if reason is None else kv.plan
    kv.check_latents(plan)
    window = None
    if plan.has_windows:
        window = kv.sliding_window if reason is not None or sliding_window is None else sliding_window
        if window is None:
            raise UserError(f"layer_types={plan.layer_types}: has windows, of unknown length; give sliding_window")
    kv_bytes = _count_bytes(kv, plan, window, context_length, kv_dtype or kv.dtype)
    return SharingHint(
        role=role,
        thinking=thinking,
        model=kv.name,
        num_layers=plan.num_hidden_layers,
        group=group,
        ignored=reason is not None,
        ignored_reason=reason,
        kv_source=_read_by_layer(plan),
        layer_types=plan.layer_types,
        sliding_window=window,
        saved_fraction=kv_bytes.saved / kv_bytes.model,
        kv_bytes=None if kv.sizes is None else kv_bytes,
        not_served=_not_served(kv, plan, experimental),
    )


def _count_bytes(
    kv: ModelKV, plan: SharingPlan, window: int | None, context_length: int | None, dtype: str
) -> SavedBytes:
    """What a pattern takes of what the model takes."""
    check_choice("kv_dtype", dtype, DTYPE_BYTES)
    if context_length is None:
        if kv.sizes is None and window is not None:
            raise UserError("context_length: give one, as windows save more of longer texts")
        context_length = 1 if kv.sizes is None else kv.sizes.max_position_embeddings
    check_whole_number("context_length", context_length)
    before = kv.num_bytes(kv.plan, kv.sliding_window, context_length, DTYPE_BYTES[dtype])
    after = kv.num_bytes(plan, window, context_length, DTYPE_BYTES[dtype])
    return SavedBytes(context_length, dtype, before, after, before - after)


def _not_served(kv: ModelKV, plan: SharingPlan, experimental: bool) -> dict[str, str]:
    """By engine, why it cannot serve a model with a pattern."""
    if kv.sizes is not None and kv.sizes.kv_latents is not None:
        return {VLLM: "the model keeps latents, which the plugin does not serve"}
    if plan.first_split is not None:
        return {VLLM: f"{describe_split(plan.first_split)}, which the plugin does not serve"}
    upward = [str(layer.layer_idx) for layer in plan.layers if layer.is_upward]
    hides_own_token = kv.sizes is not None and kv.sizes.force_nodiag
    if experimental or not (upward or hides_own_token):
        return {}
    reason = "the model has force_nodiag=true"
    if upward:
        verb = "layers {} read layers" if len(upward) > 1 else "layer {} reads a layer"
        reason = f"{verb.format(', '.join(upward))} above"
    return {VLLM: f"{reason}, which the plugin serves only with experimental=true"}


def read_hint(given: Mapping[str, Any] | str | Path, key: str = "hint") -> SharingHint:
    """Reads a hint.

    Args:
        given: its JSON, as text or read already, or the file with it.
        key: what the user gave it under, for error messages.

    Raises:
        UserError: if the file cannot be read, or the hint is wrong; see [`SharingHint.from_dict`].
    """
    values: Any = given
    if isinstance(given, str | Path):
        try:
            text = str(given)
            if not text.lstrip().startswith("{"):
                text = Path(given).expanduser().read_text(encoding="utf-8")
            values = json.loads(text)
        except (OSError, ValueError) as error:
            raise UserError(f"{key}={given}: cannot be read: {type(error).__name__}: {error}") from error
    try:
        return SharingHint.from_dict(values)
    except UserError as error:
        raise UserError(f"{_shown(given, key)}: {error}") from error


def hinted_layer_types(given: Mapping[str, Any] | str | Path, num_layers: int, key: str = "hint") -> str:
    """The `layer_types` string that a hint asks of a model, for what serves it.

    Args:
        given: the hint's JSON, or the file with it.
        num_layers: how many layers the model has.
        key: what the user gave it under, for error messages.

    Raises:
        UserError: if the hint is wrong, or for another number of layers.
    """
    hint = read_hint(given, key)
    if hint.num_layers != num_layers:
        raise UserError(
            f"{_shown(given, key)}: is for {hint.num_layers} layers, but the model has {num_layers}; make one for it"
        )
    return hint.layer_types


def _shown(given: Mapping[str, Any] | str | Path, key: str) -> str:
    return key if isinstance(given, Mapping) else f"{key}={given}"
