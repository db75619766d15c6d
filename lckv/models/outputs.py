"""What the decoder and the language model return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class LCKVModelOutputWithPast(BaseModelOutputWithPast):
    """[`BaseModelOutputWithPast`] with what iterating over layers that read upward came to.

    Args:
        num_passes: passes over the cycle that took most; 1 where none was needed.
        kv_residual: how far KV still moved in the last pass (a scalar), if asked for.
    """

    num_passes: int | None = None
    kv_residual: torch.Tensor | None = None


@dataclass
class LCKVCausalLMOutputWithPast(CausalLMOutputWithPast):
    """[`CausalLMOutputWithPast`] with `num_passes` and `kv_residual` as in [`LCKVModelOutputWithPast`]."""

    num_passes: int | None = None
    kv_residual: torch.Tensor | None = None
