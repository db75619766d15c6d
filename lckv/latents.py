"""How large latents may be in the place of an owner's keys and values: from a ratio or sizes to what each owner keeps.

By arithmetic alone: no torch, no model. See [`lckv.models.latent_attention`] for what latents are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lckv.config.model import LatentConfig
from lckv.errors import UserError
from lckv.layout import KEY_LATENT, LATENT, PLANES, VALUE_LATENT
from lckv.patterns import SharingPlan

STREAMS = {"joint": (LATENT,), "separate": (KEY_LATENT, VALUE_LATENT), "decoupled_rope": (LATENT, PLANES)}
"""What an owner keeps, by the name of the kind."""


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

    @property
    def uniform(self) -> list[dict[str, Any] | None]:
        """The same sizes for every owner, one entry per decoder layer: `kv_latents` of a configuration."""
        streams = STREAMS[self.kind]
        size = self.total // len(self.owners)
        dims = self.dims or (max(1, size // len(streams)),) * len(streams)
        latents: dict[str, Any] = dict(zip(streams, dims, strict=True))
        if PLANES in latents:
            num_pairs = latents[PLANES] // 2 if self.dims else max(1, size // 8)  # a quarter of all
            latents[PLANES] = [index * self.num_planes // num_pairs for index in range(num_pairs)]
            latents[LATENT] = self.dims[0] if self.dims else max(1, size - 2 * num_pairs)
        return [dict(latents) if layer in self.owners else None for layer in range(self.plan.num_hidden_layers)]


def latent_budget(latent: LatentConfig, plan: SharingPlan, sizes: Any) -> LatentBudget:
    """What the `latent` group asks for.

    Args:
        latent: the group, with a name.
        plan: the pattern.
        sizes: of the model: anything with `num_key_value_heads`, `head_dim`, `hidden_size`, `use_qk_norm` and
            `learned_positions`.

    Raises:
        UserError: for sizes that are none or too large, if no owner is left, and for pairs of keys that are normalised
            or not rotated.
    """
    streams = STREAMS[latent.name]
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
    # Of one input no more can be said than it has numbers, unless rotations have parted them.
    latent_most = min(sizes.hidden_size, kv_size if VALUE_LATENT in streams else 2 * kv_size)
    most = tuple(kv_size if stream == PLANES else latent_most for stream in streams)
    dims = None if latent.dim is None else _check_dims(latent, most)
    per_owner = sum(dims) if dims else min(2 * kv_size / latent.ratio, sum(most))
    least = sum(2 if stream == PLANES else 1 for stream in streams)
    if per_owner < least:
        raise UserError(
            f"latent.ratio={latent.ratio:g}: leaves {per_owner:.2g} of {2 * kv_size} numbers; allowed is at most "
            f"{2 * kv_size / least:g}"
        )
    return LatentBudget(
        plan, latent.name, owners, int(per_owner * len(owners)), latent.ratio, dims, sizes.head_dim // 2
    )


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
