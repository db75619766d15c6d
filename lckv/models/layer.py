"""One decoder layer with its two verbs.

A layer *writes* (hidden states to the streams that others read) and *reads* (hidden states and streams to hidden
states). Streams are arguments and results of layers: nothing is passed on behind a layer's back, so that
checkpointing, compilation and sharding see all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from lckv.models.attention import LCKVAttention
from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.latent_attention import LatentAttention
from lckv.models.parts.blocks import build_mlp, build_norm
from lckv.models.parts.rotary import PositionEmbeddings, last_positions
from lckv.models.parts.sharing_cache import CacheWriter, Streams
from lckv.models.visibility.masks import VisibleKeys


class LCKVDecoderLayer(GradientCheckpointingLayer):
    """One decoder layer, which writes streams, reads streams, or does both."""

    def __init__(self, config: LCKVLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        attention = LCKVAttention if config.latents_of(layer_idx) is None else LatentAttention
        self.self_attn = attention(config, layer_idx)
        self.key_label = config.rope_label(layer_idx)
        self.mlp = build_mlp(config)
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)
        self.residual_multiplier = config.residual_multiplier
        self.use_output_norms = config.use_output_norms
        if config.use_output_norms:
            self.attention_output_layernorm = build_norm(config)
            self.mlp_output_layernorm = build_norm(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *sources: torch.Tensor | int | None,
        position_embeddings: PositionEmbeddings,
        query_embeddings: PositionEmbeddings,
        visible_keys: VisibleKeys | None,
        writes: bool = True,
        cache: CacheWriter | None = None,
        attentions: dict[int, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """Writes, then reads. One call for both: FSDP gathers weights, and checkpointing recomputes, once per call.

        Args:
            hidden_states: `(batch, q_len, hidden_size)`.
            sources: the streams that the layer reads, each `(batch, num_heads, kv_len, head_dim)`; the number among
                its own of one that it writes itself, and `None` where nobody has written so far, so that it is zero.
            position_embeddings: cosines and sines for the new tokens, as the layer rotates its keys.
            query_embeddings: the same as the keys are rotated that it reads.
            visible_keys: which keys each query sees, for all tokens or the last ones; `None` if nobody reads.
            writes: whether the layer writes its streams.
            cache: takes what is written, and gives what queries see of it and of earlier tokens.
            attentions: if given, the attention weights go there, under the layer's index.
            kwargs: passed on to the attention backend.

        Returns:
            The hidden states that leave the layer, for the tokens that `visible_keys` is about, or `None` if it has
            not read; behind them the streams that it has written, if it has, with earlier tokens' in front. One flat
            tuple, as reentrant checkpointing gives gradients to nothing deeper.
        """
        normed = self.input_layernorm(hidden_states)
        written = self.write(normed, position_embeddings, cache) if writes else None
        if visible_keys is None:
            return (None, *(written or ()))
        streams = self._gather(sources, written)
        output = self.read(hidden_states, normed, streams, visible_keys, query_embeddings, attentions, **kwargs)
        return (output, *(written or ()))

    @staticmethod
    def _gather(sources: tuple[torch.Tensor | int | None, ...], written: Streams | None) -> Streams | None:
        """What the layer reads: its own streams among those of others; `None` if one of them is still zero."""
        streams = []
        for source in sources:
            stream = written[source] if written is not None and isinstance(source, int) else source
            if not isinstance(stream, torch.Tensor):
                return None
            streams.append(stream)
        return tuple(streams)

    def write(
        self, normed: torch.Tensor, position_embeddings: PositionEmbeddings, cache: CacheWriter | None
    ) -> Streams:
        """Computes the streams of the new tokens, and adds them to those of earlier ones.

        Args:
            normed: `(batch, q_len, hidden_size)`, behind the layer's first norm.
            position_embeddings: cosines and sines for these tokens.
            cache: where they go; `None` if nothing is kept.

        Returns:
            The streams, each `(batch, num_heads, kv_len, head_dim)`.
        """
        streams = self.self_attn.write(normed, position_embeddings)
        return streams if cache is None else cache(streams, self.layer_idx)

    def read(
        self,
        hidden_states: torch.Tensor,
        normed: torch.Tensor,
        streams: Streams | None,
        visible_keys: VisibleKeys,
        position_embeddings: PositionEmbeddings,
        attentions: dict[int, Any] | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attends to streams, and computes what leaves the layer, `(batch, num_queries, hidden_size)`."""
        num_queries = visible_keys.num_queries
        if num_queries < position_embeddings[0].shape[2]:  # the hidden states may have been cut by a layer below
            hidden_states, normed = hidden_states[:, -num_queries:], normed[:, -num_queries:]
            position_embeddings = last_positions(position_embeddings, num_queries)
        attn_output, attn_weights = self.self_attn(normed, streams, visible_keys, position_embeddings, **kwargs)
        if attentions is not None:
            attentions[self.layer_idx] = attn_weights
        if self.use_output_norms:
            attn_output = self.attention_output_layernorm(attn_output)
        hidden_states = torch.add(hidden_states, attn_output, alpha=self.residual_multiplier)
        mlp_output = self.mlp(self.post_attention_layernorm(hidden_states))
        if self.use_output_norms:
            mlp_output = self.mlp_output_layernorm(mlp_output)
        return torch.add(hidden_states, mlp_output, alpha=self.residual_multiplier)
