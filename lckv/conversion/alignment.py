"""Turning one layer's KV heads so that they come close to another's, without changing what the layer computes."""

from __future__ import annotations

from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lckv.conversion.heads import AttentionHeads, from_planes, to_planes


def inner_products(
    heads: AttentionHeads, reference: AttentionHeads, moments: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """How alike the KV heads of a layer and of a reference are, pair by pair.

    Args:
        heads: the layer that is to be turned.
        reference: the layer to which.
        moments: for keys and for values, `(inputs of heads, inputs of reference)`: the mean of the products of the
            inputs of which both layers' are made; `None` stands for equal inputs without correlations, and compares
            weights.

    Returns:
        Inner products of keys, plane by plane, complex `(num_heads, num_reference_heads, head_dim / 2)`; and of value
        dimensions, `(num_heads, num_reference_heads, head_dim, head_dim)`.
    """
    key, other_key = to_planes(heads.key), to_planes(reference.key)  # (num_kv_heads, head_dim / 2, inputs)
    value, other_value = heads.value[:, None], reference.value[None]
    if moments is not None:
        of_keys, of_values = moments
        other_key = other_key @ of_keys.mT.to(other_key.dtype)
        value = value @ of_values.to(value.dtype)
    return torch.einsum("gpx,hpx->ghp", key, other_key.conj()), value @ other_value.mT


def match_heads(
    heads: AttentionHeads, reference: AttentionHeads, moments: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The order of `heads` in which they are most like those of `reference`, `(num_kv_heads,)`.

    Keys and values weigh alike. What counts is the largest inner product that [`align`] reaches: for values the
    nuclear norm (the orthogonal Procrustes problem; Schönemann, 1966), for keys the sum of the planes' moduli, or of
    their real parts, which is the inner product as it stands, where keys are normalised and so not rotated.
    """
    key_planes, value_products = inner_products(heads, reference, moments)
    keys = (key_planes.abs() if heads.key_norm is None else key_planes.real).sum(-1)
    values = torch.linalg.svdvals(value_products.double()).sum(-1).float()
    tiny = torch.finfo(keys.dtype).tiny  # all may be zero
    similarity = keys / keys.abs().mean().clamp(min=tiny) + values / values.mean().clamp(min=tiny)
    _, order = linear_sum_assignment(-similarity.T.numpy())
    return torch.from_numpy(order)


def align(heads: AttentionHeads, reference: AttentionHeads) -> AttentionHeads:
    """The same attention layer with its KV heads permuted and rotated towards those of `reference`.

    Keys are rotated within their rotary planes, since only that commutes with the rotation by position, and not at all
    where they are normalised dimension by dimension; values by any orthogonal matrix. Queries are rotated with the
    keys, the output projection against the values, so that the layer computes what it did.
    """
    heads = heads.permuted(match_heads(heads, reference))
    key_planes, value_products = inner_products(heads, reference)
    own = torch.arange(len(heads.key))  # each head with the reference's in its place
    left, _, right = torch.linalg.svd(value_products[own, own].double())
    rotation = (left @ right).mT.float()  # (num_kv_heads, head_dim, head_dim): reference's values from the layer's
    gain = None
    key = heads.key
    if heads.key_norm is None:
        phases = key_planes[own, own]
        gain = torch.polar(torch.ones_like(phases.abs()), phases.angle())
        key = from_planes(to_planes(key) * gain.conj()[..., None])
    turned = heads.with_readers_changed(gain, rotation.mT)
    return replace(turned, key=key, value=rotation @ heads.value)
