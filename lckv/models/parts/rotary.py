"""Rotary embeddings, one for all layers or one for each kind of layer, and the positions of what they rotate.

What rotates keys is a matter of the layer that makes them, whoever reads them: queries are rotated as the keys that
they meet. A plane that does not turn has the frequency zero, so that nothing else needs to know of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lckv.models.parts.sharing_cache import SharingCache

PARTIAL = "partial_rotary_factor"
"""The key of `rope_parameters` that says which part of a head's planes turns."""

PositionEmbeddings = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the rotary embedding, each `(batch or 1, 1, num_tokens, head_dim)`.

The first half of the sines is negated, as they are subtracted there; so a layer has less to do.
"""


class PartialRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotates the first planes of a head, as many as `partial_rotary_factor` says; the others have frequency zero.

    A plane is number *i* of each half of a head. Families that rotate the first numbers of a head, in halves of their
    own, have other planes: their projections' rows are permuted when they are read.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_planes = config.head_dim // 2

    @staticmethod
    def compute_default_rope_parameters(config: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, float]:
        """Frequencies of the planes that turn, and what scales cosines and sines."""
        size = num_rotated(config.head_dim, config.rope_parameters)
        exponents = torch.arange(0, size, 2, dtype=torch.float) / max(size, 1)
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `(batch or 1, num_tokens, head_dim)` in the type of `x`; all are scaled alike (YaRN)."""
        cos, sin = super().forward(x, position_ids)
        return self._fill(cos, self.attention_scaling), self._fill(sin, 0.0)

    def _fill(self, table: torch.Tensor, value: float) -> torch.Tensor:
        num_turning = table.shape[-1] // 2
        halves = table.unflatten(-1, (2, num_turning))
        return pad(halves, (0, self.num_planes - num_turning), value=value).flatten(-2)


def num_rotated(head_dim: Any, rope_parameters: dict[str, Any]) -> int:
    """How many numbers of a head are rotated."""
    return int(head_dim * rope_parameters.get(PARTIAL, 1.0))


def rotary_embedding(config: Any, label: str | None = None) -> LlamaRotaryEmbedding:
    """The rotary embedding of a configuration, or of the entry `label` of its `rope_parameters`."""
    of_one = copy.copy(config)
    of_one.rope_parameters = config.rotations[label]
    is_partial = num_rotated(config.head_dim, of_one.rope_parameters) < config.head_dim
    return PartialRotaryEmbedding(of_one) if is_partial else LlamaRotaryEmbedding(of_one)


def rotary_frequencies(config: Any, label: str | None = None) -> torch.Tensor:
    """Radians by which each plane of a head turns from one position to the next, `(head_dim / 2,)`."""
    turning = rotary_embedding(config, label).inv_freq
    return pad(turning, (0, config.head_dim // 2 - len(turning)))


def fastest_frequencies(config: Any) -> torch.Tensor:
    """The same, of each plane in the kind of layer where it turns fastest."""
    return torch.stack([rotary_frequencies(config, label) for label in config.rotations]).amax(0)


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


__all__ = [
    "PARTIAL",
    "PartialRotaryEmbedding",
    "PositionEmbeddings",
    "Positions",
    "fastest_frequencies",
    "num_rotated",
    "rotary_embedding",
    "rotary_frequencies",
]


def apply_rotary(states: torch.Tensor, position_embeddings: PositionEmbeddings) -> torch.Tensor:
    """Rotates queries or keys `(batch, num_heads, q_len, head_dim)` by the positions of their tokens."""
    cos, sin = position_embeddings
    real, imaginary = states.chunk(2, dim=-1)
    return states * cos + torch.cat((imaginary, real), dim=-1) * sin  # whose first half is negated


def last_positions(position_embeddings: PositionEmbeddings, num_tokens: int) -> PositionEmbeddings:
    """The cosines and sines of the last `num_tokens` tokens."""
    cos, sin = position_embeddings
    return cos[:, :, -num_tokens:], sin[:, :, -num_tokens:]
