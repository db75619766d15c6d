"""What the layers of a pattern keep for their readers. By arithmetic alone: no torch, no model.

An owner keeps one or more *streams*: for each token, so many heads of so many numbers. A plain owner keeps `keys`,
`values` or both; one could as well keep a single latent, or a latent and a small rotated key. Everything that has
to know what lies in a cache asks the [`KVLayout`]: costs and the plan's table, the states that an iteration starts
from, how many bytes a cache will take, the pools of its pages, what a saved cache holds, which streams a layer reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lckv.errors import UserError
from lckv.sharing.patterns import LayerPlan, SharingPlan, describe_split, owners_kept_in_full


@dataclass(frozen=True)
class Stream:
    """One kind of states that an owner keeps for each token, `(batch, num_heads, seq_len, head_dim)`.

    Attributes:
        name: what it is, unique among its owner's: "keys", "values", "latent", ...
        num_heads: heads of a token.
        head_dim: numbers of a head.
        is_rotated: whether it is rotated by the position of its token when it is written (RoPE), so that who moves a
            token has to rotate it again.
        planes: where only the last numbers of a head are rotated, two for each of these rotary planes: first all real
            parts, then all imaginary ones.
    """

    name: str
    num_heads: int
    head_dim: int
    is_rotated: bool = False
    planes: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Numbers per token."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class StreamSource:
    """A stream as a reader names it.

    Attributes:
        owner: the layer that computes it.
        index: which of the owner's streams it is.
    """

    owner: int
    index: int


@dataclass(frozen=True)
class Store:
    """What one owner keeps.

    Attributes:
        owner: the layer that computes the streams.
        streams: what it keeps for each token, in the order in which it writes them.
        window: how many of the last tokens its readers need; `None` if one of them needs all.
    """

    owner: int
    streams: tuple[Stream, ...]
    window: int | None

    @property
    def size(self) -> int:
        """Numbers per token, over all streams."""
        return sum(stream.size for stream in self.streams)

    def num_tokens(self, seq_length: int) -> int:
        """How many of `seq_length` tokens have to be kept."""
        return seq_length if self.window is None else min(self.window, seq_length)


@dataclass(frozen=True)
class KVLayout:
    """What every owner of a model keeps, and what every layer reads.

    Attributes:
        stores: one per owner, from the bottom.
        sources: for every decoder layer, the streams that its queries read, in the order in which its attention takes
            them. Streams of several owners may be mixed, such as the keys of one with the values of another.
        owners: the layers that keep something, from the bottom.
        keeps_alike: for every decoder layer, the lowest owner that keeps as many tokens as the layer reads.
        rotates_keys_late: whether keys are made of some latent, so that their rotations are needed where read.
    """

    stores: tuple[Store, ...]
    sources: tuple[tuple[StreamSource, ...], ...]
    owners: tuple[int, ...] = field(init=False)
    keeps_alike: tuple[int, ...] = field(init=False)
    rotates_keys_late: bool = field(init=False)

    def __post_init__(self) -> None:
        # Plain attributes rather than properties, as every decoding step asks for them.
        object.__setattr__(self, "owners", tuple(store.owner for store in self.stores))
        lowest = {store.window: store.owner for store in reversed(self.stores)}
        keeps_alike = tuple(lowest[self.store(read[0].owner).window] for read in self.sources)
        object.__setattr__(self, "keeps_alike", keeps_alike)
        streams = [stream for store in self.stores for stream in store.streams]
        late = any(stream.name in (LATENT, KEY_LATENT) and not stream.is_rotated for stream in streams)
        object.__setattr__(self, "rotates_keys_late", late)

    @property
    def streams(self) -> dict[int, tuple[Stream, ...]]:
        """What every owner keeps of a token."""
        return {store.owner: store.streams for store in self.stores}

    def store(self, owner: int) -> Store:
        """What layer `owner` keeps."""
        return self.stores[self.owners.index(owner)]

    def reads(self, layer_idx: int) -> tuple[Stream, ...]:
        """The streams that layer `layer_idx` reads."""
        return tuple(self.store(source.owner).streams[source.index] for source in self.sources[layer_idx])

    def readers(self, owner: int) -> tuple[int, ...]:
        """The layers that read a stream of layer `owner`."""
        return tuple(
            layer_idx
            for layer_idx, sources in enumerate(self.sources)
            if any(source.owner == owner for source in sources)
        )

    def num_bytes(self, seq_length: int, itemsize: int) -> int:
        """Bytes that one sequence of `seq_length` tokens takes, with `itemsize` bytes for each number."""
        return itemsize * sum(store.size * store.num_tokens(seq_length) for store in self.stores)


def build_layout(
    streams: dict[int, Sequence[Stream]],
    sources: Sequence[Sequence[StreamSource]],
    is_sliding: Sequence[bool],
    sliding_window: int,
) -> KVLayout:
    """Builds a layout, in which owners forget what no reader needs: see [`owners_kept_in_full`].

    Args:
        streams: what each owner keeps for a token.
        sources: for every decoder layer, the streams that it reads.
        is_sliding: for every decoder layer, whether it has a window.
        sliding_window: tokens in a window, the query's own among them.
    """
    kept_in_full = owners_kept_in_full([[source.owner for source in read] for read in sources], is_sliding)
    stores = (
        Store(owner, tuple(streams[owner]), None if owner in kept_in_full else sliding_window)
        for owner in sorted(streams)
    )
    return KVLayout(tuple(stores), tuple(map(tuple, sources)))


KEYS, VALUES = "keys", "values"
"""Streams that readers attend to as they are."""

LATENT, KEY_LATENT, VALUE_LATENT = "latent", "key_latent", "value_latent"
"""Streams of which readers make their keys and values: one for both, or one for each."""

_OF_KEYS, _OF_VALUES = (LATENT, KEYS, KEY_LATENT), (LATENT, VALUES, VALUE_LATENT)

PLANES = "rotated_planes"
"""Beside a latent for both: the rotary plane of each rotated pair of numbers that the same stream ends with."""

Latents = Mapping[str, Any]
"""What an owner keeps in the place of keys and values: the size of each latent by its name, and planes."""


def latent_streams(latents: Latents) -> tuple[Stream, ...]:
    """The streams of an owner of latents."""
    planes = tuple(latents.get(PLANES, ()))
    sizes = {name: size for name, size in latents.items() if name != PLANES}
    return tuple(
        Stream(name, 1, size + 2 * len(planes), is_rotated=bool(planes), planes=planes) for name, size in sizes.items()
    )


def latents_read(kv_latents: Sequence[Latents | None] | None, layer: LayerPlan) -> Latents | None:
    """The latents that a layer reads, in the order in which its attention takes them; `None` for keys and values."""
    of_keys, of_values = (kv_latents[source] for source in layer.sources) if kv_latents else (None, None)
    if of_keys is None or of_values is None or LATENT in of_keys:
        return of_keys
    return {KEY_LATENT: of_keys[KEY_LATENT], VALUE_LATENT: of_values[VALUE_LATENT]}


def check_latents(kv_latents: Sequence[Latents | None], plan: SharingPlan) -> None:
    """Refuses latents that a model cannot have.

    Raises:
        UserError: naming the layer.
    """
    if len(kv_latents) != plan.num_hidden_layers:
        raise UserError(
            f"kv_latents: has {len(kv_latents)} entries for {plan.num_hidden_layers} layers; give one each"
        )
    for layer, latents in zip(plan.layers, kv_latents, strict=True):
        if latents is not None:
            _check_kept(layer, latents, plan)
    for layer in plan.layers:
        keeps = layer.layer_idx
        for reads in layer.sources:
            if layer.computes_kv and (kv_latents[keeps] is None) != (kv_latents[reads] is None):
                raise UserError(
                    f"kv_latents[{keeps}]={kv_latents[keeps]}: layer {keeps} reads layer {reads}, which keeps "
                    f"{kv_latents[reads]}; allowed are latents in both, or keys and values in both"
                )
        if len({kv_latents[source] is None for source in layer.sources}) == 2:
            of_keys, of_values = layer.sources
            raise UserError(
                f"kv_latents[{of_keys}]={kv_latents[of_keys]}: layer {keeps} reads the values of layer {of_values}, "
                f"which keeps {kv_latents[of_values]}, beside; allowed are latents in both, or in none"
            )


def _check_kept(layer: LayerPlan, latents: Latents, plan: SharingPlan) -> None:
    """Refuses latents that are not such as the readers of an owner need."""
    given = f"kv_latents[{layer.layer_idx}]={dict(latents)}"
    if not layer.computes_kv:
        raise UserError(f"{given}: layer {layer.layer_idx} keeps nothing ({plan.layer_types}); allowed is null")
    each = {KEY_LATENT: layer.computes_keys, VALUE_LATENT: layer.computes_values}
    needed = tuple(name for name, is_read in each.items() if is_read)
    split = next((reader for reader in plan.readers(layer.layer_idx) if reader.is_split), None)
    if split is not None:
        if tuple(latents) != needed:
            raise UserError(f"{given}: {describe_split(split)}; allowed is {' and '.join(needed)}")
    elif tuple(latents) not in ((LATENT,), (LATENT, PLANES), needed):
        raise UserError(f"{given}: allowed are {LATENT}, perhaps with {PLANES}, or {KEY_LATENT} and {VALUE_LATENT}")
    if min(size for name, size in latents.items() if name != PLANES) < 1:
        raise UserError(f"{given}: allowed are sizes of 1 or more")


def kv_layout(
    plan: SharingPlan,
    num_key_value_heads: int,
    head_dim: int,
    sliding_window: int,
    kv_latents: Sequence[Latents | None] | None = None,
) -> KVLayout:
    """The layout of every layer that computes keys and values: these, the keys rotated, or latents to make them of.

    Args:
        plan: whose keys and values each layer reads.
        num_key_value_heads: heads of the keys, and of the values.
        head_dim: numbers of a head.
        sliding_window: tokens in a window, the query's own among them.
        kv_latents: for every decoder layer, its latents; `None` for keys and values, in a layer or in all.
    """
    keys = Stream(KEYS, num_key_value_heads, head_dim, is_rotated=True)
    values = Stream(VALUES, num_key_value_heads, head_dim)
    streams: dict[int, Sequence[Stream]] = {}
    for owner in plan.kv_owners:
        latents, layer = kv_latents[owner] if kv_latents else None, plan.layers[owner]
        plain = (keys,) * layer.computes_keys + (values,) * layer.computes_values
        streams[owner] = latent_streams(latents) if latents else plain
    is_sliding = plan.is_sliding
    return build_layout(streams, [_sources(layer, streams) for layer in plan.layers], is_sliding, sliding_window)


def _sources(layer: LayerPlan, streams: Mapping[int, Sequence[Stream]]) -> list[StreamSource]:
    """The streams that a layer reads: that of its keys, then that of its values; once if it is the same."""
    found = [
        StreamSource(owner, next(index for index, stream in enumerate(streams[owner]) if stream.name in names))
        for owner, names in zip(layer.sources, (_OF_KEYS, _OF_VALUES), strict=True)
    ]
    return list(dict.fromkeys(found))
