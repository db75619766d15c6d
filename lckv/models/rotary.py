"""Rotary embeddings: one for all layers or one for each kind of layer, of which some planes may not turn.

What rotates keys is a matter of the layer that makes them, whoever reads them: queries are rotated as the keys that
they meet. A plane that does not turn has the frequency zero, so that nothing else needs to know of it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

PARTIAL = "partial_rotary_factor"
"""The key of `rope_parameters` that says which part of a head's planes turns."""


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


__all__ = [
    "PartialRotaryEmbedding",
    "fastest_frequencies",
    "num_rotated",
    "rotary_embedding",
    "rotary_frequencies",
]
