"""Latents in the place of keys and values: how wide each is, and the projections to and from it, in closed form.

An owner's keys and values, and those of all layers that are to read it, are linear in one input *x*: `y = M x`, where
another layer's `M` predicts from this layer's input what that one computes from its own. The latent of rank *r* that
loses least is a weighted low-rank approximation: with `G` the covariance of the loss's gradient with respect to *y*,
and `C` that of *x* (see [`lckv.conversion.sensitivity`]), the leading *r* directions of `G^1/2 M C^1/2`. What is lost
is the sum of the other squared singular values, in units of the loss: so all latents of a model are cut at the same
singular value, and each layer gets the width that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lckv.conversion.fitting import predictor
from lckv.conversion.heads import Tensors, layer_prefix, read_finite
from lckv.conversion.sensitivity import KEYS, VALUES, Sensitivity
from lckv.layout import KEY_LATENT, LATENT, VALUE_LATENT
from lckv.patterns import SharingPlan

Place = tuple[int, str]
"""A layer, and one of its projections or of the latents that it keeps."""

_ROUNDING = 1e-10
"""Eigenvalues that are smaller, beside the largest, are none."""


def sources_of(plan: SharingPlan, own: SharingPlan, owners: Iterable[int]) -> dict[int, tuple[int, ...]]:
    """For each of these owners, the layers whose keys and values its readers read in the source, in order."""
    return {
        owner: tuple(sorted({own.kv_source[layer.layer_idx] for layer in plan.readers(owner)})) for owner in owners
    }


@dataclass(frozen=True)
class Factors:
    """The directions of one latent, the most important first.

    Attributes:
        losses: what is lost without each direction, `(rank,)`, in falling order.
        down: from the layer's input, `(rank, hidden_size)`.
        up: for each projection that is made of the latent, `(kv_size, rank)`.
    """

    losses: Tensor
    down: Tensor
    up: Mapping[Place, Tensor]

    def cut(self, size: int) -> Factors:
        """The most important `size` directions, in coordinates in which the rows of `down` are orthonormal.

        What a latent says is the same in any coordinates; in these ones, rounding adds least to it.
        """
        rows, turned = torch.linalg.qr(self.down[:size].T)
        up = {place: each[:, :size] @ turned.T for place, each in self.up.items()}
        return Factors(self.losses[:size], rows.T, up)


def factorize(
    tensors: Tensors, owner: int, places: Sequence[Place], sensitivity: Sensitivity, ridge: float
) -> Factors:
    """The latent of layer `owner` from which these projections of the source are made with the least loss.

    Raises:
        UserError: if a weight is not finite.
    """
    moments = sensitivity.moments[owner]
    root, inverse = roots(moments[owner, owner])
    maps, weighted = [], []
    for place in places:
        layer, name = place
        weight = read_finite(tensors, f"{layer_prefix(layer)}{name}.weight").double()
        if layer != owner:  # as well as it can be told from this layer's input
            weight = weight @ predictor(moments, layer, owner, ridge)
        maps.append(weight)
        weighted.append(roots(sensitivity.gradients[place])[0] @ weight)
    _, values, directions = torch.linalg.svd(torch.cat(weighted) @ root, full_matrices=False)
    # With C^1/2 v as encoder's dual, M C^1/2 v is the best decoder of the latent v^T C^-1/2 x.
    decoder = root @ directions.T
    sizes = [len(weight) for weight in maps]
    up = (torch.cat(maps) @ decoder).split(sizes)
    return Factors(values.square(), directions @ inverse, dict(zip(places, up, strict=True)))


def roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a covariance `(n, n)`, and its inverse; directions without variance are given very little."""
    values, vectors = torch.linalg.eigh(covariance.double())
    values = values.clamp(min=max(float(values[-1]), torch.finfo(torch.float64).tiny) * _ROUNDING)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def allot(losses: Mapping[Place, Tensor], total: int) -> dict[Place, int]:
    """How many directions each latent keeps, at least one, so that `total` are kept and the least is lost."""
    kept = dict.fromkeys(losses, 1)
    rest = sorted(((float(loss), key) for key, each in losses.items() for loss in each[1:]), key=lambda pair: -pair[0])
    for _, key in rest[: max(0, total - len(kept))]:
        kept[key] += 1
    return kept


MADE_OF: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "joint": {LATENT: (KEYS, VALUES)},
    "separate": {KEY_LATENT: (KEYS,), VALUE_LATENT: (VALUES,)},
}
"""The latents of each kind, and what is made of them."""


class LatentFit:
    """All latents of a model: their factors, and the tensors of a model that keeps so many directions of each.

    Args:
        kind: "joint" or "separate".
        tensors: of the source.
        plan: the pattern of the model to make.
        own: the source's.
        groups: the owners that are to keep latents, each with the layers of the source of which it makes them.
        sensitivity: of the source.
        ridge: see [`lckv.conversion.fitting.predictor`].
    """

    def __init__(
        self,
        kind: str,
        tensors: Tensors,
        plan: SharingPlan,
        own: SharingPlan,
        groups: Mapping[int, Sequence[int]],
        sensitivity: Sensitivity,
        ridge: float,
    ) -> None:
        self.tensors, self.plan, self.own = tensors, plan, own
        self.factors: dict[Place, Factors] = {}
        for owner, sources in groups.items():
            for stream, names in MADE_OF[kind].items():
                places = [(layer, name) for layer in sources for name in names]
                self.factors[owner, stream] = factorize(tensors, owner, places, sensitivity, ridge)

    def sizes(self, total: int) -> list[dict[str, int] | None]:
        """`kv_latents` of a model that keeps `total` numbers of a token, in all layers together."""
        kept = allot({place: factors.losses for place, factors in self.factors.items()}, total)
        latents: list[dict[str, int] | None] = [None] * self.plan.num_hidden_layers
        for owner, stream in self.factors:
            latents[owner] = (latents[owner] or {}) | {stream: kept[owner, stream]}
        return latents

    def make(self, kv_latents: Sequence[Mapping[str, int] | None], owner: int) -> dict[str, Tensor]:
        """The tensors of an owner and its readers, under the names that the model has for them."""
        latents = kv_latents[owner]
        assert latents is not None
        dtype = self.tensors[f"{layer_prefix(owner)}{KEYS}.weight"].dtype
        cut = {stream: self.factors[owner, stream].cut(size) for stream, size in latents.items()}
        made = {f"{layer_prefix(owner)}kv_a_proj.weight": torch.cat([each.down for each in cut.values()])}
        for reader in (layer.layer_idx for layer in self.plan.readers(owner)):
            source, prefix = self.own.kv_source[reader], layer_prefix(reader)
            for factors in cut.values():
                for (layer, name), up in factors.up.items():
                    if layer == source:
                        made[f"{prefix}{name.replace('_', '_b_')}.weight"] = up
            for name in ("k_proj.bias", "v_proj.bias", "k_norm.weight"):
                if (of_source := layer_prefix(source) + name) in self.tensors:
                    made[prefix + name.replace("_proj", "_b_proj")] = self.tensors[of_source]
        return {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}
