"""Where tokens stand, as rotary embeddings see it: the new ones, and those whose keys are made when read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import Cache

from lckv.models.sharing_cache import SharingCache

PositionEmbeddings = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the rotary embedding, each `(batch or 1, 1, num_tokens, head_dim)`.

The first half of the sines is negated, as they are subtracted there; so a layer has less to do.
"""


@dataclass(frozen=True)
class Positions:
    """The positions of one forward call.

    Attributes:
        new: of the new tokens, `(batch or 1, q_len)`.
        embed: from positions `(batch or 1, num_tokens)` to cosines and sines, of the rotary embedding of this name.
        has_past: whether there are earlier tokens.
    """

    new: torch.Tensor
    embed: Callable[[torch.Tensor, str | None], PositionEmbeddings]
    has_past: bool

    def embed_keys(
        self, cache: Cache | None, layer_idx: int, padding: torch.Tensor | None, label: str | None
    ) -> PositionEmbeddings:
        """Cosines and sines for what the cache will return of layer `layer_idx`, asked before it takes the new tokens.

        Nobody notes the positions of cached tokens. But attention depends on distances alone: a key that lies so many
        tokens before the last new one stands so many positions before it, not counting padding between them.

        Args:
            cache: before this call's tokens; `None` if only they are read.
            layer_idx: the owner.
            padding: which tokens are none, false there, `(batch, past + q_len)`; `None` if all are.
            label: which rotary embedding; see [`LCKVLlamaConfig.rope_label`].
        """
        if cache is None:
            return self.embed(self.new, label)
        num_new, device, tokens = self.new.shape[1], self.new.device, None
        if isinstance(cache, SharingCache):
            tokens = cache.get_rotary_positions(num_new, layer_idx)
            padding = None if cache.renumbers else padding
        if tokens is None:
            kv_length, kv_offset = cache.get_mask_sizes(num_new, layer_idx)
            tokens = torch.arange(kv_length, device=device)[None] + kv_offset
        tokens, last = tokens.to(device), cache.get_seq_length(layer_idx) + num_new - 1
        if not self.has_past:  # all is said, and may restart where another document begins
            return self.embed(_pick(self.new, tokens), label)
        if padding is None:
            distances = (last - tokens).to(device)
        else:
            order = padding.to(device).long().cumsum(dim=1)
            distances = order[:, -1:] - _pick(order, tokens)
        # Slots that are empty, before the first token or behind the last, must not look like a longer text: there are
        # rotary embeddings whose frequencies depend on its length.
        return self.embed((self.new[:, -1:] - distances.clamp(min=0)).clamp(min=0), label)


def _pick(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of `(batch or 1, num_tokens)`, those of the given tokens `(batch or 1, kv_len)`; of others, the nearest."""
    batch_size = max(len(values), len(tokens))
    tokens = tokens.clamp(0, values.shape[1] - 1).expand(batch_size, -1)
    return values.expand(batch_size, -1).gather(1, tokens)
