"""The default cache: full layers grow with the text, sliding ones are rings of the window's size."""

from __future__ import annotations

import torch

from lckv.cache.base import CACHES, KVCache
from lckv.cache.layers import KVLayer, join, roll_ring, writable
from lckv.models.parts.sharing_cache import Streams
from lckv.sharing.layout import Store


class FullLayer(KVLayer):
    """Keeps every token, in tensors `(batch, num_heads, seq_len, head_dim)` that are never longer than the text."""

    def peek(self, streams: Streams) -> Streams:
        """The cached tokens followed by the new ones, each stream `(batch, num_heads, kv_len, head_dim)`."""
        return join(self.streams, streams) if self.is_initialized else streams

    def write(self, streams: Streams) -> Streams:
        """Appends, and returns everything, each stream `(batch, num_heads, kv_len, head_dim)`."""
        if not self.is_initialized:
            self.lazy_initialization(*streams)
        self.streams = join(self.streams, streams)  # a copy even at first: the model's are parts of larger tensors
        self.seq_length += streams[0].shape[2]
        return self.streams

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens."""
        self.check_rollback(tokens_to_remove)
        if tokens_to_remove:
            self.seq_length += tokens_to_remove
            self.change_tensors(lambda states: states[:, :, : self.seq_length].clone())


class RingLayer(KVLayer):
    """Keeps the last `window` tokens in tensors `(batch, num_heads, min(seq_len, window), head_dim)`.

    Once the tensors are full they are a ring: the token at position *p* lies in slot `p % window`, and is overwritten
    by the one `window` later, so that a decoding step writes one slot and moves nothing. The oldest token then lies
    in slot `seq_length % window`. Until they are full, and while dropped tokens are recorded for a rollback, the
    tensors are in order. What is returned is always in order, as a copy: the ring may move on meanwhile.

    Attributes:
        num_kept: how many of the last tokens are in the tensors. After a rollback these may be fewer than the slots:
            what lies before them is stale, or zeros, and no query of a later token sees it.
        is_ring: whether the tensors are a ring.
    """

    scalars = {"seq_length": 0, "num_kept": 0, "is_ring": False, "record_past": False}
    window: int
    num_kept: int
    is_ring: bool

    def count_kept(self) -> int:
        """How many of the last tokens are here."""
        return self.num_kept

    def peek(self, streams: Streams) -> Streams:
        """The last `window - 1` cached tokens, oldest first, followed by the new ones.

        Each stream is `(batch, num_heads, min(past, window - 1) + q_len, head_dim)`.
        """
        if not self.is_initialized:
            return streams
        num_past = min(self.seq_length, self.window - 1)  # a new token sees itself and that many before it
        past = tuple(states[:, :, states.shape[2] - num_past :] for states in self._in_order())
        return join(past, streams)

    def write(self, streams: Streams) -> Streams:
        """Writes over the oldest tokens, and returns what queries see, each `(batch, num_heads, kv_len, head_dim)`."""
        if not self.is_initialized:
            self.lazy_initialization(*streams)
        num_new = streams[0].shape[2]
        seen = self.peek(streams)  # before anything is overwritten: the first new tokens still see the oldest
        if self.record_past:
            self.streams, self.is_ring = join(self._in_order(), streams), False  # whatever the window
            self.seq_length += num_new
            self.num_kept += num_new
        elif self.is_ring and num_new < self.window:
            self._overwrite_oldest(streams)
        else:
            self._lay_out(seen, self.seq_length + num_new, self.num_kept + num_new)
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, and drops recorded ones that have left the window."""
        self.check_rollback(tokens_to_remove)
        if self.is_initialized and (tokens_to_remove or not self.is_ring):
            stop = self.streams[0].shape[2] + tokens_to_remove
            left = tuple(states[:, :, :stop] for states in self._in_order())
            self._lay_out(left, self.seq_length + tokens_to_remove, self.num_kept + tokens_to_remove)

    def _in_order(self) -> Streams:
        """Everything in the tensors, oldest first."""
        if not self.is_ring:
            return self.streams
        oldest = self.seq_length % self.window
        return tuple(roll_ring(states, -oldest) for states in self.streams)

    def _lay_out(self, streams: Streams, seq_length: int, num_kept: int) -> None:
        """Fills the tensors anew with the last of these tokens, which are in order and end at `seq_length`."""
        num_slots = min(seq_length, self.window)
        self.seq_length, self.num_kept, self.is_ring = seq_length, min(num_kept, num_slots), num_slots == self.window
        oldest = seq_length % self.window if self.is_ring else 0
        self.streams = tuple(roll_ring(_last_tokens(states, num_slots), oldest) for states in streams)

    def _overwrite_oldest(self, streams: Streams) -> None:
        num_new = streams[0].shape[2]
        slots = torch.arange(self.seq_length, self.seq_length + num_new, device=self.streams[0].device) % self.window
        self.streams = tuple(map(writable, self.streams))
        for held, new in zip(self.streams, streams, strict=True):
            held.index_copy_(2, slots, new)
        self.seq_length += num_new
        self.num_kept = min(self.num_kept + num_new, self.window)


def _last_tokens(states: torch.Tensor, num_slots: int) -> torch.Tensor:
    """The last tokens of `(batch, num_heads, seq_len, head_dim)`, after zeros if there are too few."""
    states = states[:, :, max(0, states.shape[2] - num_slots) :]
    return torch.nn.functional.pad(states, (0, 0, num_slots - states.shape[2], 0))


@CACHES.register("dynamic")
class DynamicKVCache(KVCache):
    """Grows with the text; owners whose readers all have a window keep only the window."""

    name = "dynamic"

    def make_layer(self, store: Store) -> KVLayer:
        """A growing store, or a ring of the window's tokens."""
        return FullLayer(store) if store.window is None else RingLayer(store)
