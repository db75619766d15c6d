"""The `layer_types` language: which layer's keys and values each layer reads.

A `layer_types` string has one entry per decoder layer, joined by `_`. Entry *i* is `t` or `ts`: the queries of layer
*i* attend to the keys and values that layer `t` computes, through a sliding window if the suffix `s` is there.
`"0_6_6_6_6_6_6_7"` has layers 1 to 6 read layer 6. Keys and values may be of two layers, `k:v` or `k:vs`: in
`"0_1_1:0_1:0"`, layers 2 and 3 read the keys of layer 1 with the values of layer 0. This module knows no tensors: it
turns a string into a [`SharingPlan`] and builds the strings of the published families (see [`PATTERNS`]).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from lckv.errors import UserError, check_whole_number, near_miss
from lckv.utils.registry import Registry

_ENTRY = re.compile(r"(\d+)(?::(\d+))?(s?)", re.ASCII)


@dataclass(frozen=True)
class LayerPlan:
    """What one decoder layer does about keys and values.

    Attributes:
        layer_idx: position of the layer, from 0 at the bottom.
        key_source: the layer whose keys this layer's queries meet.
        value_source: the layer whose values they sum up, mostly the same.
        is_sliding: whether this layer's queries see only the last `sliding_window` tokens.
        computes_keys: whether some layer reads this one's keys, so that it has a key projection.
        computes_values: whether some layer reads this one's values, so that it has a value projection.
    """

    layer_idx: int
    key_source: int
    value_source: int
    is_sliding: bool
    computes_keys: bool
    computes_values: bool

    @property
    def sources(self) -> tuple[int, int]:
        """The layers whose keys and whose values the layer reads."""
        return self.key_source, self.value_source

    @property
    def reads_itself(self) -> bool:
        """Whether keys and values are both the layer's own."""
        return self.sources == (self.layer_idx, self.layer_idx)

    @property
    def is_split(self) -> bool:
        """Whether keys and values are of two layers."""
        return self.key_source != self.value_source

    @property
    def computes_kv(self) -> bool:
        """Whether some layer reads this one: its keys, its values, or both."""
        return self.computes_keys or self.computes_values

    @property
    def computes(self) -> str:
        """The same in words."""
        names = (("keys", self.computes_keys), ("values", self.computes_values))
        return " and ".join(name for name, is_computed in names if is_computed) or "no keys and values"

    @property
    def is_upward(self) -> bool:
        """Whether the layer reads a layer above it, so that its own token's key, or value, does not exist yet."""
        return max(self.sources) > self.layer_idx


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
        sources: for every layer, the layer whose keys and the layer whose values it reads.
        kv_owners: the layers that compute keys, values or both, from the bottom.
        kept_in_full: those of them whose readers do not all have windows.
    """

    layers: tuple[LayerPlan, ...]
    segments: tuple[Segment, ...] = field(init=False)
    sources: tuple[tuple[int, int], ...] = field(init=False)
    kv_owners: tuple[int, ...] = field(init=False)
    kept_in_full: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        # Plain attributes rather than cached properties, which torch.compile cannot trace.
        object.__setattr__(self, "segments", _cut_at_cycles(self.layers))
        object.__setattr__(self, "sources", tuple(layer.sources for layer in self.layers))
        object.__setattr__(self, "kv_owners", tuple(layer.layer_idx for layer in self.layers if layer.computes_kv))
        kept = owners_kept_in_full(self.sources, self.is_sliding)
        object.__setattr__(self, "kept_in_full", kept)

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def layer_types(self) -> str:
        """The string in its shortest spelling; `parse_layer_types` reads it back to an equal plan."""
        return join_layer_types(self.sources, self.is_sliding)

    @property
    def first_split(self) -> LayerPlan | None:
        """The lowest layer that reads the keys of one layer and the values of another; `None` if there is none."""
        return next((layer for layer in self.layers if layer.is_split), None)

    @property
    def owners_by_stream(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The layers that compute keys, and those that compute values, each from the bottom."""
        keys, values = (tuple(sorted({*sources})) for sources in zip(*self.sources, strict=True))
        return keys, values

    def readers(self, owner: int) -> tuple[LayerPlan, ...]:
        """The layers that read keys or values of layer `owner`."""
        return tuple(layer for layer in self.layers if owner in layer.sources)

    def owner_is_sliding(self, owner: int) -> bool:
        """Whether every reader of `owner` has a window, so that a cache may forget what the window has passed."""
        return owner not in self.kept_in_full

    @property
    def is_sliding(self) -> list[bool]:
        """For every layer, whether it has a window."""
        return [layer.is_sliding for layer in self.layers]

    @property
    def has_windows(self) -> bool:
        """Whether some layer has a window."""
        return any(self.is_sliding)

    def with_sources(self, sources: Iterable[int | tuple[int, int]]) -> SharingPlan:
        """The pattern of layers with the same windows that read others, or the keys and the values of two."""
        return parse_layer_types(join_layer_types(sources, self.is_sliding))

    @property
    def has_cycles(self) -> bool:
        """Whether some layer reads upward, so that training has to iterate."""
        return any(layer.is_upward for layer in self.layers)


def describe_split(layer: LayerPlan) -> str:
    """What a layer that reads two does, for those who cannot serve it."""
    return (
        f"layer {layer.layer_idx} reads the keys of layer {layer.key_source} with the values of layer "
        f"{layer.value_source}"
    )


def advice_on(plan: SharingPlan) -> str | None:
    """What is known to be a bad choice about a pattern, in one line, if something is."""
    lowest = plan.layers[0]
    if not lowest.is_upward:
        return None
    return (
        f"layer 0 reads layer {max(lowest.sources)}, above it, which does worst in the comparison of Wu, Wu and Tu "
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
            stop = max(stop, *(source + 1 for source in layers[layer_idx].sources))
            layer_idx += 1
        segments.append(Segment(start, stop, is_cycle=True))
        start = stop
    if start < layer_idx:
        segments.append(Segment(start, layer_idx, is_cycle=False))
    return tuple(segments)


def owners_kept_in_full(reads: Iterable[Collection[int]], is_sliding: Iterable[bool]) -> frozenset[int]:
    """The owners of which all tokens are kept, since a layer without a window reads them, or reads beside them.

    Owners that one layer reads together forget alike, since it sees the same tokens of each: such owners keep what the
    widest reader of any of them needs.

    Args:
        reads: for every layer, the owners that it reads.
        is_sliding: for every layer, whether it has a window.
    """
    together, windows = [frozenset(owners) for owners in reads], list(is_sliding)
    kept: frozenset[int] = frozenset()
    more = kept.union(*(owners for owners, slides in zip(together, windows, strict=True) if not slides))
    while more != kept:  # as far as one owner passes it on to the others
        kept, more = more, more.union(*(owners for owners in together if owners & more))
    return kept


def join_layer_types(sources: Iterable[int | tuple[int, int]], is_sliding: Iterable[bool] | None = None) -> str:
    """The `layer_types` string of a pattern.

    Args:
        sources: for every layer, the layer that it reads; or the one whose keys, and the one whose values.
        is_sliding: for every layer, whether it has a window; by default none has.
    """
    pairs = [(source, source) if isinstance(source, int) else source for source in sources]
    windows = [False] * len(pairs) if is_sliding is None else is_sliding
    return "_".join(
        f"{key}{f':{value}' * (value != key)}{'s' * sliding}"
        for (key, value), sliding in zip(pairs, windows, strict=True)
    )


@lru_cache(maxsize=256)
def parse_layer_types(layer_types: str, num_hidden_layers: int | None = None) -> SharingPlan:
    """Parses and checks a `layer_types` string.

    Args:
        layer_types: one `t`, `ts`, `k:v` or `k:vs` per layer, joined by `_`, e.g. `"0_0_2_2"` or `"0s_1s_2:0_2"`.
        num_hidden_layers: the number of layers that the string must have, where it is known.

    Raises:
        UserError: if the string is empty, an entry is of no such form, names a layer outside the model, or the
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
    pairs: list[tuple[int, int]] = []
    for position, entry in enumerate(entries):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise UserError(
                f"layer_types={layer_types!r}: entry {position} is {entry!r}; allowed is a layer number, or two as "
                "in '3:0' (keys:values), with an 's' behind it for a sliding window, such as '3', '3s' or '3:0s'"
            )
        pairs.append((int(match[1]), int(match[2] or match[1])))
        for source in pairs[-1]:
            if source >= len(entries):
                raise UserError(
                    f"layer_types={layer_types!r}: entry {position} is {entry!r}, but there is no layer {source}; "
                    f"allowed are 0 to {len(entries) - 1}"
                )
    of_keys, of_values = ({*sources} for sources in zip(*pairs, strict=True))
    return SharingPlan(
        tuple(
            LayerPlan(layer_idx, *sources, entry.endswith("s"), layer_idx in of_keys, layer_idx in of_values)
            for layer_idx, (sources, entry) in enumerate(zip(pairs, entries, strict=True))
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


@register_pattern("fusedkv_lite")
def fusedkv_lite(num_hidden_layers: int, num_self_layers: int | None = None) -> str:
    """FusedKV-Lite (Lin et al., ICLR 2026): upper layers read a middle layer's keys with the lowest layer's values.

    `num_self_layers` is the number of lower layers with KV of their own, by default half of the model, rounded up; the
    keys are those of the highest of them.
    """
    if num_self_layers is None:
        num_self_layers = (num_hidden_layers + 1) // 2
    check_whole_number("num_self_layers", num_self_layers, 1, num_hidden_layers)
    readers = num_hidden_layers - num_self_layers
    return join_layer_types([*range(num_self_layers), *[(num_self_layers - 1, 0)] * readers])


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
