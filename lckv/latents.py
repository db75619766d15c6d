"""How large latents may be in the place of an owner's keys and values: from a ratio or sizes to what each owner keeps.

By arithmetic alone: no torch, no model. See [`lckv.models.latent_attention`] for what latents are.
"""

from __future__ import annotations

from dataclasses import dataclass

from lckv.config.model import LatentConfig
from lckv.errors import UserError
from lckv.layout import KEY_LATENT, LATENT, VALUE_LATENT
from lckv.patterns import SharingPlan

STREAMS = {"joint": (LATENT,), "separate": (KEY_LATENT, VALUE_LATENT)}
"""What an owner keeps, by the name of the kind."""


@dataclass(frozen=True)
class LatentBudget:
    """What the owners of a pattern may keep.

    Attributes:
        plan: the pattern.
        kind: a name in [`STREAMS`].
        owners: those that keep latents; the others keep keys and values.
        total: numbers of a token, in all of these owners together.
        dims: of each latent, where it is given.
    """

    plan: SharingPlan
    kind: str
    owners: tuple[int, ...]
    total: int
    dims: tuple[int, ...] | None

    @property
    def uniform(self) -> list[dict[str, int] | None]:
        """The same sizes for every owner, one entry per decoder layer: `kv_latents` of a configuration."""
        streams = STREAMS[self.kind]
        dims = self.dims or (max(1, self.total // len(self.owners) // len(streams)),) * len(streams)
        sizes = dict(zip(streams, dims, strict=True))
        return [dict(sizes) if layer in self.owners else None for layer in range(self.plan.num_hidden_layers)]


def latent_budget(latent: LatentConfig, plan: SharingPlan, kv_size: int, hidden_size: int) -> LatentBudget:
    """What the `latent` group asks for.

    Args:
        latent: the group, with a name.
        plan: the pattern.
        kv_size: numbers of a token's keys, and of its values.
        hidden_size: of the model, which no latent can exceed.

    Raises:
        UserError: for sizes that are none or too large, and if no owner is left.
    """
    streams = STREAMS[latent.name]
    owners = tuple(owner for owner in plan.kv_owners if owner >= latent.skip_layers)
    if not owners:
        raise UserError(
            f"latent.skip_layers={latent.skip_layers}: leaves no layer that computes keys and values "
            f"({plan.layer_types}); allowed are 0 to {plan.kv_owners[-1]}"
        )
    dims = None
    if latent.dim is not None:
        dims = tuple(latent.dim) if isinstance(latent.dim, list) else (latent.dim,) * len(streams)
        most = min(hidden_size, kv_size if len(streams) == 2 else 2 * kv_size)
        if len(dims) != len(streams):
            raise UserError(
                f"latent.dim={latent.dim}: has {len(dims)} sizes; latent={latent.name} keeps {', '.join(streams)}"
            )
        if not all(1 <= dim <= most for dim in dims):
            raise UserError(f"latent.dim={latent.dim}: allowed are 1 to {most}, at which nothing is lost")
    per_owner = sum(dims) if dims else min(2 * kv_size / latent.ratio, hidden_size * len(streams))
    return LatentBudget(plan, latent.name, owners, int(per_owner * len(owners)), dims)
