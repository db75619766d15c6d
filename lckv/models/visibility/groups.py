"""The new tokens in groups that take turns in a pass over a cycle.

In a pass over all tokens at once, upward readers use what the pass before wrote. Here the token at position *i* is in
group *i mod g*, and the groups go through the layers of the cycle one after the other, so that most of what a token
reads is of this very pass: its neighbour's keys always are. A pass computes as much as one over all tokens, in *g*
pieces, and brings the KV much nearer to what decoding makes. After *p* passes the first `g * p` tokens are exact; with
as many groups as tokens, a pass is decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.masking_utils import prepare_padding_mask

from lckv.models.visibility.masks import MaskBuilder, MaskKind, VisibleKeys, build_rule


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


class GroupKeys:
    """What the queries of each group of tokens see in a pass over a cycle; built when it is first asked for.

    Args:
        builder: of the masks of the call. It is asked where keys lie now, before the cache takes any of them.
        of_all_tokens: what every layer sees in a pass over all tokens.
    """

    def __init__(self, builder: MaskBuilder, of_all_tokens: list[VisibleKeys | None]) -> None:
        self.builder, self.of_all_tokens = builder, of_all_tokens
        layers = builder.config.sharing_plan.layers
        self.kinds = [builder.kind_of(layer, builder.num_new_tokens) for layer in layers]
        self._geometries = {kind: builder.locate(kind) for kind in self.kinds}
        self._built: dict[tuple[MaskKind, Group, int | None], VisibleKeys] = {}

    def of(self, layer_idx: int, group: Group, num_written: int | None) -> VisibleKeys:
        """What layer `layer_idx` sees of the first `num_written` groups, or of all; and of earlier tokens."""
        kind, at_all = self.kinds[layer_idx], self.of_all_tokens[layer_idx]
        asked = kind, group, num_written
        if asked not in self._built:
            self._built[asked] = self._build(*asked)
        return replace(self._built[asked], key_rotation=None if at_all is None else at_all.key_rotation)

    def _build(self, kind: MaskKind, group: Group, num_written: int | None) -> VisibleKeys:
        """What the queries of a group of tokens see of those tokens whose keys are there.

        Args:
            kind: of the layer.
            group: of the new tokens.
            num_written: how many of the groups have keys, from the first; `None` if all have.
        """
        at, builder, device = self._geometries[kind], self.builder, self.builder.device
        padding = prepare_padding_mask(builder.padding, at.kv_length, at.kv_offset)
        documents, allowed = builder.documents_with_room(at), builder.allowed_pairs(at)
        sees = build_rule(at, kind.hides_own_token, kind.window, padding, documents, allowed)
        batch_idx = torch.arange(builder.batch_size, device=device)[:, None, None]
        new = torch.arange(builder.num_new_tokens, device=device)
        q_idx = group.pick(new[None, :, None]) + at.q_offset
        kv_idx = torch.arange(at.kv_length, device=device)[None, None, :] + at.kv_offset
        visible = sees(batch_idx, None, q_idx, kv_idx)
        if at.key_positions is not None:
            kv_idx = at.key_positions[:, None]
        if num_written is not None:
            number = kv_idx - at.q_offset  # of a new token; below 0 for earlier ones
            visible = visible & ((number < 0) | (number % group.num_groups < num_written))
        visible = visible.expand(builder.batch_size, -1, -1)
        nothing = ~visible.any(dim=-1)
        mask = self._from_pairs(visible | (nothing[..., None] & (kv_idx == q_idx)))
        return VisibleKeys(visible.shape[1], mask, sees_nothing=nothing if kind.hides_own_token else None)

    def _from_pairs(self, visible: torch.Tensor) -> torch.Tensor | BlockMask:
        """What the backend takes for the pairs `(batch, q_len, kv_len)` that see each other."""
        builder, implementation = self.builder, self.builder.config._attn_implementation
        if implementation == "flex_attention":

            def sees(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
                return visible[batch_idx, q_idx, kv_idx]

            _, q_len, kv_len = visible.shape
            return create_block_mask(sees, builder.batch_size, None, q_len, kv_len, builder.device)
        if implementation == "eager":
            hidden = torch.finfo(builder.dtype).min
            return torch.zeros_like(visible, dtype=builder.dtype).masked_fill(~visible, hidden)[:, None]
        return visible[:, None]
