"""What the model hands to a cache, and what a cache may say to it beyond what transformers' caches do."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from lckv.models.configuration_lckv import LCKVLlamaConfig

Streams = tuple[torch.Tensor, ...]
"""What one owner's readers see, in the order of its layout: each `(batch, num_heads, kv_len, head_dim)` of its own."""


class SharingCache(Cache):
    """A [`Cache`] that may drop tokens from the middle, renumber positions or need tokens one at a time.

    The model takes any transformers cache; of one of this class it asks the questions below.

    Attributes:
        renumbers: whether tokens may be returned in other columns than those in which they came.
    """

    renumbers = False

    def begin_forward(self, config: LCKVLlamaConfig, attention_mask: torch.Tensor | None, num_new_tokens: int) -> None:
        """Is told what the coming forward call holds, before masks are built and anything is written.

        Args:
            config: the model's.
            attention_mask: as the model got it, `(batch, past + q_len)` with zeros at padding, 4D, or `None`.
            num_new_tokens: `q_len`.
        """

    def needs_single_tokens(self, num_new_tokens: int) -> bool:
        """Whether `num_new_tokens` tokens must go through the model one after the other to be exact."""
        return False

    def get_key_positions(self, num_new_tokens: int, layer_idx: int) -> torch.Tensor | None:
        """Which tokens the keys belong to that `write` is about to return, `(batch or 1, kv_len)`.

        Tokens count from 0, padding included; a negative number means that there is no token, and nobody sees the
        key. `None` if they are consecutive, as `get_mask_sizes` describes them.
        """
        return None

    def get_rotary_positions(self, num_new_tokens: int, layer_idx: int) -> torch.Tensor | None:
        """The same tokens as they count for rotations: how far apart keys and queries are, `(batch or 1, kv_len)`.

        For readers that make keys of what was not rotated when it was written.
        """
        return self.get_key_positions(num_new_tokens, layer_idx)

    def check_length(self, seq_length: int) -> None:
        """Refuses texts that do not fit: asked before compiled steps, which cannot look at the length themselves.

        Args:
            seq_length: tokens of each sequence with those about to come, padding included.
        """

    def begin_positions(self, are_given: bool) -> None:
        """Is told whether the caller says at which positions the coming tokens are, before `get_next_position`."""

    def get_next_position(self) -> int | torch.Tensor:
        """The rotary position of the next token, a scalar, where the caller gives the model none."""
        return self.get_seq_length()

    def write(self, streams: Streams, layer_idx: int) -> Streams:
        """Adds the new tokens of an owner, and returns what their queries may see.

        Args:
            streams: of the new tokens, each `(batch, num_heads, q_len, head_dim)`.
            layer_idx: the owner.
        """
        raise NotImplementedError

    def peek(self, streams: Streams, layer_idx: int) -> Streams:
        """What `write` would return, each `(batch, num_heads, kv_len, head_dim)`, but keeps nothing: for drafts."""
        raise NotImplementedError


class CacheWriter:
    """Hands an owner's streams to a cache of any kind.

    transformers' caches keep keys and values, whose widths may differ: a single stream gets values without width.
    """

    def __init__(self, past_key_values: Cache) -> None:
        self.cache = past_key_values

    def __call__(self, streams: Streams, layer_idx: int) -> Streams:
        """Adds new tokens of layer `layer_idx`, and returns what they see, `(batch, num_heads, kv_len, head_dim)`."""
        if isinstance(self.cache, SharingCache):
            return self.cache.write(streams, layer_idx)
        first, second = _as_pair(self.cache, streams)
        return self.cache.update(first, second, layer_idx)[: len(streams)]


class CachePeeker(CacheWriter):
    """What a pass before the last sees of a cache: it returns what a writer would, but nothing is kept."""

    def __call__(self, streams: Streams, layer_idx: int) -> Streams:
        """What the cache holds for layer `layer_idx`, then these, each `(batch, num_heads, kv_len, head_dim)`."""
        if isinstance(self.cache, SharingCache):
            return self.cache.peek(streams, layer_idx)
        if layer_idx >= len(self.cache.layers):
            return streams
        layer = _copy_to_write(self.cache.layers[layer_idx])
        device = streams[0].device
        if layer.is_initialized and layer.keys.device != device:  # the cache is offloaded
            layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
        return layer.update(*_as_pair(self.cache, streams))[: len(streams)]


def _as_pair(cache: Cache, streams: Streams) -> tuple[torch.Tensor, torch.Tensor]:
    first, *others = streams
    if len(others) > 1:
        raise ValueError(f"{type(cache).__name__} keeps 2 streams of a layer, not {len(streams)}: use lckv.cache")
    return first, others[0] if others else first[..., :0]


def _copy_to_write(layer: Any) -> Any:
    """A copy of a layer of transformers' caches whose updates leave the original alone."""
    copied = copy.copy(layer)
    if isinstance(layer, DynamicLayer):
        return copied  # growing layers replace their tensors, static ones write into them
    copied.cumulative_length = layer.cumulative_length.clone()
    if layer.is_initialized:
        copied.keys, copied.values = layer.keys.clone(), layer.values.clone()
    return copied
