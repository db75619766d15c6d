"""The default cache: full layers grow with the text, sliding ones are rings of the window's size."""

from __future__ import annotations

from typing import Any

import torch

from lckv.cache.base import CACHES, KVCache, KVLayer
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

    The token at position *p* lies in slot `p % window`, and is overwritten by the one `window` later. While dropped
    tokens are recorded, for a rollback, the tensors are in order and as long as it takes.
    """

    scalar_names = ("seq_length", "num_kept", "record_past")
    window: int

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.num_kept = 0  # how many of the last tokens are in the tensors

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
        is_full = self.keys.shape[2] == self.window
        self.seq_length += num_new
        self.num_kept += num_new
        if self.record_past:
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
        elif is_full and num_new < self.window:
            self._overwrite_oldest(key_states, value_states)
        else:
            self._lay_out(*states)
        return states

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens; 0 only ends the recording of dropped ones."""
        num_removed = check_crop(tokens_to_remove, self.seq_length)
        num_left = self.seq_length - num_removed
        if self.num_kept - num_removed < min(num_left, self.window - 1):
            raise RuntimeError(
                f"a window of {self.window} tokens has dropped what taking back {num_removed} of {self.seq_length} "
                "tokens needs; call activate_past_recording() before the tokens that may be taken back"
            )
        if self.is_initialized:
            keys, values = self._in_order()
            first, stop = keys.shape[2] - self.num_kept, keys.shape[2] - num_removed
            self.seq_length, self.num_kept, self.record_past = num_left, stop - first, False
            self._lay_out(keys[:, :, first:stop], values[:, :, first:stop])
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keeps tokens that leave the window until the next `crop`, so that it can bring them back."""
        if self.is_initialized and not self.record_past:
            self.keys, self.values = self._in_order()
        self.record_past = True

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.num_kept = 0

    def _in_order(self) -> KeyValue:
        """Everything in the tensors, oldest first; after a rollback the first `window - num_kept` are stale."""
        if self.record_past or self.keys.shape[2] < self.window:
            return self.keys, self.values
        oldest = self.seq_length % self.window
        return self.keys.roll(-oldest, dims=2), self.values.roll(-oldest, dims=2)

    def _lay_out(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fills the tensors anew with the last of these tokens, which are in order and end at `seq_length`."""
        self.num_kept = min(self.num_kept, self.window)
        num_slots = min(self.seq_length, self.window)
        num_stale = num_slots - self.num_kept
        self.keys, self.values = (
            torch.nn.functional.pad(states[:, :, states.shape[2] - self.num_kept :], (0, 0, num_stale, 0))
            for states in (keys, values)
        )
        if num_slots == self.window:
            oldest = self.seq_length % self.window
            self.keys, self.values = self.keys.roll(oldest, dims=2), self.values.roll(oldest, dims=2)
        self.keys, self.values = self.keys.contiguous(), self.values.contiguous()

    def _overwrite_oldest(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.num_kept = min(self.num_kept, self.window)
        positions = torch.arange(self.seq_length - key_states.shape[2], self.seq_length, device=self.device)
        self.keys.index_copy_(2, positions % self.window, key_states)
        self.values.index_copy_(2, positions % self.window, value_states)


def check_crop(tokens_to_remove: int, seq_length: int) -> int:
    """The number of tokens to take back, from transformers' negative number.

    Raises:
        ValueError: for a positive number, which once meant the length to keep, and for more tokens than there are.
    """
    if not -seq_length <= tokens_to_remove <= 0:
        raise ValueError(f"crop({tokens_to_remove}) of {seq_length} tokens: allowed are {-seq_length} to 0")
    return -tokens_to_remove


@CACHES.register("dynamic")
class DynamicKVCache(KVCache):
    """Grows with the text; owners whose readers all have a window keep only the window."""

    name = "dynamic"

    def make_layer(self, layer_idx: int, window: int | None) -> KVLayer:
        """A growing store, or a ring of `window` tokens."""
        return FullLayer() if window is None else RingLayer(window)
