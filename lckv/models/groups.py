"""The new tokens in groups that take turns in a pass over a cycle.

In a pass over all tokens at once, upward readers use what the pass before wrote. Here the token at position *i* is in
group *i mod g*, and the groups go through the layers of the cycle one after the other, so that most of what a token
reads is of this very pass: its neighbour's keys always are. A pass computes as much as one over all tokens, in *g*
pieces, and brings the KV much nearer to what decoding makes. After *p* passes the first `g * p` tokens are exact; with
as many groups as tokens, a pass is decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Group:
    """Every `num_groups`-th token, from number `index` on."""

    index: int
    num_groups: int

    def pick(self, states: torch.Tensor) -> torch.Tensor:
        """Its tokens' part of `(..., num_tokens, width)`."""
        return states if self.num_groups == 1 else states[..., self.index :: self.num_groups, :]

    def put(self, states: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """A copy of streams `(batch, num_heads, num_tokens, head_dim)` with its tokens' part replaced."""
        if self.num_groups == 1:
            return part
        return states.slice_scatter(part, 2, self.index, states.shape[2], self.num_groups)


def groups_of(num_groups: int) -> list[Group]:
    """All groups, in the order of their turns."""
    return [Group(index, num_groups) for index in range(num_groups)]


def interleave(parts: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
    """All tokens' states along `dim`, of those of every group."""
    if len(parts) == 1:
        return parts[0]
    num_tokens = sum(part.shape[dim] for part in parts)
    places = [torch.arange(index, num_tokens, len(parts), device=parts[0].device) for index in range(len(parts))]
    return torch.cat(list(parts), dim).index_select(dim, torch.cat(places).argsort())
