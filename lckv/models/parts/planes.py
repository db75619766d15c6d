"""Rotary planes one by one: pairs of numbers that are rotated in planes of their own, and the keys made of them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from lckv.models.parts.rotary import PositionEmbeddings

Planes = tuple[int, ...]
"""For each pair of numbers, which of the `head_dim / 2` rotary frequencies turns it."""


class PlaneProjection(nn.Module):
    """From a latent, and rotated pairs of numbers behind it, to the keys of all heads.

    A pair goes to its own rotary plane, as a complex number that each head multiplies by one of its own: this commutes
    with rotations. The latent goes to the planes that are not rotated.

    Attributes:
        weight: of the latent, `(num_heads * num_unrotated, size)`.
        rotated: real and imaginary parts of the heads' factors, `(num_heads, 2, num_pairs)`.
        bias: of what is made of the latent, `(num_heads * num_unrotated,)`, or `None`.
    """

    def __init__(self, size: int, planes: Planes, num_heads: int, head_dim: int, bias: bool) -> None:
        super().__init__()
        self.planes, self.num_heads, self.head_dim = planes, num_heads, head_dim
        half = head_dim // 2
        self.imaginary = tuple(plane + half for plane in planes)
        self.unrotated = tuple(index for index in range(head_dim) if index % half not in planes)
        num_rows = num_heads * len(self.unrotated)
        self.weight = nn.Parameter(torch.empty(num_rows, size))
        self.rotated = nn.Parameter(torch.empty(num_heads, 2, len(planes)))
        self.bias = nn.Parameter(torch.zeros(num_rows)) if bias else None
        for parameter in (self.weight, self.rotated):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """From `(batch, kv_len, size + 2 * num_pairs)`, real parts of the pairs first, to keys of all heads.

        They are `(batch, num_heads, kv_len, head_dim)`, rotated as the pairs are.
        """
        latent, real, imaginary = stream.split([self.weight.shape[1], len(self.planes), len(self.planes)], dim=-1)
        unrotated = nn.functional.linear(latent, self.weight, self.bias).unflatten(-1, (self.num_heads, -1))
        factors = torch.complex(*self.rotated.float().unbind(1))  # (num_heads, num_pairs)
        pairs = torch.complex(real.float(), imaginary.float())[:, :, None] * factors
        keys = stream.new_zeros(*unrotated.shape[:3], self.head_dim)
        keys = keys.index_copy(3, indices(self.unrotated, keys), unrotated)
        for rows, part in ((self.planes, pairs.real), (self.imaginary, pairs.imag)):  # pairs of one plane add up
            keys = keys.index_add(3, indices(rows, keys), part.to(keys.dtype))
        return keys.transpose(1, 2)

    def absorb(self, query_states: torch.Tensor, position_embeddings: PositionEmbeddings) -> torch.Tensor:
        """Queries whose products with what is kept are those that rotated ones have with the keys made of it.

        A bias of the keys adds the same to all scores of a query, which softmax does not notice.

        Args:
            query_states: not rotated yet, `(batch, num_heads, q_len, head_dim)`.
            position_embeddings: cosines and sines for the queries.

        Returns:
            `(batch, num_heads, q_len, size + 2 * num_pairs)`.
        """
        grouped = query_states.unflatten(1, (self.num_heads, -1))  # (batch, num_kv_heads, groups, q_len, head_dim)
        unrotated, real, imaginary = (
            grouped.index_select(-1, indices(each, query_states))
            for each in (self.unrotated, self.planes, self.imaginary)
        )
        weight = self.weight.unflatten(0, (self.num_heads, 1, -1))  # (num_kv_heads, 1, num_unrotated, size)
        cos, sin = (
            table.index_select(-1, indices(self.planes, query_states))[:, :, None] for table in position_embeddings
        )
        # The conjugate of the key's factor, times the query, turned by its position.
        a, b = (part[:, None, None] for part in self.rotated.unbind(1))
        real, imaginary = real * a + imaginary * b, imaginary * a - real * b
        pairs = (real * cos + imaginary * sin, imaginary * cos - real * sin)  # sines are negated in this half
        unrotated = unrotated * scale_of(position_embeddings)[:, :, None]
        return torch.cat([unrotated @ weight, *pairs], dim=-1).flatten(1, 2)


def rotate_planes(states: torch.Tensor, position_embeddings: PositionEmbeddings, planes: Planes) -> torch.Tensor:
    """Rotates the last `2 * len(planes)` numbers of `(batch, num_heads, q_len, size)`, each pair by its plane."""
    num_pairs = len(planes)
    kept, real, imaginary = states.split([states.shape[-1] - 2 * num_pairs, num_pairs, num_pairs], dim=-1)
    cos, sin = (table.index_select(-1, indices(planes, states)) for table in position_embeddings)
    # Sines are negated in this half.
    return torch.cat([kept, real * cos + imaginary * sin, imaginary * cos - real * sin], dim=-1)


def only_planes(position_embeddings: PositionEmbeddings, planes: Planes) -> PositionEmbeddings:
    """Cosines and sines that leave other planes where they are, scaled as the rotary embedding scales all (YaRN)."""
    cos, sin = position_embeddings
    both = (*planes, *(plane + cos.shape[-1] // 2 for plane in planes))
    is_rotated = torch.zeros(cos.shape[-1], dtype=torch.bool, device=cos.device)
    is_rotated = is_rotated.index_fill(0, indices(both, cos), True)
    return torch.where(is_rotated, cos, scale_of(position_embeddings)), torch.where(is_rotated, sin, 0.0)


def scale_of(position_embeddings: PositionEmbeddings) -> torch.Tensor:
    """What rotations of query and key together scale their score by, `(batch or 1, 1, q_len, 1)`: 1 but for YaRN."""
    cos, sin = (table[..., :1] for table in position_embeddings)
    return cos.square() + sin.square()


def indices(values: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """These numbers, `(len(values),)`, where another tensor is, made once: a step has no time to send lists.

    But for tracers, whose tensors must not outlive them.
    """
    if type(like) not in (torch.Tensor, nn.Parameter):
        return torch.tensor(values, dtype=torch.int64, device=like.device)
    return _made_once(values, like.device)


@lru_cache(maxsize=4096)
def _made_once(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # else no gradient could ever pass an operation that uses it
        return torch.tensor(values, dtype=torch.int64, device=device)


__all__ = ["PlaneProjection", "Planes", "only_planes", "rotate_planes"]
