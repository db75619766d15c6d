"""One layer of the decoder: Llama's parts, with keys and values (KV) that may be another layer's."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lckv.models.attention import LCKVAttention, PositionEmbeddings, last_positions
from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.iteration import CacheView
from lckv.models.masks import VisibleKeys

AnyCache = Cache | CacheView


class LCKVDecoderLayer(GradientCheckpointingLayer):
    """One decoder layer. Keys and values of another layer come in as arguments, its own go out as results."""

    def __init__(self, config: LCKVLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        plan = config.sharing_plan.layers[layer_idx]
        self.layer_idx = layer_idx
        self.computes_kv = plan.computes_kv
        self.reads_itself = plan.kv_source == layer_idx
        self.self_attn = LCKVAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_states: torch.Tensor | None = None,
        value_states: torch.Tensor | None = None,
        *,
        visible_keys: VisibleKeys,
        position_embeddings: PositionEmbeddings,
        past_key_values: AnyCache | None = None,
        needs_kv: bool = True,
        num_outputs: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Runs the layer.

        Args:
            hidden_states: `(batch, q_len, hidden_size)`.
            key_states: `(batch, num_kv_heads, kv_len, head_dim)` of the layer that this one reads; unused if it reads
                itself, `None` if all keys and values are zero.
            value_states: like `key_states`.
            visible_keys: which keys each query sees, of the last `num_outputs` tokens.
            position_embeddings: cosines and sines for the new tokens.
            past_key_values: where a layer that computes KV adds it to that of earlier tokens.
            needs_kv: whether somebody reads this layer's KV.
            num_outputs: how many of the last tokens' outgoing hidden states somebody uses; `None` for all.
            kwargs: passed on to the attention backend.

        Returns:
            The hidden states that leave the layer, its own keys and values for its readers, and the attention weights,
            if the backend has them; `None` for what is not needed.
        """
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        own_keys = own_values = None
        if self.computes_kv and needs_kv:
            own_keys, own_values = self.self_attn.project_kv(hidden_states, position_embeddings)
            if past_key_values is not None:
                own_keys, own_values = past_key_values.update(own_keys, own_values, self.layer_idx)
        if num_outputs == 0:
            return None, own_keys, own_values, None
        if num_outputs is not None:
            residual, hidden_states = residual[:, -num_outputs:], hidden_states[:, -num_outputs:]
            position_embeddings = last_positions(position_embeddings, num_outputs)
        if self.reads_itself:
            key_states, value_states = own_keys, own_values
        attn_output, attn_weights = self.self_attn(
            hidden_states, key_states, value_states, visible_keys, position_embeddings, **kwargs
        )
        hidden_states = residual + attn_output
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, own_keys, own_values, attn_weights
