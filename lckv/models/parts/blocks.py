"""The parts of a decoder that families have in different kinds, chosen by the configuration when a model is made."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lckv.models.configuration_lckv import LCKVLlamaConfig


def build_norm(config: LCKVLlamaConfig) -> nn.Module:
    """What normalises hidden states: Llama's norm, or one that also centres them and has a bias."""
    kind = nn.LayerNorm if config.norm_type == "layer_norm" else LlamaRMSNorm
    return kind(config.hidden_size, eps=config.rms_norm_eps)


def build_mlp(config: LCKVLlamaConfig) -> nn.Module:
    """Llama's gated MLP, or a plain one."""
    return LlamaMLP(config) if config.gated_mlp else PlainMLP(config)


def build_embedding(config: LCKVLlamaConfig) -> nn.Embedding:
    """The embeddings of tokens.

    Without a `padding_idx`, whose row torch never trains: many tokenizers pad with a token of the text.
    """
    if config.embedding_multiplier == 1.0:
        return nn.Embedding(config.vocab_size, config.hidden_size)
    return ScaledEmbedding(config)


def build_head(config: LCKVLlamaConfig) -> nn.Linear:
    """The language modelling head."""
    if config.logits_scaling == 1.0 and config.final_logit_softcapping is None:
        return nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    return ScaledHead(config)


class PlainMLP(nn.Module):
    """Two projections with the activation between them, as in GPT-2."""

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From `(batch, q_len, hidden_size)` to the same shape."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class ScaledEmbedding(nn.Embedding):
    """Embeddings that enter the layers multiplied, while a head that is tied to them has them as they are."""

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.multiplier = config.embedding_multiplier

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(batch, q_len)` to `(batch, q_len, hidden_size)`."""
        # Rounded to the type of the weights first, as Gemma was trained.
        return super().forward(input_ids) * torch.tensor(self.multiplier, dtype=self.weight.dtype)


class ScaledHead(nn.Linear):
    """A head whose logits are divided, as in Granite, and bounded by a hyperbolic tangent, as in Gemma 2."""

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.scaling, self.softcap = config.logits_scaling, config.final_logit_softcapping

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From `(..., hidden_size)` to logits `(..., vocab_size)`."""
        logits = super().forward(hidden_states)
        if self.scaling != 1.0:
            logits = logits / self.scaling
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


__all__ = ["PlainMLP", "ScaledEmbedding", "ScaledHead", "build_embedding", "build_head", "build_mlp", "build_norm"]
