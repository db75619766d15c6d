"""What one forward call of the decoder hands from layer to layer and from pass to pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import Cache

from lckv.models.attention import PositionEmbeddings
from lckv.models.iteration import CycleReport, PassSchedule
from lckv.models.masks import VisibleKeys


@dataclass
class ForwardCall:
    """What stays the same through all layers and passes of one forward call, or of one of its tokens."""

    attention_mask: torch.Tensor | None
    document_ids: torch.Tensor | None
    has_past: bool
    position_embeddings: PositionEmbeddings
    past_key_values: Cache | None
    layer_kwargs: dict[str, Any]
    schedule: PassSchedule
    num_outputs: int | None = None  # of the last tokens, from the highest layer that computes KV on; `None` for all
    visible_keys: list[VisibleKeys] = field(default_factory=list)
    visible_keys_of_outputs: list[VisibleKeys] | None = None
    hidden_states: list[torch.Tensor] | None = None
    attentions: list[Any] | None = None
    needs_residual: bool = False
    reports: list[CycleReport] = field(default_factory=list)


def count_outputs(logits_to_keep: int | torch.Tensor, num_new_tokens: int) -> int | None:
    """How many of the last tokens' hidden states are wanted; `None` for all."""
    is_fewer = isinstance(logits_to_keep, int) and 0 < logits_to_keep < num_new_tokens
    return cast(int, logits_to_keep) if is_fewer else None
