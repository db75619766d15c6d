"""One layer with its two verbs, and how a stack of them runs: once, or in cycles.

A layer *writes* (hidden states to the streams that others read) and *reads* (hidden states and streams to hidden
states). Streams are arguments and results of layers: nothing is passed on behind a layer's back, so that
checkpointing, compilation and sharding see all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from lckv.iteration import Passes
from lckv.layout import KVLayout
from lckv.models.attention import LCKVAttention, last_positions
from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.latent_attention import LatentAttention
from lckv.models.masks import VisibleKeys
from lckv.models.parts import build_mlp, build_norm
from lckv.models.positions import PositionEmbeddings
from lckv.models.sharing_cache import CachePeeker, CacheWriter, Streams
from lckv.patterns import Segment, SharingPlan

States = dict[int, Streams]
"""What each owner's readers see, by layer index. Every pass makes a new dictionary; none is written twice."""


class LCKVDecoderLayer(GradientCheckpointingLayer):
    """One decoder layer, which writes streams, reads streams, or does both."""

    def __init__(self, config: LCKVLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        sources = config.kv_layout.sources[layer_idx]
        # For each stream that the layer reads: which of its own it is, or `None` for another layer's.
        self.own_indices = tuple(source.index if source.owner == layer_idx else None for source in sources)
        attention = LCKVAttention if config.latents_of(layer_idx) is None else LatentAttention
        self.self_attn = attention(config, layer_idx)
        self.key_label, self.query_label = config.rope_label(layer_idx), config.query_label(layer_idx)
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
        *sources: torch.Tensor | None,
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
            sources: the streams that the layer reads, each `(batch, num_heads, kv_len, head_dim)`; `None` where the
                layer itself writes them, and where nobody has so far, so that they are zero.
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

    def _gather(self, sources: tuple[torch.Tensor | None, ...], written: Streams | None) -> Streams | None:
        """What the layer reads: its own streams among those of others; `None` if one of them is still zero."""
        streams = []
        for index, source in zip(self.own_indices, sources, strict=True):
            stream = source if index is None or written is None else written[index]
            if stream is None:
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
        if num_queries < position_embeddings[0].shape[1]:  # the hidden states may have been cut by a layer below
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


@dataclass
class Trace:
    """What a forward call reports beside its result, noted while it runs; `None` for what nobody asked for.

    Attributes:
        hidden_states: what enters each layer, `(batch, q_len, hidden_size)`, and leaves the last.
        attentions: the attention weights `(batch, num_heads, q_len, kv_len)`, by layer.
        residuals: how far the KV of each cycle moved in its last pass, scalars.
        num_passes: passes over the cycle that took most.
    """

    hidden_states: list[torch.Tensor] | None = None
    attentions: dict[int, Any] | None = None
    residuals: list[torch.Tensor] | None = None
    num_passes: int = 1

    @property
    def wants_each_layer(self) -> bool:
        """Whether every layer's output or weights are returned, so that all have to run for all tokens."""
        return self.hidden_states is not None or self.attentions is not None

    def note(self, hidden_states: torch.Tensor) -> None:
        """Notes what enters a layer, or leaves the last, `(batch, q_len, hidden_size)`, if that is to be returned."""
        if self.hidden_states is not None:
            self.hidden_states.append(hidden_states)


@dataclass(frozen=True)
class Stack:
    """The layers of a decoder, and what they are given in one forward call, or for one of its tokens.

    Attributes:
        layers: from the bottom.
        plan: which of them form cycles.
        layout: which streams each of them writes and reads.
        position_embeddings: cosines and sines of the new tokens, by the name of the rotary embedding.
        visible_keys: for every layer, which keys its queries see; `None` where no output is wanted.
        cache: takes what is written in the last pass.
        has_past: whether the cache holds earlier tokens.
        passes: over each cycle.
        kwargs: for the attention backend.
        trace: where to note what is reported.
    """

    layers: nn.ModuleList
    plan: SharingPlan
    layout: KVLayout
    position_embeddings: dict[str | None, PositionEmbeddings]
    visible_keys: list[VisibleKeys | None]
    cache: Cache | None
    has_past: bool
    passes: Passes
    kwargs: dict[str, Any]
    trace: Trace = field(default_factory=Trace)

    def run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs all layers from the bottom.

        Args:
            hidden_states: `(batch, q_len, hidden_size)`.

        Returns:
            Those that leave the last layer, for the tokens whose outputs are wanted.
        """
        states: States = {}
        for segment in self.plan.segments:
            run = self._run_cycle if segment.is_cycle else self._run_layers
            hidden_states, states = run(segment, hidden_states, states)
        return hidden_states

    def _run_cycle(self, cycle: Segment, hidden_states: torch.Tensor, states: States) -> tuple[torch.Tensor, States]:
        """Runs the layers of a cycle until what its upward readers read has settled (Wu and Tu, ACL 2024).

        Every pass starts from the same hidden states and reads, above itself, what the pass before has written; the
        first one reads zeros. Passes before the last only make KV for the next one. The first of them run without
        gradient: it flows through the KV of the graded passes alone.
        """
        owners = self._owners_read_upward(cycle)
        # New tokens are to read the cached ones from the first pass on. Without any, an owner that has not written is
        # missing from `states`, and its readers skip attention instead of attending to zeros.
        if self.has_past:
            states = states | self._past_states(owners, hidden_states)
        num_ungraded, passes = 0, self.passes
        with torch.no_grad():
            while num_ungraded < passes.num_ungraded:
                before, states = states, self._run_draft(cycle, hidden_states, states)
                num_ungraded += 1
                # The first pass has nothing to be compared with: its upward readers have read zeros.
                if passes.tolerance is not None and num_ungraded > 1:
                    if relative_change(before, states, owners) < passes.tolerance:
                        break
        # From here on, `states` carry gradient: a loss behind the last pass reaches the projections of the owners
        # through what the graded pass before it wrote.
        for _ in range(passes.num_graded - 1):
            states = self._run_draft(cycle, hidden_states, states)
        before = states
        hidden_states, states = self._run_layers(cycle, hidden_states, states)
        num_passes = num_ungraded + passes.num_graded
        self.trace.num_passes = max(self.trace.num_passes, num_passes)
        if self.trace.residuals is not None and num_passes > 1:
            self.trace.residuals.append(relative_change(before, states, owners))
        return hidden_states, states

    def _run_draft(self, cycle: Segment, hidden_states: torch.Tensor, states: States) -> States:
        """A pass over a cycle that another one follows: it writes what that one will read, and nothing to the cache.

        Nobody needs what leaves the top layer, so that layer only writes; an owner that no layer below the top reads
        does not even do that.
        """
        # A copy, in which layers find what owners below them have just written, and of those above what the pass
        # before wrote. The dictionary before it stays as it was, to be compared with.
        states, top = dict(states), cycle.stop - 1
        read_again = {source.owner for read in self.layout.sources[cycle.start : top] for source in read}
        peek = None if self.cache is None else CachePeeker(self.cache)
        for layer_idx in range(cycle.start, cycle.stop):
            visible_keys = None if layer_idx == top else self.visible_keys[layer_idx]
            writes = layer_idx == top or layer_idx in read_again
            hidden_states = self._run_layer(layer_idx, hidden_states, states, visible_keys, writes, peek)
        return states

    def _run_layers(
        self, segment: Segment, hidden_states: torch.Tensor, states: States
    ) -> tuple[torch.Tensor, States]:
        """Runs layers for good: all owners write, to the cache if there is one."""
        states = dict(states)
        write = None if self.cache is None else CacheWriter(self.cache)
        for layer_idx in range(segment.start, segment.stop):
            visible_keys, writes = self.visible_keys[layer_idx], layer_idx in self.layout.owners
            if visible_keys is None and not writes:
                break  # nobody wants outputs, and the highest owner has written
            hidden_states = self._run_layer(
                layer_idx, hidden_states, states, visible_keys, writes, write, self.trace.attentions
            )
            self.trace.note(hidden_states)
        return hidden_states, states

    def _run_layer(
        self,
        layer_idx: int,
        hidden_states: torch.Tensor,
        states: States,
        visible_keys: VisibleKeys | None,
        writes: bool,
        cache: CacheWriter | None,
        attentions: dict[int, Any] | None = None,
    ) -> torch.Tensor:
        """Runs one layer, and notes in `states` what it writes. Every call looks alike, so that few are compiled."""
        layer: Any = self.layers[layer_idx]
        hidden_states, *written = layer(
            hidden_states,
            *self._read(layer_idx, states),
            position_embeddings=self.position_embeddings[layer.key_label],
            query_embeddings=self.position_embeddings[layer.query_label],
            visible_keys=visible_keys,
            writes=writes,
            cache=cache,
            attentions=attentions,
            **self.kwargs,
        )
        if written:
            states[layer_idx] = tuple(written)
        return hidden_states

    def _read(self, layer_idx: int, states: States) -> list[torch.Tensor | None]:
        """The streams that a layer reads of others; `None` for its own, and for those that nobody has written yet."""
        return [
            None if source.owner == layer_idx or source.owner not in states else states[source.owner][source.index]
            for source in self.layout.sources[layer_idx]
        ]

    def _owners_read_upward(self, cycle: Segment) -> tuple[int, ...]:
        """The layers of a cycle that some layer below them reads, from the bottom."""
        readers = range(cycle.start, cycle.stop)
        above = {source.owner for reader in readers for source in self.layout.sources[reader] if source.owner > reader}
        return tuple(sorted(above))

    def _past_states(self, owners: Iterable[int], hidden_states: torch.Tensor) -> States:
        """What the owners have in the cache, followed by zeros for the new tokens, which nobody has written yet."""
        dtype = hidden_states.dtype
        if torch.is_autocast_enabled(hidden_states.device.type):
            dtype = torch.get_autocast_dtype(hidden_states.device.type)
        batch_size, q_len = hidden_states.shape[:2]
        states = {}
        for owner in owners:
            zeros = tuple(
                hidden_states.new_zeros(batch_size, stream.num_heads, q_len, stream.head_dim, dtype=dtype)
                for stream in self.layout.store(owner).streams
            )
            states[owner] = zeros if self.cache is None else CachePeeker(self.cache)(zeros, owner)
        return states


@torch.no_grad()
def relative_change(before: States, after: States, owners: Iterable[int]) -> torch.Tensor:
    """Distance between the streams of two passes over the size of the later, in the Frobenius norm: a scalar."""
    pairs = [pair for owner in owners for pair in zip(before[owner], after[owner], strict=True)]
    distance = torch.stack([(new.float() - old.float()).square().sum() for old, new in pairs]).sum()
    size = torch.stack([new.float().square().sum() for _, new in pairs]).sum()
    return (distance / size.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
