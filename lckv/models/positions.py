"""Where tokens stand, as rotary embeddings see it: the new ones, and those whose keys are made when read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import Cache

from lckv.models.sharing_cache import SharingCache

PositionEmbeddings = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the rotary embedding, each `(batch or 1, num_tokens, head_dim)`."""


@dataclass(frozen=True)
class Positions:
    """The positions of one forward call.

    Attributes:
        new: of the new tokens, `(batch or 1, q_len)`.
        embed: from positions `(batch or 1, num_tokens)` to cosines and sines.
    """

    new: torch.Tensor
    embed: Callable[[torch.Tensor], PositionEmbeddings]

    def embed_keys(self, cache: Cache | None, layer_idx: int) -> PositionEmbeddings:
        """Cosines and sines for what the cache will return of layer `layer_idx`, asked before it takes the new tokens.

        Nobody notes the positions of cached tokens. But attention depends on distances alone: a key that lies so many
        tokens before the last new one stands so many positions before it, padding and dropped tokens or not.
        """
        if cache is None:
            return self.embed(self.new)
        num_new, device = self.new.shape[1], self.new.device
        tokens = cache.get_rotary_positions(num_new, layer_idx) if isinstance(cache, SharingCache) else None
        if tokens is None:
            kv_length, kv_offset = cache.get_mask_sizes(num_new, layer_idx)
            tokens = torch.arange(kv_length, device=device)[None] + kv_offset
        last = cache.get_seq_length(layer_idx) + num_new - 1
        distances = (last - tokens).to(device)
        return self.embed((self.new[:, -1:] - distances).clamp(min=0))  # at keys below 0 nobody looks
