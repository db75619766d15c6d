"""Multi-head Latent Attention (DeepSeek-V2, 2024): a token keeps a short latent, of which keys and values are made.

    kept          c = kv_a_proj(x), once per owner: `latent`, or `key_latent` and `value_latent`
    read          k = rotate(k_norm(k_b_proj(c)))     v = v_b_proj(c), by every reader with projections of its own

A latent is not rotated, as no projection could undo that: a rotation mixes what `k_b_proj` gives, by the position of
the token. So keys are made anew for all tokens in sight whenever they are read. Values need not be: their weighted sum
is the projection of the latents' weighted sum, which is what a decoding step computes.

With `rotated_planes`, keys need not be made either:

    kept          c, z = kv_a_proj(x), and z is rotated: a pair of numbers for each of these planes, in one stream
    read          k = k_b_proj(c, z)                  v = v_b_proj(c)       q is rotated in these planes alone

`k_b_proj` gives keys of z in the rotated planes, each pair in its own, where heads turn and scale it, which a rotation
does not notice; and keys of c in the others. So the score q k is that of the query, sent through this projection, with
what is kept: this is attention with a single head of keys (c, z) and of values c, as DeepSeek's kernels compute it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lckv.models.attention import LCKVAttention
from lckv.models.parts.planes import PlaneProjection, only_planes, rotate_planes
from lckv.models.parts.rotary import PositionEmbeddings, apply_rotary
from lckv.models.parts.sharing_cache import Streams
from lckv.models.visibility.masks import VisibleKeys
from lckv.sharing.layout import PLANES, Stream

_ABSORBING = ("eager", "sdpa")
"""Backends whose masks of a single query are tensors."""


class LatentAttention(LCKVAttention):
    """Attention that keeps latents and makes keys and values of those that it reads, its own or another layer's."""

    stream_modules: ClassVar[frozenset[str]] = frozenset({"kv_a_proj", "k_b_proj", "v_b_proj", "k_norm"})

    def add_projections(self, kept: Sequence[Stream]) -> None:
        """Makes the projections to the latents that the layer keeps, and from those that it reads."""
        config, bias = self.config, self.config.attention_bias
        read = config.latents_of(self.layer_idx)
        assert read is not None
        if kept:
            self.own_planes = kept[0].planes
            self.own_sizes = [stream.head_dim for stream in kept]
            has_bias = bias and bool(self.own_planes)  # what is rotated is so with its bias
            self.kv_a_proj = nn.Linear(config.hidden_size, sum(self.own_sizes), bias=has_bias)
        self.planes = tuple(read.get(PLANES, ()))
        sizes = [size for name, size in read.items() if name != PLANES]
        self.k_b_proj: nn.Linear | PlaneProjection
        if self.planes:
            num_heads = self.kv_size // self.head_dim
            self.k_b_proj = PlaneProjection(sizes[0], self.planes, num_heads, self.head_dim, bias)
        else:
            self.k_b_proj = nn.Linear(sizes[0], self.kv_size, bias=bias)
        self.v_b_proj = nn.Linear(sizes[-1], self.kv_size, bias=bias)
        if config.use_qk_norm:
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def write(self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings) -> Streams:
        """Computes the latents of these tokens, each `(batch, 1, q_len, size)`, with what is rotated at their ends."""
        latents = self.project(hidden_states)
        return (rotate_planes(latents[0], position_embeddings, self.own_planes),) if self.own_planes else latents

    def project(self, hidden_states: torch.Tensor) -> Streams:
        """What `write` gives, before anything is rotated."""
        return tuple(latent[:, None] for latent in self.kv_a_proj(hidden_states).split(self.own_sizes, dim=-1))

    def unrotated(self, streams: Streams) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each `(batch, num_kv_heads, kv_len, head_dim)`, of streams that `project` has given."""
        key_latent, value_latent = streams[0][:, 0], streams[-1][:, 0, :, : self.v_b_proj.in_features]
        key_states = self.k_b_proj(key_latent)
        if not self.planes:
            key_states = self._split_heads(key_states)
        if self.use_qk_norm:
            key_states = self.k_norm(key_states)
        return key_states, self._split_heads(self.v_b_proj(value_latent))

    def rotate_queries(
        self, query_states: torch.Tensor, position_embeddings: PositionEmbeddings, visible_keys: VisibleKeys
    ) -> torch.Tensor:
        """Queries `(batch, num_heads, q_len, head_dim)` rotated where keys are, or as wide as what is kept."""
        if not isinstance(self.k_b_proj, PlaneProjection):
            return apply_rotary(query_states, position_embeddings)
        if self._absorbs(visible_keys):
            return self.k_b_proj.absorb(query_states, position_embeddings)
        return apply_rotary(query_states, only_planes(position_embeddings, self.planes))

    def keys_and_values(self, streams: Streams, visible_keys: VisibleKeys) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `(batch, num_kv_heads, kv_len, head_dim)`, and values like them; or the latents in their places."""
        key_latent, value_latent = streams[0], streams[-1]
        absorbs = self._absorbs(visible_keys)
        if self.planes:
            value_latent = key_latent[..., : self.v_b_proj.in_features]
            key_states = key_latent if absorbs else self.k_b_proj(key_latent[:, 0])
        else:
            key_states = self._split_heads(self.k_b_proj(key_latent[:, 0]))
            if self.use_qk_norm:
                key_states = self.k_norm(key_states)
            assert visible_keys.key_rotation is not None
            key_states = apply_rotary(key_states, visible_keys.key_rotation)
        return key_states, value_latent if absorbs else self._split_heads(self.v_b_proj(value_latent[:, 0]))

    def from_values(self, attn_output: torch.Tensor, visible_keys: VisibleKeys) -> torch.Tensor:
        """Weighted sums of values, `(batch, q_len, num_heads, head_dim)`, from those of values or of latents."""
        if not self._absorbs(visible_keys):
            return attn_output
        weight = self.v_b_proj.weight.unflatten(0, (-1, self.head_dim))  # (num_kv_heads, head_dim, size)
        by_head = attn_output.unflatten(2, (len(weight), -1))  # (batch, 1, num_kv_heads, groups, size)
        values = by_head @ weight.transpose(1, 2)
        if self.v_b_proj.bias is not None:  # once, as weights sum up to one
            values = values + self.v_b_proj.bias.unflatten(0, (-1, 1, self.head_dim))
        return values.flatten(2, 3)

    def _absorbs(self, visible_keys: VisibleKeys) -> bool:
        """Whether latents are read as they are, which pays for a single query, for which all tokens' would be made.

        Not where a query may see nothing and values have a bias: its sum has to be zero, without that.
        """
        may_see_nothing = visible_keys.drop_own_token or visible_keys.sees_nothing is not None
        return (
            visible_keys.num_queries == 1
            and not self.training
            and not (may_see_nothing and self.v_b_proj.bias is not None)
            and self.config._attn_implementation in _ABSORBING
        )


__all__ = ["LatentAttention"]
