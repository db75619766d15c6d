"""The default cache: full layers grow with the text, sliding ones are rings of the window's size."""

from __future__ import annotations

from typing import Any

import torch

from lckv.cache.base import CACHES, KVCache
from lckv.cache.layers import KVLayer, check_crop, writable
from lckv.models.iteration import KeyValue


class FullLayer(KVLayer):
    """Keeps every token, in tensors `(batch, num_kv_heads, seq_len, head_dim)` that are never longer than the text."""

    def __init__(self) -> None:
        super().__init__(window=None)

    def peek(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KeyValue:
        """The cached keys and values followed by the new ones."""
        if not self.is_initialized:
            return key_states, value_states
        return torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValue:
        """Appends, and returns everything."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self.peek(key_states, value_states)
        self.seq_length += key_states.shape[2]
        return self.keys, self.values

    def check_rollback(self, tokens_to_remove: int) -> None:
        """Refuses to take back more tokens than there are."""
        check_crop(tokens_to_remove, self.seq_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens."""
        num_removed = check_crop(tokens_to_remove, self.seq_length)
        if num_removed:
            self.seq_length -= num_removed
            self.keys, self.values = (
                self.keys[:, :, : self.seq_length].clone(),
                self.values[:, :, : self.seq_length].clone(),
            )


class RingLayer(KVLayer):
    """Keeps the last `window` tokens in tensors `(batch, num_kv_heads, min(seq_len, window), head_dim)`.

    Once they are full, the token at position *p* lies in slot `p % window`, and is overwritten by the one `window`
    later. Until then, and while dropped tokens are recorded for a rollback, the tensors are in order.
    """

    scalar_names = ("seq_length", "num_kept", "is_ring", "record_past")
    window: int

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.num_kept = 0  # how many of the last tokens are in the tensors; what lies before them is stale
        self.is_ring = False

    def peek(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KeyValue:
        """The last `window - 1` cached keys and values, oldest first, followed by the new ones."""
        if not self.is_initialized:
            return key_states, value_states
        num_past = min(self.seq_length, self.window - 1)
        keys, values = self._in_order()
        return (
            torch.cat([keys[:, :, keys.shape[2] - num_past :], key_states], dim=2),
            torch.cat([values[:, :, values.shape[2] - num_past :], value_states], dim=2),
        )

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValue:
        """Writes over the oldest tokens, and returns what the new tokens' queries see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_new = key_states.shape[2]
        states = self.peek(key_states, value_states)
        if self.record_past:
            self._record(key_states, value_states)
        elif self.is_ring and num_new < self.window:
            self._overwrite_oldest(key_states, value_states)
        else:
            self._lay_out(*states, self.seq_length + num_new, self.num_kept + num_new)
        return states

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, and drops recorded ones that have left the window."""
        self.check_rollback(tokens_to_remove)
        num_removed = -tokens_to_remove
        num_left = self.seq_length - num_removed
        if self.is_initialized and (num_removed or not self.is_ring):
            keys, values = self._in_order()
            stop = keys.shape[2] - num_removed
            self._lay_out(keys[:, :, :stop], values[:, :, :stop], num_left, self.num_kept - num_removed)

    def check_rollback(self, tokens_to_remove: int) -> None:
        """Refuses to go back to where the window needs a dropped token."""
        num_removed = check_crop(tokens_to_remove, self.seq_length)
        num_left = self.seq_length - num_removed
        if self.num_kept - num_removed < min(num_left, self.window - 1):
            raise RuntimeError(
                f"a window of {self.window} tokens has dropped what taking back {num_removed} of {self.seq_length} "
                "tokens needs; call activate_past_recording() before the tokens that may be taken back"
            )

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.num_kept, self.is_ring = 0, False

    def _in_order(self) -> KeyValue:
        """Everything in the tensors, oldest first."""
        if not self.is_ring:
            return self.keys, self.values
        oldest = self.seq_length % self.window
        return self.keys.roll(-oldest, dims=2), self.values.roll(-oldest, dims=2)

    def _record(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Appends, whatever the window."""
        keys, values = self._in_order()
        self.keys, self.values = torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)
        self.seq_length += key_states.shape[2]
        self.num_kept += key_states.shape[2]
        self.is_ring = False

    def _lay_out(self, keys: torch.Tensor, values: torch.Tensor, seq_length: int, num_kept: int) -> None:
        """Fills the tensors anew with the last of these tokens, which are in order and end at `seq_length`."""
        num_slots = min(seq_length, self.window)
        self.seq_length, self.num_kept, self.is_ring = seq_length, min(num_kept, num_slots), num_slots == self.window
        oldest = seq_length % self.window if self.is_ring else 0
        self.keys, self.values = (_last_tokens(states, num_slots).roll(oldest, dims=2) for states in (keys, values))

    def _overwrite_oldest(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        num_new = key_states.shape[2]
        positions = torch.arange(self.seq_length, self.seq_length + num_new, device=self.keys.device)
        self.keys, self.values = writable(self.keys), writable(self.values)
        self.keys.index_copy_(2, positions % self.window, key_states)
        self.values.index_copy_(2, positions % self.window, value_states)
        self.seq_length += num_new
        self.num_kept = min(self.num_kept + num_new, self.window)


def _last_tokens(states: torch.Tensor, num_slots: int) -> torch.Tensor:
    """The last tokens of `(batch, num_kv_heads, seq_len, head_dim)`, after zeros if there are too few."""
    states = states[:, :, max(0, states.shape[2] - num_slots) :]
    return torch.nn.functional.pad(states, (0, 0, num_slots - states.shape[2], 0))


@CACHES.register("dynamic")
class DynamicKVCache(KVCache):
    """Grows with the text; owners whose readers all have a window keep only the window."""

    name = "dynamic"

    def options(self) -> dict[str, Any]:
        """Whether it lives in the CPU's memory."""
        return {"offloading": self.offloading}

    def make_layer(self, layer_idx: int, window: int | None) -> KVLayer:
        """A growing store, or a ring of `window` tokens."""
        return FullLayer() if window is None else RingLayer(window)
