"""A cache of fixed size, written in place: what compiled decoding and CUDA graphs need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch

from lckv.cache.base import CACHES, KVCache
from lckv.cache.layers import KVLayer, check_crop, join
from lckv.errors import UserError, check_whole_number
from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.parts.sharing_cache import Streams
from lckv.sharing.layout import Store


class StaticLayer(KVLayer):
    """Streams in tensors `(batch, num_heads, num_slots, head_dim)` whose addresses never change.

    How many tokens they hold is a tensor too: a compiled step reads and advances it without going back to Python. The
    token at position *p* lies in slot *p*. All slots are returned, whatever they hold, as a compiled step needs equal
    shapes every time; the mask hides those that have no token yet.

    Args:
        store: what the owner keeps.
        num_slots: how many tokens fit.

    Attributes:
        num_seen: tokens seen so far, a scalar `int64` tensor beside the streams.
    """

    is_compileable = True
    scalars: ClassVar[dict[str, Any]] = {}  # the number of tokens is saved, but no attribute

    def __init__(self, store: Store, num_slots: int) -> None:
        super().__init__(store)
        self.window = None  # nothing is dropped before the slots are full
        self.num_slots = num_slots
        self.num_seen = torch.zeros((), dtype=torch.int64)

    def lazy_initialization(self, *streams: torch.Tensor) -> None:
        """Makes the tensors, once and for all, for streams `(batch, num_heads, q_len, head_dim)`."""
        self.dtype, self.device = streams[0].dtype, streams[0].device
        self._adopt(tuple(states.new_zeros(*states.shape[:2], self.num_slots, states.shape[3]) for states in streams))

    def get_seq_length(self) -> int:
        """Tokens seen so far; a tensor as soon as there are any, as transformers' static caches have it."""
        return self.num_seen.clone() if self.is_initialized else 0  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """The number of slots."""
        return self.num_slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All slots, from the first token on."""
        return self.num_slots, 0

    def key_positions(self, num_new_tokens: int) -> torch.Tensor | None:
        """Which tokens are returned, `(1, kv_len)`; `None` if they are consecutive."""
        return None

    def write(self, streams: Streams) -> Streams:
        """Writes the new tokens into their slots, and returns all slots, `(batch, num_heads, num_slots, head_dim)`."""
        self._make_ready(streams)
        num_new = streams[0].shape[2]
        positions = self._new_positions(num_new)
        self.num_seen.add_(num_new)
        return self._put(positions, streams)

    def peek(self, streams: Streams) -> Streams:
        """All slots, `(batch, num_heads, num_slots, head_dim)`, with the new tokens in theirs."""
        self._make_ready(streams)
        positions = self._new_positions(streams[0].shape[2])
        if streams[0].shape[2] == 1 and not torch.is_grad_enabled():
            # Nobody looks at this slot before `write` fills it, and nobody compares what passes over a single token
            # return, as there is only one: a copy of all slots for every decoded token can be saved.
            return self._put(positions, streams)
        return self._with_put(positions, streams)

    def check_rollback(self, tokens_to_remove: int) -> None:
        """Refuses to take back more tokens than there are."""
        check_crop(tokens_to_remove, int(self.num_seen))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens."""
        self.check_rollback(tokens_to_remove)
        self.num_seen.add_(tokens_to_remove)
        if tokens_to_remove and self.is_initialized:
            self._clear_unused()

    def num_bytes(self) -> int:
        """Bytes of the live tensors, the number of tokens included."""
        return super().num_bytes() + (self.num_seen.nbytes if self.is_initialized else 0)

    def planned_bytes(self, seq_length: int, batch_size: int, itemsize: int) -> int:
        """Those of all slots, used or not, and 8 for the number of tokens."""
        return super().planned_bytes(self.num_slots, batch_size, itemsize) + self.num_seen.nbytes

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The used slots, `(batch, num_heads, seq_len, head_dim)`, and the number of tokens."""
        num_used = min(int(self.num_seen), self.num_slots)
        used = {name: tensor[:, :, :num_used].contiguous() for name, tensor in self.tensors().items()}
        return used, {"seq_length": int(self.num_seen), **super().state()[1]}

    def load_state(self, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        """Takes on a saved state, streams of `(batch, num_heads, num_used, head_dim)`."""
        self._set_scalars({name: scalars[name] for name in self.scalars})
        if tensors:
            used = [tensors[name] for name in self.names]
            self.lazy_initialization(*used)
            for slots, states in zip(self.streams, used, strict=True):
                slots[:, :, : states.shape[2]] = states
        self.num_seen.fill_(scalars["seq_length"])

    def fork(self) -> Self:
        """A layer with the same content in tensors of its own."""
        forked = super().fork()
        forked.num_seen = self.num_seen.clone()
        if self.is_initialized:
            forked._adopt(forked.streams)
        return forked

    def reset(self) -> None:
        """Forgets everything; the tensors stay, and with them what has been compiled for their addresses."""
        self.record_past = False
        self._set_scalars(self.scalars)
        self.num_seen.zero_()
        for slots in self.streams:
            slots.zero_()

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Holds what `change` makes of each tensor `(batch, ...)`; in place if there are as many rows as before."""
        changed = tuple(map(change, self.streams))
        if any(new.shape != slots.shape for new, slots in zip(changed, self.streams, strict=True)):
            self._adopt(changed)
            return
        for slots, new in zip(self.streams, changed, strict=True):
            slots.copy_(new)

    def _put(self, slots: torch.Tensor, streams: Streams) -> Streams:
        """The tensors themselves, with the new tokens in the given slots, `(q_len,)`."""
        for held, new in zip(self.streams, streams, strict=True):
            held.index_copy_(2, slots, new)
        return self.streams

    def _with_put(self, slots: torch.Tensor, streams: Streams) -> Streams:
        """The same as copies, which leave the tensors alone."""
        return tuple(held.index_copy(2, slots, new) for held, new in zip(self.streams, streams, strict=True))

    def _make_ready(self, streams: Streams) -> None:
        """Makes tensors if there are none for a batch like this one."""
        num_rows = streams[0].shape[0]
        if self.is_initialized:
            num_held = self.streams[0].shape[0]
            if num_rows == num_held:
                return
            if int(self.num_seen) > 0:
                raise ValueError(f"{num_rows} sequences for a cache that holds {num_held}")
        self.lazy_initialization(*streams)

    def _adopt(self, streams: Streams) -> None:
        """Uses these tensors from now on, at addresses that a CUDA graph may rely on."""
        num_seen = self.num_seen.to(streams[0].device)
        if torch.compiler.is_compiling():
            self.streams, self.num_seen = streams, num_seen
            return
        self.streams, self.num_seen = tuple(map(_outside_inference_mode, streams)), _outside_inference_mode(num_seen)
        for tensor in (*self.streams, self.num_seen):
            torch._dynamo.mark_static_address(tensor)

    def _new_positions(self, num_new_tokens: int) -> torch.Tensor:
        return torch.arange(num_new_tokens, device=self.streams[0].device) + self.num_seen

    def _clear_unused(self) -> None:
        """Zeroes what has been taken back: masked slots still meet the attention weights, and 0 x NaN is NaN."""
        for slots in self.streams:
            slots[:, :, int(self.num_seen) :] = 0


def _outside_inference_mode(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if it was made in inference mode: that could never be written to outside."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


class StaticRingLayer(StaticLayer):
    """A fixed ring of `window` slots: the token at position *p* lies in slot `p % window`.

    Tokens are returned as they lie, and `key_positions` says which they are: nothing is moved, whatever the position,
    and attention does not mind the order of its keys. Of one new token all that is needed is in the ring. Several are
    returned behind the older tokens, since the first of them still see what the last of them overwrite.

    Attributes:
        high_water: the most tokens that had been seen at any rollback; what they overwrote is gone, however few
            tokens are left now.
    """

    is_croppable = False
    scalars = {"high_water": 0}
    window: int
    high_water: int

    def __init__(self, store: Store, window: int) -> None:
        super().__init__(store, window)
        self.window = window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The slots, and the new tokens if there are several."""
        return self.window + (query_length if query_length > 1 else 0), 0

    def key_positions(self, num_new_tokens: int) -> torch.Tensor:
        """Which tokens are returned, `(1, kv_len)`, negative for empty slots."""
        num_seen = self.num_seen.clone()
        if num_new_tokens == 1:
            return self._slot_positions(num_seen + 1)[None]
        new = torch.arange(num_new_tokens, device=num_seen.device) + num_seen
        return torch.cat([self._slot_positions(num_seen), new])[None]

    def write(self, streams: Streams) -> Streams:
        """Writes the last new tokens over the oldest; streams are `(batch, num_heads, q_len or kv_len, head_dim)`."""
        self._make_ready(streams)
        num_new = streams[0].shape[2]
        slots = (self._new_positions(num_new) % self.window)[-self.window :]
        seen = None if num_new == 1 else join(self.streams, streams)
        self.num_seen.add_(num_new)
        written = self._put(slots, tuple(new[:, :, -self.window :] for new in streams))
        return written if seen is None else seen

    def peek(self, streams: Streams) -> Streams:
        """What `write` would return, each `(batch, num_heads, kv_len, head_dim)`."""
        self._make_ready(streams)
        if streams[0].shape[2] > 1:
            return join(self.streams, streams)
        return self._with_put(self._new_positions(1) % self.window, streams)

    def check_rollback(self, tokens_to_remove: int) -> None:
        """Refuses to go back to where the window needs a dropped token."""
        num_seen = int(self.num_seen)
        num_left = num_seen - check_crop(tokens_to_remove, num_seen)
        num_dropped = max(self.high_water, num_seen) - self.window
        if tokens_to_remove and num_dropped > max(0, num_left - self.window + 1):
            raise RuntimeError(
                f"a window of {self.window} tokens has dropped what taking back {-tokens_to_remove} of {num_seen} "
                "tokens needs; a static cache cannot keep more, a dynamic one can"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, as far as older ones have not been overwritten."""
        self.check_rollback(tokens_to_remove)
        self.high_water = max(self.high_water, int(self.num_seen))
        super().crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Refuses: there is no room for tokens that leave the window.

        Raises:
            UserError: always.
        """
        raise UserError(
            "cache 'static' cannot take back tokens that a sliding window has dropped, as assisted decoding does: "
            "use cache 'dynamic'"
        )

    def _slot_positions(self, num_seen: torch.Tensor) -> torch.Tensor:
        """The last token before `num_seen` that belongs into each slot, `(window,)`; negative if there is none.

        The newest token, `last`, lies in slot `last % window`; going back from there, each slot's token is one older.
        """
        last = num_seen - 1
        return last - (last - torch.arange(self.window, device=num_seen.device)) % self.window

    def _clear_unused(self) -> None:
        """Zeroes the slots whose tokens have been taken back, or that never had one."""
        positions = self._slot_positions(self.num_seen)
        first_kept = max(0, self.high_water - self.window)
        is_unused = (positions < first_kept)[None, None, :, None]
        for slots in self.streams:
            slots.masked_fill_(is_unused, 0)


@CACHES.register("static")
class StaticKVCache(KVCache):
    """Room for `max_length` tokens, made at once; owners whose readers all have a window have room for the window.

    A decoding step does the same to the same addresses every time, so it can be compiled without graph breaks or
    recompilation, and captured as a CUDA graph.

    Args:
        config: the configuration of the model that will use the cache.
        max_length: how many tokens a sequence may have, prompt, generated tokens and padding together.

    Raises:
        UserError: for a length below 1.
    """

    name = "static"

    def __init__(self, config: Any, max_length: int) -> None:
        check_whole_number("cache.max_length", max_length)
        self.max_length = max_length
        super().__init__(config)

    def make_layer(self, store: Store) -> KVLayer:
        """A slot for every token, or a ring of the window's slots if these are fewer."""
        if store.window is None or store.window >= self.max_length:
            return StaticLayer(store, self.max_length)
        return StaticRingLayer(store, store.window)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The longest text, or the slots of one layer."""
        return self.max_length if layer_idx is None else self.layers[layer_idx].get_max_length()

    def get_key_positions(self, num_new_tokens: int, layer_idx: int) -> torch.Tensor | None:
        """Which tokens the keys belong to that lie in a ring, `(batch or 1, kv_len)`."""
        layer = self.owners()[layer_idx]
        assert isinstance(layer, StaticLayer)
        return layer.key_positions(num_new_tokens)

    def begin_forward(self, config: LCKVLlamaConfig, attention_mask: torch.Tensor | None, num_new_tokens: int) -> None:
        """Refuses tokens that do not fit; a compiled step cannot look, so its caller has to (`check_length`).

        `attention_mask` is `(batch, past + q_len)`, 4D, or `None`.
        """
        super().begin_forward(config, attention_mask, num_new_tokens)
        if not torch.compiler.is_compiling():
            self.check_length(int(self.get_seq_length(self.layout.stores[0].owner)) + num_new_tokens)

    def check_length(self, seq_length: int) -> None:
        """Refuses texts of more tokens than `max_length`."""
        if seq_length > self.max_length:
            raise UserError(
                f"{seq_length} tokens for cache.max_length={self.max_length}: allowed are as many or fewer"
            )
