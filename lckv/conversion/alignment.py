"""Turning one layer's KV heads so that they come close to another's, without changing what the layer computes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lckv.conversion.heads import AttentionHeads, from_planes, to_planes


@dataclass(frozen=True)
class Similarity:
    """How alike the heads of a layer and of a reference are, for each pair of KV heads.

    Attributes:
        key_planes: complex `(num_heads, num_reference_heads, head_dim / 2)`: inner products, plane by plane.
        values: `(num_heads, num_reference_heads, head_dim, head_dim)`: inner products of value dimensions.
        rotates_keys: whether keys may be rotated, which they may not where they are normalised.
    """

    key_planes: Tensor
    values: Tensor
    rotates_keys: bool

    @classmethod
    def of(cls, heads: AttentionHeads, reference: AttentionHeads, moments: Tensor | None = None) -> Similarity:
        """Takes inner products, of weights or of what they make of inputs.

        Args:
            heads: the layer that is to be turned.
            reference: the layer to which.
            moments: `(inputs of heads, inputs of reference)`: the mean of the products of both layers' inputs; `None`
                stands for equal inputs without correlations, and compares weights.
        """

        def product(first: Tensor, second: Tensor) -> Tensor:
            return first @ second.mT if moments is None else first @ moments.to(first.dtype) @ second.mT

        key, other_key = to_planes(heads.key), to_planes(reference.key)  # (num_kv_heads, head_dim / 2, inputs)
        right = other_key if moments is None else other_key @ moments.mT.to(other_key.dtype)
        key_planes = torch.einsum("gpx,hpx->ghp", key, right.conj())
        return cls(key_planes, product(heads.value[:, None], reference.value[None]), heads.key_norm is None)

    def per_pair(self) -> Tensor:
        """How alike two heads can be made at best, `(num_heads, num_reference_heads)`, keys and values weighted alike.

        It is the largest inner product that [`align`] reaches: for values the nuclear norm (the orthogonal Procrustes
        problem; Schönemann, 1966), for keys the sum of the planes' moduli, or of their real parts, which is the inner
        product as it stands, where keys are not rotated.
        """
        keys = (self.key_planes.abs() if self.rotates_keys else self.key_planes.real).sum(-1)
        values = torch.linalg.svdvals(self.values.double()).sum(-1).float()
        tiny = torch.finfo(keys.dtype).tiny  # all may be zero
        return keys / keys.abs().mean().clamp(min=tiny) + values / values.mean().clamp(min=tiny)


def match_heads(heads: AttentionHeads, reference: AttentionHeads, moments: Tensor | None = None) -> Tensor:
    """The order of `heads` in which they are most like those of `reference`, `(num_kv_heads,)`."""
    similarity = Similarity.of(heads, reference, moments).per_pair()
    _, order = linear_sum_assignment(-similarity.T.numpy())
    return torch.from_numpy(order)


def align(heads: AttentionHeads, reference: AttentionHeads, moments: Tensor | None = None) -> AttentionHeads:
    """The same attention layer with its KV heads permuted and rotated towards those of `reference`.

    Keys are rotated within their rotary planes, since only that commutes with the rotation by position, and not at all
    where they are normalised dimension by dimension; values by any orthogonal matrix. Queries are rotated with the
    keys, the output projection against the values, so that the layer computes what it did.
    """
    heads = heads.permuted(match_heads(heads, reference, moments))
    similarity = Similarity.of(heads, reference, moments)
    num_heads = torch.arange(len(heads.key))
    left, _, right = torch.linalg.svd(similarity.values[num_heads, num_heads].double())
    rotation = (left @ right).mT.float()  # (num_kv_heads, head_dim, head_dim): reference's values from the layer's
    gain = None
    key = heads.key
    if heads.key_norm is None:
        phases = similarity.key_planes[num_heads, num_heads]
        gain = torch.polar(torch.ones_like(phases.abs()), phases.angle())
        key = from_planes(to_planes(key) * gain.conj()[..., None])
    turned = heads.with_readers_changed(gain, rotation.mT)
    return replace(turned, key=key, value=rotation @ heads.value)
