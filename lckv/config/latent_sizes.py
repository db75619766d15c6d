"""How large latents may be in the place of an owner's keys and values: from a ratio or sizes to what each owner keeps.

By arithmetic alone: no torch, no model. See [`lckv.models.latent_attention`] for what latents are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lckv.config.model import LatentConfig
from lckv.config.names import AUTO_LATENT, XKV
from lckv.errors import UserError
from lckv.sharing.layout import KEY_LATENT, LATENT, PLANES, VALUE_LATENT
from lckv.sharing.patterns import LayerPlan, SharingPlan, describe_split

STREAMS = {
    "joint": (LATENT,),
    "separate": (KEY_LATENT, VALUE_LATENT),
    "decoupled_rope": (LATENT, PLANES),
    XKV: (LATENT,),
}
"""What an owner keeps, by the name of the kind."""

_ROUNDING = 1e-6  # of a number of latents that was turned into a ratio, and back

_LITTLE = 0.25
"""Below which part of what a latent of one layer can say, latents of several layers say more."""


@dataclass(frozen=True)
class LatentBudget:
    """What the owners of a pattern may keep.

    Attributes:
        plan: the pattern.
        kind: a name in [`STREAMS`].
        owners: those that keep latents; the others keep keys and values.
        total: numbers of a token, in all of these owners together.
        ratio: how many times fewer than of keys and values that is, where no `dims` are given.
        dims: of each latent, where it is given; of rotated pairs, two for each.
        num_planes: rotary planes of a head.
    """

    plan: SharingPlan
    kind: str
    owners: tuple[int, ...]
    total: int
    ratio: float
    dims: tuple[int, ...] | None
    num_planes: int

    def streams(self, owner: int) -> tuple[str, ...]:
        """What an owner keeps: of separate latents, those of what layers read of it."""
        return kept_streams(self.kind, self.plan.layers[owner])

    @property
    def uniform(self) -> list[dict[str, Any] | None]:
        """The same sizes for every owner, one entry per decoder layer: `kv_latents` of a configuration."""
        streams = STREAMS[self.kind]
        size = self.total // len(self.owners)
        num_places = sum(len(self.streams(owner)) for owner in self.owners)
        dims = self.dims or (max(1, self.total // num_places),) * len(streams)
        latents: dict[str, Any] = dict(zip(streams, dims, strict=True))
        if PLANES in latents:
            num_pairs = latents[PLANES] // 2 if self.dims else max(1, size // 8)  # a quarter of all
            latents[PLANES] = [index * self.num_planes // num_pairs for index in range(num_pairs)]
            latents[LATENT] = self.dims[0] if self.dims else max(1, size - 2 * num_pairs)
        return [
            {stream: latents[stream] for stream in self.streams(layer)} if layer in self.owners else None
            for layer in range(self.plan.num_hidden_layers)
        ]


def kept_streams(kind: str, owner: LayerPlan) -> tuple[str, ...]:
    """What an owner keeps of the streams of a kind."""
    is_read = {KEY_LATENT: owner.computes_keys, VALUE_LATENT: owner.computes_values}
    return tuple(stream for stream in STREAMS[kind] if is_read.get(stream, True))


def refuse_latents(latent: LatentConfig, source: Any) -> None:
    """Refuses to make other latents of latents.

    Raises:
        UserError: if the source keeps some.
    """
    if source.kv_latents is not None:
        raise UserError(
            f"latent={latent.name}: the source keeps latents already, which can be trained, but not made into others; "
            "leave it out, or give the model that it was made from"
        )


def group_layers(latent: LatentConfig, own: SharingPlan) -> SharingPlan:
    """The pattern of `xkv`: the lowest layer of each group keeps the latent for all of it. Windows stay.

    Raises:
        UserError: if the source shares keys and values already, and if no whole groups are left.
    """
    num_layers = own.num_hidden_layers
    if not all(layer.reads_itself for layer in own.layers):
        raise UserError(
            f"latent={latent.name}: makes groups of layers that compute their own keys and values; the source has "
            f"{own.layer_types}; latent=joint keeps its pattern"
        )
    first = latent.skip_layers + latent.warmup_layers
    if (left := num_layers - first) < 1:
        raise UserError(
            f"latent.skip_layers={latent.skip_layers} and latent.warmup_layers={latent.warmup_layers}: leave none of "
            f"the {num_layers} layers to share latents; allowed are up to {num_layers - 1} together"
        )
    if left % latent.group_size:
        lower = f" above the {first} of latent.skip_layers and latent.warmup_layers" if first else ""
        allowed = ", ".join(str(size) for size in range(1, left + 1) if left % size == 0)
        raise UserError(
            f"latent.group_size={latent.group_size}: does not divide the {left} layers{lower}; allowed are {allowed}"
        )
    sources = [layer if layer < first else layer - (layer - first) % latent.group_size for layer in range(num_layers)]
    return own.with_sources(sources)


def suit_source(latent: LatentConfig, own: SharingPlan, sizes: Any, *, may_group: bool) -> LatentConfig:
    """The kind that `auto` stands for: latents of single layers while these can say much of a layer, else of groups.

    What one latent can say at most depends on the heads: of keys and values as wide as the layer's input (MHA), half
    the numbers say all; of fewer heads (GQA, MQA), only all of them do.

    Args:
        latent: the group; of any other name, it is returned as it is.
        own: the pattern of the source.
        sizes: see [`latent_budget`].
        may_group: whether layers may share latents, which else have a pattern to follow.
    """
    if latent.name != AUTO_LATENT:
        return latent
    kept_before = 2 * sizes.num_key_value_heads * sizes.head_dim
    left = kept_before / latent.ratio / min(kept_before, sizes.hidden_size)
    num_layers = own.num_hidden_layers - latent.skip_layers
    is_plain = all(each.reads_itself and not each.is_sliding for each in own.layers)
    if left >= _LITTLE or not is_plain or not may_group or num_layers < 2:
        return replace(latent, name="joint")
    warmup_layers = num_layers // 8
    return replace(latent, name=XKV, group_size=2, warmup_layers=warmup_layers + (num_layers - warmup_layers) % 2)


def latent_budget(latent: LatentConfig, plan: SharingPlan, sizes: Any) -> LatentBudget:
    """What the `latent` group asks for.

    Args:
        latent: the group, with a name.
        plan: the pattern.
        sizes: of the model: anything with `num_key_value_heads`, `head_dim`, `hidden_size`, `use_qk_norm` and
            `learned_positions`.

    Raises:
        UserError: for sizes that are none or too large, if no owner is left, for pairs of keys that are normalised or
            not rotated, and for one latent where layers read the keys of one layer and the values of another.
    """
    streams = STREAMS[latent.name]
    if plan.first_split is not None:
        _check_split(latent, plan)
    if PLANES in streams and (sizes.use_qk_norm or sizes.learned_positions):
        reason = "the model's positions are learned (learned_positions), and no key is rotated"
        if sizes.use_qk_norm:
            reason = "the model normalises its keys (use_qk_norm), which are then no sum of a rotated part and another"
        raise UserError(f"latent={latent.name}: {reason}; allowed are joint and separate")
    owners = tuple(owner for owner in plan.kv_owners if owner >= latent.skip_layers)
    if not owners:
        raise UserError(
            f"latent.skip_layers={latent.skip_layers}: leaves no layer that computes keys and values "
            f"({plan.layer_types}); allowed are 0 to {plan.kv_owners[-1]}"
        )
    kv_size = sizes.num_key_value_heads * sizes.head_dim
    in_group = [len(plan.readers(owner)) if latent.name == XKV else 1 for owner in owners]  # that kept some before
    layers = [plan.layers[owner] for owner in owners]
    # Of one input no more can be said than it has numbers, unless rotations have parted them.
    latent_most = min(sizes.hidden_size, kv_size if VALUE_LATENT in streams else 2 * kv_size * max(in_group))
    most = tuple(kv_size if stream == PLANES else latent_most for stream in streams)
    dims = None if latent.dim is None else _check_dims(latent, most)
    before = [
        size * kv_size * (each.computes_keys + each.computes_values)
        for size, each in zip(in_group, layers, strict=True)
    ]
    kept_before = sum(before) / len(owners)
    sizes_of = dict(zip(streams, dims or most, strict=True))
    largest = sum(sizes_of[stream] for each in layers for stream in kept_streams(latent.name, each)) / len(owners)
    per_owner = largest if dims else min(kept_before / latent.ratio, largest)
    least = num_least(latent.name)
    if per_owner < least:
        raise UserError(
            f"latent.ratio={latent.ratio:g}: leaves {per_owner:.2g} of {kept_before:g} numbers; allowed is at most "
            f"{kept_before / least:g}"
        )
    return LatentBudget(
        plan, latent.name, owners, int(per_owner * len(owners) + _ROUNDING), latent.ratio, dims, sizes.head_dim // 2
    )


def _check_split(latent: LatentConfig, plan: SharingPlan) -> None:
    """Refuses latents that make both keys and values, or only one of them, for layers that read two others."""
    if VALUE_LATENT not in STREAMS[latent.name]:
        assert plan.first_split is not None
        raise UserError(
            f"latent={latent.name}: {describe_split(plan.first_split)}, but makes both of one latent; allowed is "
            "separate"
        )
    for layer in plan.layers:
        if len({source < latent.skip_layers for source in layer.sources}) == 2:
            raise UserError(
                f"latent.skip_layers={latent.skip_layers}: {describe_split(layer)}, which have to be latents both, or "
                f"neither; allowed are up to {min(layer.sources)}, or above {max(layer.sources)}"
            )


def num_least(kind: str) -> int:
    """How many numbers of a token an owner keeps at least."""
    return sum(2 if stream == PLANES else 1 for stream in STREAMS[kind])


def _check_dims(latent: LatentConfig, most: tuple[int, ...]) -> tuple[int, ...]:
    """The size of each stream, given how large each can be."""
    streams, given = STREAMS[latent.name], f"latent.dim={latent.dim}"
    dims = tuple(latent.dim) if isinstance(latent.dim, list) else (latent.dim,) * len(streams)
    if len(dims) != len(streams):
        raise UserError(
            f"{given}: has {len(dims)} of {len(streams)} sizes; give one for each of {', '.join(streams)}, "
            "or one number for all"
        )
    for stream, dim, largest in zip(streams, dims, most, strict=True):
        if not 1 <= dim <= largest:
            raise UserError(f"{given}: allowed for {stream} are 1 to {largest}, at which nothing is lost")
        if stream == PLANES and dim % 2:
            raise UserError(f"{given}: {stream} are pairs; allowed in that place are even sizes up to {largest}")
    return dims
