"""The `layer_types` language: which layer's keys and values each layer reads.

A `layer_types` string has one entry per decoder layer, joined by `_`. Entry *i* is `t` or `ts`: the queries of layer
*i* attend to the keys and values that layer `t` computes, through a sliding window if the suffix `s` is there.
`"0_6_6_6_6_6_6_7"` has layers 1 to 6 read layer 6. This module knows no tensors: it turns a string into a
[`SharingPlan`] and builds the strings of the published families (see [`PATTERNS`]).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from lckv.errors import UserError, check_whole_number, near_miss
from lckv.registry import Registry

_ENTRY = re.compile(r"(\d+)(s?)", re.ASCII)


@dataclass(frozen=True)
class LayerPlan:
    """What one decoder layer does about keys and values.

    Attributes:
        layer_idx: position of the layer, from 0 at the bottom.
        kv_source: the layer whose keys and values this layer's queries attend to.
        is_sliding: whether this layer's queries see only the last `sliding_window` tokens.
        computes_kv: whether some layer reads this one, so that it has key and value projections.
    """

    layer_idx: int
    kv_source: int
    is_sliding: bool
    computes_kv: bool

    @property
    def is_upward(self) -> bool:
        """Whether the layer reads a layer above it, so that its own token's key does not exist yet."""
        return self.kv_source > self.layer_idx


@dataclass(frozen=True)
class Segment:
    """Consecutive layers `start, ..., stop - 1` that run together: once, or again and again if they form a cycle."""

    start: int
    stop: int
    is_cycle: bool


@dataclass(frozen=True)
class SharingPlan:
    """A checked `layer_types` string, layer by layer.

    Attributes:
        layers: what each layer does, from the bottom.
        segments: the layers cut where cycles begin and end, from the bottom.
        kv_source: for every layer, the layer whose KV it reads.
        kv_owners: the layers that compute KV, from the bottom.
    """

    layers: tuple[LayerPlan, ...]
    segments: tuple[Segment, ...] = field(init=False)
    kv_source: tuple[int, ...] = field(init=False)
    kv_owners: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        # Plain attributes rather than cached properties, which torch.compile cannot trace.
        object.__setattr__(self, "segments", _cut_at_cycles(self.layers))
        object.__setattr__(self, "kv_source", tuple(layer.kv_source for layer in self.layers))
        object.__setattr__(self, "kv_owners", tuple(layer.layer_idx for layer in self.layers if layer.computes_kv))

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def layer_types(self) -> str:
        """The string in its shortest spelling; `parse_layer_types` reads it back to an equal plan."""
        return join_layer_types(self.kv_source, [layer.is_sliding for layer in self.layers])

    def readers(self, owner: int) -> tuple[LayerPlan, ...]:
        """The layers that read the KV of layer `owner`."""
        return tuple(layer for layer in self.layers if layer.kv_source == owner)

    def owner_is_sliding(self, owner: int) -> bool:
        """Whether every reader of `owner` has a window, so that a cache may forget what the window has passed."""
        return all(layer.is_sliding for layer in self.readers(owner))

    @property
    def has_cycles(self) -> bool:
        """Whether some layer reads upward, so that training has to iterate."""
        return any(layer.is_upward for layer in self.layers)


def advice_on(plan: SharingPlan) -> str | None:
    """What is known to be a bad choice about a pattern, in one line, if something is."""
    lowest = plan.layers[0]
    if not lowest.is_upward:
        return None
    return (
        f"layer 0 reads layer {lowest.kv_source}, above it, which does worst in the comparison of Wu, Wu and Tu "
        "(NAACL 2025); a lowest layer that computes its own KV costs little"
    )


def _cut_at_cycles(layers: tuple[LayerPlan, ...]) -> tuple[Segment, ...]:
    """Cuts the layers where cycles begin and end.

    A cycle starts at the first layer that reads upward and stops behind the highest layer that upward entries reach
    from inside it. Its passes are repeated, because each reads what a later layer of the pass before wrote.
    """
    segments: list[Segment] = []
    start = layer_idx = 0
    while layer_idx < len(layers):
        if not layers[layer_idx].is_upward:
            layer_idx += 1
            continue
        if start < layer_idx:
            segments.append(Segment(start, layer_idx, is_cycle=False))
        start, stop = layer_idx, layer_idx + 1
        while layer_idx < stop:
            stop = max(stop, layers[layer_idx].kv_source + 1)
            layer_idx += 1
        segments.append(Segment(start, stop, is_cycle=True))
        start = stop
    if start < layer_idx:
        segments.append(Segment(start, layer_idx, is_cycle=False))
    return tuple(segments)


def join_layer_types(kv_source: Sequence[int], is_sliding: Sequence[bool] | None = None) -> str:
    """The `layer_types` string of a pattern.

    Args:
        kv_source: for every layer, the layer whose KV it reads.
        is_sliding: for every layer, whether it has a window; by default none has.
    """
    windows = [False] * len(kv_source) if is_sliding is None else is_sliding
    return "_".join(f"{source}{'s' * sliding}" for source, sliding in zip(kv_source, windows, strict=True))


@lru_cache(maxsize=256)
def parse_layer_types(layer_types: str, num_hidden_layers: int | None = None) -> SharingPlan:
    """Parses and checks a `layer_types` string.

    Args:
        layer_types: one `t` or `ts` per layer, joined by `_`, e.g. `"0_0_2_2"` or `"0s_1s_2_2"`.
        num_hidden_layers: the number of layers that the string must have, where it is known.

    Raises:
        UserError: if the string is empty, an entry is not `t` or `ts`, names a layer outside the model, or the
            number of entries differs from `num_hidden_layers`. The message names the entry and says what is allowed.
    """
    if not isinstance(layer_types, str):
        raise UserError(
            f"layer_types={layer_types!r}: must be a string such as '0_0_2_2', not {type(layer_types).__name__} "
            "(YAML reads unquoted digits and underscores as a number: put the string in quotes)"
        )
    if not layer_types:
        raise UserError("layer_types='': is empty; give one entry per layer, such as '0_0_2_2' for four layers")
    entries = layer_types.split("_")
    if num_hidden_layers is not None and len(entries) != num_hidden_layers:
        raise UserError(
            f"layer_types={layer_types!r}: has {len(entries)} entries, but num_hidden_layers={num_hidden_layers}; "
            "give one entry per layer, or leave num_hidden_layers out"
        )
    sources: list[tuple[int, bool]] = []
    for position, entry in enumerate(entries):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise UserError(
                f"layer_types={layer_types!r}: entry {position} is {entry!r}; allowed is a layer number, "
                "with an 's' behind it for a sliding window, such as '3' or '3s'"
            )
        source = int(match[1])
        if source >= len(entries):
            raise UserError(
                f"layer_types={layer_types!r}: entry {position} is {entry!r}, but there is no layer {source}; "
                f"allowed are 0 to {len(entries) - 1}"
            )
        sources.append((source, match[2] == "s"))
    owners = {source for source, _ in sources}
    return SharingPlan(
        tuple(
            LayerPlan(layer_idx, source, is_sliding, computes_kv=layer_idx in owners)
            for layer_idx, (source, is_sliding) in enumerate(sources)
        )
    )


PATTERNS: Registry[Callable[..., str]] = Registry("sharing pattern")
"""Builders of `layer_types` strings by name: `builder(num_hidden_layers, **parameters) -> str`."""

register_pattern = PATTERNS.register


def pattern_parameters(name: str) -> dict[str, int | None]:
    """The parameters of the pattern `name` beside the number of layers, with their defaults."""
    parameters = list(inspect.signature(PATTERNS[name]).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def build_layer_types(name: str, num_hidden_layers: int, **parameters: int | None) -> str:
    """Builds the `layer_types` string of the pattern `name` for a model of `num_hidden_layers` layers.

    Raises:
        UserError: if there is no such pattern, it takes no such parameter, or a value is out of range.
    """
    known = pattern_parameters(name)
    for parameter in parameters:
        if parameter not in known:
            raise UserError(
                f"sharing pattern {name!r} has no parameter {parameter!r}: "
                f"allowed are {', '.join(known) or 'none'}{near_miss(parameter, known)}"
            )
    check_whole_number("num_hidden_layers", num_hidden_layers)
    return PATTERNS[name](num_hidden_layers, **parameters)


@register_pattern("llama")
def llama(num_hidden_layers: int) -> str:
    """Every layer reads its own KV: no sharing."""
    return join_layer_types(list(range(num_hidden_layers)))


@register_pattern("cla")
def cla(num_hidden_layers: int, group_size: int = 2) -> str:
    """Cross-Layer Attention (Brandon et al., NeurIPS 2024): groups of layers read the lowest of the group."""
    check_whole_number("group_size", group_size, 1, num_hidden_layers)
    return join_layer_types([layer_idx - layer_idx % group_size for layer_idx in range(num_hidden_layers)])


@register_pattern("yoco")
def yoco(num_hidden_layers: int, num_self_layers: int | None = None) -> str:
    """You Only Cache Once (Sun et al., NeurIPS 2024): windowed lower layers, then all read one layer's KV.

    `num_self_layers` is the number of lower layers with a window and KV of their own, by default half of the model.
    """
    if num_self_layers is None:
        num_self_layers = num_hidden_layers // 2
    check_whole_number("num_self_layers", num_self_layers, 0, num_hidden_layers - 1)
    own = [f"{layer_idx}s" for layer_idx in range(num_self_layers)]
    return "_".join(own + [str(num_self_layers)] * (num_hidden_layers - num_self_layers))


@register_pattern("mix_attention")
def mix_attention(num_hidden_layers: int) -> str:
    """MixAttention (Rajput et al., 2024): every third layer reads layer 0 in full, pairs between share windows."""
    return "_".join(
        "0" if layer_idx % 3 == 0 else f"{layer_idx - layer_idx % 3 + 1}s" for layer_idx in range(num_hidden_layers)
    )


@register_pattern("lckv")
def lckv(num_hidden_layers: int, warmup_layers: int = 2) -> str:
    """Layer-Condensed KV (Wu and Tu, ACL 2024): all but a few warm-up layers read the top one among them.

    Half of the `warmup_layers`, rounded up, are at the bottom, the others on top; they keep their own KV.
    """
    check_whole_number("warmup_layers", warmup_layers, 0, num_hidden_layers - 1)
    return _sandwich(num_hidden_layers, warmup_layers + 1, "top")


def _target(first: int, last: int, position: str) -> int:
    """The layer among `first..last` whose KV the others read."""
    return {"bottom": first, "top": last, "middle": (first + last + 1) // 2}[position]


def _pizza(num_hidden_layers: int, num_kv_layers: int, position: str) -> str:
    own = num_kv_layers - 1
    group = [_target(own, num_hidden_layers - 1, position)] * (num_hidden_layers - own)
    return join_layer_types([*range(own), *group])


def _sandwich(num_hidden_layers: int, num_kv_layers: int, position: str) -> str:
    bottom, top = num_kv_layers // 2, (num_kv_layers - 1) // 2
    first, stop = bottom, num_hidden_layers - top
    group = [_target(first, stop - 1, position)] * (stop - first)
    return join_layer_types([*range(bottom), *group, *range(stop, num_hidden_layers)])


def _lasagna(num_hidden_layers: int, num_kv_layers: int, position: str) -> str:
    bounds = [-(-num_hidden_layers * group // num_kv_layers) for group in range(num_kv_layers + 1)]
    entries: list[int] = []
    for first, stop in zip(bounds, bounds[1:], strict=False):
        entries += [_target(first, stop - 1, position)] * (stop - first)
    return join_layer_types(entries)


def _register_study_pattern(
    partition: str, position: str, default: int, build: Callable[[int, int, str], str]
) -> None:
    def pattern(num_hidden_layers: int, num_kv_layers: int = default) -> str:
        check_whole_number("num_kv_layers", num_kv_layers, 1, num_hidden_layers)
        return build(num_hidden_layers, num_kv_layers, position)

    pattern.__name__ = f"{partition}_{position}"
    pattern.__doc__ = (
        f"{partition.capitalize()}-{position} (Wu, Wu and Tu, NAACL 2025): `num_kv_layers` layers compute KV."
    )
    register_pattern(pattern.__name__)(pattern)


# "A Systematic Study of Cross-Layer KV Sharing for Efficient LLM Inference" crosses three ways to cut the layers with
# three places for the layer that the others read. Pizza: own KV at the bottom, one group above. Sandwich: own KV at
# the bottom (one layer more, if they are odd) and on top, one group between. Lasagna: groups of equal size.
for _position in ("bottom", "top", "middle"):
    _register_study_pattern("pizza", _position, 2, _pizza)
    _register_study_pattern("sandwich", _position, 3, _sandwich)
    _register_study_pattern("lasagna", _position, 3, _lasagna)
