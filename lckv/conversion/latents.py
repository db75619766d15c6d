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
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lckv.config.latent_sizes import LatentBudget
from lckv.config.names import XKV
from lckv.conversion.fitting import predictor
from lckv.conversion.heads import Tensors, layer_prefix, read_finite
from lckv.conversion.methods import sources_before
from lckv.conversion.sensitivity import KEYS, VALUES, Sensitivity
from lckv.models import LCKVLlamaConfig
from lckv.sharing.layout import KEY_LATENT, LATENT, PLANES, VALUE_LATENT
from lckv.sharing.patterns import SharingPlan

KnownBy = tuple[int, tuple[tuple[int, ...], ...], str]
"""An owner, the layers of which its latents are made, and one of these."""

Place = tuple[int, str]
"""A layer, and one of its projections or of the latents that it keeps."""

_ROUNDING = 1e-10
"""Eigenvalues that are smaller, beside the largest, are none."""

_TINY = 1e-50  # what stands for nothing, of which decompositions in float64 still have directions

_STEPS = (8, 4, 2)
"""Latents have sizes that one of these divides, the first that leaves room to choose: kernels want it so."""


Sources = Mapping[str, Sequence[int]]
"""The layers of the source of whose keys, and of whose values, an owner's latents are made, each in order."""


def stream_sources(plan: SharingPlan, own: SharingPlan, owners: Iterable[int]) -> dict[int, Sources]:
    """For each of these owners, the layers whose keys and whose values its readers read in the source."""
    return {
        owner: {
            name: sorted({*sources.values()})
            for name, sources in zip((KEYS, VALUES), sources_before(plan, own, owner), strict=True)
        }
        for owner in owners
    }


def sources_of(plan: SharingPlan, own: SharingPlan, owners: Iterable[int]) -> dict[int, tuple[int, ...]]:
    """The same for keys and values together."""
    found = stream_sources(plan, own, owners)
    return {owner: tuple(sorted({*sources[KEYS], *sources[VALUES]})) for owner, sources in found.items()}


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

    cost = 1
    """Numbers of a token for each direction."""

    def kept(self, count: int) -> Any:
        """What a configuration says of the first `count` directions."""
        return count

    def cut(self, size: int) -> Factors:
        """The most important `size` directions, in coordinates in which the rows of `down` are orthonormal.

        What a latent says is the same in any coordinates; in these ones, rounding adds least to it.
        """
        rows, turned = torch.linalg.qr(self.down[:size].T)
        up = {place: each[:, :size] @ turned.T for place, each in self.up.items()}
        return Factors(self.losses[:size], rows.T, up)


@dataclass(frozen=True)
class Pairs:
    """Pairs of numbers of which keys are made within one rotary plane each, the most important first; all complex.

    Attributes:
        losses: what is lost without each pair, `(count,)`, in falling order.
        planes: the plane of each.
        down: from the layer's input to the pair, `(count, hidden_size)`.
        bias: of the pair, `(count,)`.
        up: for each layer of the source, the factors of its heads, `(num_kv_heads, count)`.
    """

    losses: Tensor
    planes: list[int]
    down: Tensor
    bias: Tensor
    up: Mapping[int, Tensor]

    cost = 2
    """Numbers of a token for each pair."""

    def kept(self, count: int) -> Any:
        """What a configuration says of the first `count` pairs."""
        return self.planes[:count]


class LatentFit:
    """All latents of a model: their factors, and the tensors of a model that keeps so many directions of each.

    Args:
        budget: which owners keep what kind of latents, and how much.
        tensors: of the source.
        config: the source's.
        groups: for these owners, the layers of the source of which latents are made; see [`stream_sources`].
        sensitivity: of the source.
        ridge: see [`lckv.conversion.fitting.predictor`].
        num_unturned: so many of the slowest rotary planes may be taken for planes that do not turn, where rotated keys
            are kept beside the latent.
        known: factors that were found with the same settings, by owner, group and stream; new ones are added.
    """

    def __init__(
        self,
        budget: LatentBudget,
        tensors: Tensors,
        config: LCKVLlamaConfig,
        groups: Mapping[int, Sources],
        sensitivity: Sensitivity,
        ridge: float,
        num_unturned: int = 0,
        known: dict[KnownBy, Factors | Pairs] | None = None,
    ) -> None:
        self.budget, self.tensors, self.config, self.groups = budget, tensors, config, groups
        self.plan, self.own = budget.plan, config.sharing_plan
        self.sensitivity, self.ridge = sensitivity, ridge
        assert config.head_dim is not None
        num_heads, half = config.num_key_value_heads or 1, config.head_dim // 2
        num_pairs = budget.dims[1] // 2 if budget.dims and PLANES in FITS[budget.kind] else 0
        self.turning = max(half - num_unturned, -(-num_pairs // num_heads))  # planes enough for those asked for
        # Rows of the key projection in planes that do not turn, `(num_kv_heads, 2 * num_unturned)`.
        unturned = [part + plane for part in (0, half) for plane in range(self.turning, half)]
        heads = torch.arange(num_heads)[:, None] * config.head_dim
        self.unturned = heads + torch.tensor(unturned, dtype=torch.int64)
        self.factors: dict[Place, Factors | Pairs] = {}
        known = {} if known is None else known
        for owner, sources in groups.items():
            for stream in budget.streams(owner):
                key = owner, tuple(map(tuple, sources.values())), stream
                if key not in known:
                    known[key] = FITS[budget.kind][stream](self, owner)
                self.factors[owner, stream] = known[key]

    def sizes(self) -> list[dict[str, Any] | None]:
        """`kv_latents` of a model that keeps what the budget allows."""
        if self.budget.dims is None:
            kept = allot(self.factors, self.budget.total)
        else:
            dims = dict(zip(FITS[self.budget.kind], self.budget.dims, strict=True))
            kept = {place: dims[place[1]] // factors.cost for place, factors in self.factors.items()}
        latents: list[dict[str, Any] | None] = [None] * self.plan.num_hidden_layers
        for (owner, stream), factors in self.factors.items():
            latents[owner] = (latents[owner] or {}) | {stream: factors.kept(kept[owner, stream])}
        return latents

    def factorize(self, owner: int, names: Sequence[str], key_rows: Tensor | None = None) -> Factors:
        """The latent of layer `owner` from which these projections of its sources are made with the least loss.

        Of keys only some rows, if they are given.

        Raises:
            UserError: if a weight is not finite.
        """
        sources = self.groups[owner]
        layers = sorted({layer for name in names for layer in sources[name]})
        places = [(layer, name) for layer in layers for name in names if layer in sources[name]]
        maps, grams = [], []
        for layer, name in places:
            weight, gradients = self._map(owner, layer, name), self.sensitivity.gradients[layer, name]
            if name == KEYS and key_rows is not None:
                weight, gradients = weight[key_rows], gradients[key_rows][:, key_rows]
            maps.append(weight)
            grams.append(gradients)
        losses, down, ups = leading_directions(maps, grams, self.sensitivity.moments[owner][owner, owner])
        return Factors(losses, down, dict(zip(places, ups, strict=True)))

    def pair(self, owner: int) -> Pairs:
        """Of every turning plane, the pairs of numbers of which all heads' keys in it are made with the least loss.

        The keys of all heads in one plane are complex numbers that one rotation turns alike, so that they can be mixed
        before or after. The error of a score is the real part of a product, half of it in the mean over angles.
        """
        covariance = self.sensitivity.moments[owner][owner, owner].to(torch.complex128)
        layers, found = self.groups[owner][KEYS], []
        maps = {layer: self._in_planes(self._map(owner, layer, KEYS)) for layer in layers}
        biases = {layer: self._in_planes(self._bias(layer)[:, None])[..., 0] for layer in layers}
        for plane in range(self.turning):
            grams = [self._gram(layer, plane) for layer in layers]
            losses, downs, ups = leading_directions([maps[layer][:, plane] for layer in layers], grams, covariance)
            for index, (loss, down) in enumerate(zip(losses, downs, strict=True)):
                up = {layer: each[:, index] for layer, each in zip(layers, ups, strict=True)}
                # What of the bias lies in this direction, as the loss measures it.
                products = [gram @ up[layer] for gram, layer in zip(grams, layers, strict=True)]
                size = sum((each.conj() @ up[layer]).real for each, layer in zip(products, layers, strict=True))
                bias = sum(each.conj() @ biases[layer][:, plane] for each, layer in zip(products, layers, strict=True))
                found.append((loss / 2, plane, down, bias / max(size, _TINY), up))
        found.sort(key=lambda each: -float(each[0]))
        all_losses, planes, all_downs, all_biases, all_ups = zip(*found, strict=True)
        rows = torch.stack(all_downs)
        scales = rows.norm(dim=1, keepdim=True).clamp(min=_TINY)  # all pairs are read from directions of length one
        return Pairs(
            torch.stack(all_losses),
            list(planes),
            rows / scales,
            torch.stack(all_biases) / scales[:, 0],
            {layer: torch.stack([up[layer] for up in all_ups], dim=1) * scales[:, 0] for layer in layers},
        )

    def make(self, kv_latents: Sequence[Mapping[str, Any] | None], owner: int) -> dict[str, Tensor]:
        """The tensors of an owner and its readers, under the names that the model has for them."""
        latents = kv_latents[owner]
        assert latents is not None
        cut, prefix = {}, layer_prefix(owner)
        for stream, size in latents.items():
            if isinstance(factors := self.factors[owner, stream], Factors):
                cut[stream] = factors.cut(size)
        down = [each.down for each in cut.values()]
        pairs, count = self.factors.get((owner, PLANES)), len(latents.get(PLANES, ()))
        made: dict[str, Tensor] = {}
        if isinstance(pairs, Pairs):
            down.append(as_rows(pairs.down[:count]))
            if self.config.attention_bias:
                zeros = torch.zeros(latents[LATENT], dtype=torch.float64)
                made[f"{prefix}kv_a_proj.bias"] = torch.cat([zeros, as_rows(pairs.bias[:count])])
        made[f"{prefix}kv_a_proj.weight"] = torch.cat(down)
        of_keys, of_values = sources_before(self.plan, self.own, owner)
        beside = ("k_proj.bias", of_keys), ("v_proj.bias", of_values), ("k_norm.weight", of_keys)
        for factors in cut.values():
            for (layer, name), up in factors.up.items():
                for reader, source in (of_keys if name == KEYS else of_values).items():
                    if layer == source:
                        made[f"{layer_prefix(reader)}{name.replace('_', '_b_')}.weight"] = up
        for name, sources in beside:
            for reader, source in sources.items():
                if (of_source := layer_prefix(source) + name) in self.tensors:
                    made[layer_prefix(reader) + name.replace("_proj", "_b_proj")] = self.tensors[of_source]
        if isinstance(pairs, Pairs):
            for reader, source in of_keys.items():
                made |= self._beside_pairs(made, layer_prefix(reader), pairs, count, source)
        dtype = self.tensors[f"{layer_prefix(owner)}q_proj.weight"].dtype
        return {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}

    def _beside_pairs(
        self, made: Mapping[str, Tensor], prefix: str, pairs: Pairs, count: int, source: int
    ) -> dict[str, Tensor]:
        """A reader's keys of pairs, and of the latent in all planes that have none: zero in those that turn."""
        factors, half = pairs.up[source][:, :count], self.turning + self.unturned.shape[1] // 2
        free = [row for row in range(2 * half) if row % half not in pairs.planes[:count]]
        name = f"{prefix}k_b_proj.weight"
        weight = made[name].new_zeros(len(factors), 2 * half, made[name].shape[1])
        weight.flatten(0, 1)[self.unturned.flatten()] = made[name]
        keys = {name: weight[:, free].flatten(0, 1)}
        keys[f"{prefix}k_b_proj.rotated"] = torch.stack([factors.real, factors.imag], dim=1)
        if (name := f"{prefix}k_b_proj.bias") in made:
            is_unturned = torch.tensor([row % half >= self.turning for row in range(2 * half)])
            keys[name] = (made[name].unflatten(0, (-1, 2 * half)) * is_unturned)[:, free].flatten()
        return keys

    def unpredicted(self, owner: int, layer: int) -> float:
        """What is lost of a layer's keys and values that the owner's input does not tell, whatever is kept of it."""
        moments = self.sensitivity.moments[owner]
        found = predictor(moments, layer, owner, self.ridge)
        cross = found @ moments[owner, layer]
        left = moments[layer, layer] - cross - cross.T + found @ moments[owner, owner] @ found.T
        weights = {name: self._map(layer, layer, name) for name in (KEYS, VALUES)}
        return sum(
            float((self.sensitivity.gradients[layer, name] * (weight @ left @ weight.T)).sum())
            for name, weight in weights.items()
        )

    def _map(self, owner: int, layer: int, name: str) -> Tensor:
        """From the owner's input to what a projection of a layer gives, as well as it can be told, in float64."""
        weight = read_finite(self.tensors, f"{layer_prefix(layer)}{name}.weight").double()
        if layer == owner:
            return weight
        return weight @ predictor(self.sensitivity.moments[owner], layer, owner, self.ridge)

    def _bias(self, layer: int) -> Tensor:
        """Of the keys, `(kv_size,)` in float64."""
        name = f"{layer_prefix(layer)}k_proj.bias"
        if name in self.tensors:
            return read_finite(self.tensors, name).double()
        return torch.zeros(len(self.tensors[f"{layer_prefix(layer)}k_proj.weight"]), dtype=torch.float64)

    def _in_planes(self, rows: Tensor) -> Tensor:
        """`(kv_size, n)` as complex `(num_kv_heads, head_dim / 2, n)`."""
        real, imaginary = rows.unflatten(0, (self.config.num_key_value_heads or 1, 2, -1)).unbind(1)
        return torch.complex(real.contiguous(), imaginary.contiguous())

    def _gram(self, layer: int, plane: int) -> Tensor:
        """The mean of `g g^H` of the keys' gradients in one plane, `(num_kv_heads, num_kv_heads)`, complex."""
        gram, half = self.sensitivity.gradients[layer, KEYS], self.turning + self.unturned.shape[1] // 2
        real = torch.arange(self.config.num_key_value_heads or 1) * 2 * half + plane
        imaginary = real + half
        return torch.complex(
            gram[real][:, real] + gram[imaginary][:, imaginary], gram[imaginary][:, real] - gram[real][:, imaginary]
        )


_BOTH: Mapping[str, Any] = {LATENT: partial(LatentFit.factorize, names=(KEYS, VALUES))}

FITS: Mapping[str, Mapping[str, Any]] = {
    "joint": _BOTH,
    XKV: _BOTH,
    "separate": {
        KEY_LATENT: partial(LatentFit.factorize, names=(KEYS,)),
        VALUE_LATENT: partial(LatentFit.factorize, names=(VALUES,)),
    },
    "decoupled_rope": {
        LATENT: lambda fit, owner: fit.factorize(owner, (KEYS, VALUES), fit.unturned.flatten()),
        PLANES: LatentFit.pair,
    },
}
"""What owners keep, by the kind of latents, and what finds it."""


def as_rows(values: Tensor) -> Tensor:
    """Complex `(count, ...)` as real parts and then imaginary ones, `(2 * count, ...)`."""
    return torch.cat([values.real, values.imag])


def leading_directions(
    maps: Sequence[Tensor], grams: Sequence[Tensor], covariance: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The directions of an input of which linear maps of it are made with the least loss, the most important first.

    The squared singular values of `A = G^1/2 M C^1/2` are the eigenvalues of the smaller of `A A^H` and `A^H A`, which
    are found in a quarter of the time. The smallest are not told from zero so, but which of these is first does not
    matter: all directions together give `M` to the last digit.

    Args:
        maps: `M` in parts, each `(rows, inputs)`, real or complex.
        grams: `G` of each part, `(rows, rows)`.
        covariance: `C`, `(inputs, inputs)`.

    Returns:
        What is lost without each direction, `(rank,)`; from the input to what each says of it, `(rank, inputs)`; and
        from there to each part, `(rows, rank)`.
    """
    halves, inverses = zip(*(roots(gram) for gram in grams), strict=True)
    weighted = torch.cat([half @ each for half, each in zip(halves, maps, strict=True)])
    sizes = [len(each) for each in maps]
    if len(weighted) <= len(covariance):
        losses, left = _falling(weighted @ covariance @ weighted.mH)
        ups = [inverse @ part for inverse, part in zip(inverses, left.split(sizes), strict=True)]
        return losses, left.mH @ weighted, ups
    root, inverse = roots(covariance)
    losses, right = _falling((weighted @ root).mH @ (weighted @ root))
    return losses, right.mH @ inverse, list((torch.cat(list(maps)) @ root @ right).split(sizes))


def _falling(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first, none below zero, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a covariance `(n, n)`, and its inverse; directions without variance are given very little."""
    values, vectors = torch.linalg.eigh(covariance if covariance.is_complex() else covariance.double())
    largest = float(values[-1:].sum())  # of none, zero
    values = values.clamp(min=max(largest, _TINY) * _ROUNDING)
    return (vectors * values.sqrt()) @ vectors.mH, (vectors / values.sqrt()) @ vectors.mH


def allot(factors: Mapping[Place, Factors | Pairs], total: int) -> dict[Place, int]:
    """How many directions each latent keeps, so that no more than `total` numbers are kept and the least is lost.

    They are kept by eight numbers at a time, or fewer where that would leave too little choice; each keeps some.
    """
    step = next((step for step in _STEPS if 2 * step * len(factors) <= total), 1)
    counts = {place: max(1, step // each.cost) for place, each in factors.items()}
    chunks = [
        (float(chunk.sum()) / chunk.numel() / factors[place].cost, index, place, chunk.numel())
        for place, count in counts.items()
        for index, chunk in enumerate(factors[place].losses.split(count))
    ]
    kept, left = dict.fromkeys(factors, 0), total
    for _, _, place, count in sorted(chunks, key=lambda chunk: (chunk[1] > 0, -chunk[0])):  # first one of each
        if count * factors[place].cost <= left or kept[place] == 0:
            kept[place] += count
            left -= count * factors[place].cost
    return kept
