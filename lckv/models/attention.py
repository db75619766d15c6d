"""Attention over keys and values that another layer may have computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.parts.rotary import PositionEmbeddings, apply_rotary
from lckv.models.parts.sharing_cache import Streams
from lckv.models.visibility.backends import attend
from lckv.models.visibility.masks import VisibleKeys
from lckv.sharing.layout import KEYS, VALUES, Stream


class LCKVAttention(nn.Module):
    """Multi-head attention whose keys and values may come from other layers.

    A layer has a key projection if some entry of `layer_types` names it for its keys, and a value projection if one
    does for its values. Another kind of attention, over
    other streams, is a subclass with `add_projections`, `project`, `write`, `unrotated` and `keys_and_values` (or
    `forward`) of its own, and a configuration whose `kv_layout` says which streams these are.
    """

    query_modules: ClassVar[frozenset[str]] = frozenset({"q_proj", "q_norm"})
    """The submodules that make the queries."""

    stream_modules: ClassVar[frozenset[str]] = frozenset({"k_proj", "v_proj", "k_norm"})
    """The submodules that make what the layer keeps for its readers."""

    def __init__(self, config: LCKVLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        assert config.head_dim is not None and config.num_key_value_heads is not None  # filled in by the configuration
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.use_qk_norm = config.use_qk_norm
        self.kv_size = config.num_key_value_heads * self.head_dim
        query_size = config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.add_projections(config.kv_layout.streams.get(layer_idx, ()))
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.has_output_bias)
        if config.use_qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def add_projections(self, kept: Sequence[Stream]) -> None:
        """Makes the submodules from which keys and values come; `kept` is what the layer writes, if anything."""
        config, names = self.config, [stream.name for stream in kept]
        self.computes_keys, self.computes_values = KEYS in names, VALUES in names
        if self.computes_keys:
            self.k_proj = nn.Linear(config.hidden_size, self.kv_size, bias=config.attention_bias)
        if self.computes_values:
            self.v_proj = nn.Linear(config.hidden_size, self.kv_size, bias=config.attention_bias)
        if self.computes_keys and config.use_qk_norm:
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def write(self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings) -> Streams:
        """Computes what the layer keeps for its readers: rotated keys, values, or both.

        Args:
            hidden_states: `(batch, q_len, hidden_size)`.
            position_embeddings: cosines and sines for these tokens.

        Returns:
            The new tokens' streams, each `(batch, num_kv_heads, q_len, head_dim)`.
        """
        streams = self.project(hidden_states)
        return (apply_rotary(streams[0], position_embeddings), *streams[1:]) if self.computes_keys else streams

    def project(self, hidden_states: torch.Tensor) -> Streams:
        """What `write` gives, before anything is rotated."""
        streams: Streams = ()
        if self.computes_keys:
            key_states = self._split_heads(self.k_proj(hidden_states))
            streams = (self.k_norm(key_states) if self.use_qk_norm else key_states,)
        if self.computes_values:
            streams = (*streams, self._split_heads(self.v_proj(hidden_states)))
        return streams

    def unrotated(self, streams: Streams) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each `(batch, num_kv_heads, kv_len, head_dim)`, of streams that `project` has given."""
        key_states, value_states = streams
        return key_states, value_states

    def forward(
        self,
        hidden_states: torch.Tensor,
        streams: Streams | None,
        visible_keys: VisibleKeys,
        position_embeddings: PositionEmbeddings,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Reads streams, of this or of other layers.

        Args:
            hidden_states: `(batch, q_len, hidden_size)`.
            streams: keys and values, each `(batch, num_kv_heads, kv_len, head_dim)`; `None` if all are zero.
            visible_keys: which keys each query sees.
            position_embeddings: cosines and sines for the queries.
            kwargs: passed on to the attention backend.

        Returns:
            The output `(batch, q_len, hidden_size)` and, from the eager backend, the attention weights
            `(batch, num_heads, q_len, kv_len)`.
        """
        if streams is None:
            # Attention to all-zero values is zero whatever the weights, and leaves only the output's bias.
            output = torch.zeros_like(hidden_states)
            return (output if self.o_proj.bias is None else output + self.o_proj.bias), None
        query_states = self._split_heads(self.q_proj(hidden_states))
        if self.use_qk_norm:
            query_states = self.q_norm(query_states)
        query_states = self.rotate_queries(query_states, position_embeddings, visible_keys)
        key_states, value_states = self.keys_and_values(streams, visible_keys)
        attn_output, attn_weights = attend(self, query_states, key_states, value_states, visible_keys, **kwargs)
        attn_output = self.from_values(attn_output, visible_keys)
        return self.o_proj(attn_output.flatten(2)), attn_weights  # (batch, q_len, num_heads, head_dim) -> hidden_size

    def rotate_queries(
        self, query_states: torch.Tensor, position_embeddings: PositionEmbeddings, visible_keys: VisibleKeys
    ) -> torch.Tensor:
        """Queries `(batch, num_heads, q_len, head_dim)` rotated as keys are, for what `keys_and_values` gives."""
        return apply_rotary(query_states, position_embeddings)

    def keys_and_values(self, streams: Streams, visible_keys: VisibleKeys) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `(batch, num_kv_heads, kv_len, head_dim)` and values like them, from the streams that the layer reads.

        For a single query either may be something in its place, `(batch, 1 or num_kv_heads, kv_len, width)`, for which
        `rotate_queries` has made the query, and of whose sum `from_values` makes that of values.
        """
        key_states, value_states = streams
        return key_states, value_states

    def from_values(self, attn_output: torch.Tensor, visible_keys: VisibleKeys) -> torch.Tensor:
        """Weighted sums of values `(batch, q_len, num_heads, head_dim)` from those of what `keys_and_values` gave."""
        return attn_output

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`(batch, q_len, size)` as `(batch, num_heads, q_len, head_dim)`."""
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)
