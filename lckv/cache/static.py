"""A cache of fixed size, written in place: what compiled decoding and CUDA graphs need."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch

from lckv.cache.base import CACHES, KVCache
from lckv.cache.layers import KVLayer, check_crop
from lckv.errors import UserError, check_whole_number
from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.iteration import KeyValue


class StaticLayer(KVLayer):
    """Keys and values in tensors `(batch, num_kv_heads, num_slots, head_dim)` whose addresses never change.

    How many tokens they hold is a tensor too: a compiled step reads and advances it without going back to Python. The
    token at position *p* lies in slot *p*.

    Attributes:
        num_slots: how many tokens fit.
        num_seen: tokens seen so far, a scalar `int64` tensor beside the keys.
    """

    is_compileable = True
    scalar_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_slots: int, window: int | None = None) -> None:
        super().__init__(window)
        self.num_slots = num_slots
        self.num_seen = torch.zeros((), dtype=torch.int64)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the tensors, once and for all."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._adopt(self._slots_for(key_states), self._slots_for(value_states), self.num_seen)

    def get_seq_length(self) -> int:
        """Tokens seen so far; a tensor as soon as there are any, as transformers' static caches have it."""
        return self.num_seen.clone() if self.is_initialized else 0  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """The number of slots."""
        return self.num_slots

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All slots, from the first token on."""
        return self.num_slots, 0

    def key_positions(self, num_new_tokens: int) -> torch.Tensor | None:
        """Which tokens the returned keys belong to, `(1, kv_len)`; `None` if they are consecutive."""
        return None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValue:
        """Writes the new tokens into their slots, and returns all slots."""
        key_states, value_states = self._make_ready(key_states, value_states)
        positions = self._new_positions(key_states.shape[2])
        self.num_seen.add_(key_states.shape[2])
        self.keys.index_copy_(2, positions, key_states)
        self.values.index_copy_(2, positions, value_states)
        return self.keys, self.values

    def peek(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KeyValue:
        """All slots, with the new tokens in theirs."""
        key_states, value_states = self._make_ready(key_states, value_states)
        positions = self._new_positions(key_states.shape[2])
        if key_states.shape[2] == 1 and not torch.is_grad_enabled():
            # Nobody looks at this slot before `update` fills it, and nobody compares what passes over a single token
            # return, as there is only one: a copy of all slots for every decoded token can be saved.
            self.keys.index_copy_(2, positions, key_states)
            self.values.index_copy_(2, positions, value_states)
            return self.keys, self.values
        return self.keys.index_copy(2, positions, key_states), self.values.index_copy(2, positions, value_states)

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

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The used slots, and the number of tokens."""
        num_used = min(int(self.num_seen), self.num_slots)
        used = {name: tensor[:, :, :num_used].contiguous() for name, tensor in self.tensors().items()}
        return used, {"seq_length": int(self.num_seen)}

    def load_state(self, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        """Takes on a saved state."""
        if tensors:
            self.lazy_initialization(tensors["keys"], tensors["values"])
            for name, tensor in tensors.items():
                getattr(self, name)[:, :, : tensor.shape[2]] = tensor
        self.num_seen.fill_(scalars["seq_length"])

    def fork(self) -> Self:
        """A layer with the same content in tensors of its own."""
        forked = super().fork()
        forked.num_seen = self.num_seen.clone()
        if self.is_initialized:
            forked._adopt(forked.keys, forked.values, forked.num_seen)
        return forked

    def reset(self) -> None:
        """Forgets everything; the tensors stay, and with them what has been compiled for their addresses."""
        self.record_past = False
        self.num_seen.zero_()
        for tensor in self.tensors().values():
            tensor.zero_()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows, in this order; in place if there are as many as before."""
        rows = {name: tensor[indices] for name, tensor in self.tensors().items()}
        self._replace_rows(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        self._replace_rows({name: tensor.repeat_interleave(repeats, 0) for name, tensor in self.tensors().items()})

    def _replace_rows(self, rows: dict[str, torch.Tensor]) -> None:
        if not rows:
            return
        if rows["keys"].shape == self.keys.shape:
            self.keys.copy_(rows["keys"])
            self.values.copy_(rows["values"])
        else:
            self._adopt(rows["keys"], rows["values"], self.num_seen)

    def _make_ready(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KeyValue:
        """Makes the tensors, anew if the batch has another size than before a `reset`.

        Returns:
            The states in the tensors' types, which autocast may not give them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.shape[0] != key_states.shape[0]:
            if int(self.num_seen) > 0:
                raise ValueError(f"{key_states.shape[0]} sequences for a cache that holds {self.keys.shape[0]}")
            self.lazy_initialization(key_states, value_states)
        return key_states.to(self.keys.dtype), value_states.to(self.values.dtype)

    def _slots_for(self, states: torch.Tensor) -> torch.Tensor:
        """Empty slots for states `(batch, num_kv_heads, q_len, head_dim)`."""
        batch_size, num_heads, _, head_dim = states.shape
        return states.new_zeros(batch_size, num_heads, self.num_slots, head_dim)

    def _adopt(self, keys: torch.Tensor, values: torch.Tensor, num_seen: torch.Tensor) -> None:
        """Uses these tensors from now on, at addresses that a CUDA graph may rely on."""
        num_seen, self.is_initialized = num_seen.to(keys.device), True
        if torch.compiler.is_compiling():
            self.keys, self.values, self.num_seen = keys, values, num_seen
            return
        self.keys, self.values, self.num_seen = (_outside_inference_mode(each) for each in (keys, values, num_seen))
        for tensor in (self.keys, self.values, self.num_seen):
            torch._dynamo.mark_static_address(tensor)

    def _new_positions(self, num_new_tokens: int) -> torch.Tensor:
        return torch.arange(num_new_tokens, device=self.keys.device) + self.num_seen

    def _clear_unused(self) -> None:
        """Zeroes what has been taken back: masked slots still meet the attention weights, and 0 x NaN is NaN."""
        self.keys[:, :, int(self.num_seen) :] = 0
        self.values[:, :, int(self.num_seen) :] = 0


def _outside_inference_mode(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if it was made in inference mode: that could never be written to outside."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


class StaticRingLayer(StaticLayer):
    """A fixed ring of `window` slots: the token at position *p* lies in slot `p % window`.

    Keys are returned as they lie, and `key_positions` says which tokens they belong to: nothing is moved, whatever
    the position. Of one new token all that is needed is in the ring; several are returned behind the older tokens.
    """

    window: int

    def __init__(self, window: int) -> None:
        super().__init__(window, window)
        self.is_croppable = False
        self.high_water = 0  # the most tokens that had been seen at any rollback; what they overwrote is gone

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The slots, and the new tokens if there are several."""
        return self.window + (query_length if query_length > 1 else 0), 0

    def key_positions(self, num_new_tokens: int) -> torch.Tensor:
        """Which tokens the returned keys belong to, `(1, kv_len)`, negative for empty slots."""
        num_seen = self.num_seen.clone()
        if num_new_tokens == 1:
            return self._slot_positions(num_seen + 1)[None]
        new = torch.arange(num_new_tokens, device=num_seen.device) + num_seen
        return torch.cat([self._slot_positions(num_seen), new])[None]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValue:
        """Writes the last new tokens over the oldest."""
        key_states, value_states = self._make_ready(key_states, value_states)
        num_new = key_states.shape[2]
        slots = (self._new_positions(num_new) % self.window)[-self.window :]
        states = None if num_new == 1 else self._with_new(key_states, value_states)
        self.num_seen.add_(num_new)
        self.keys.index_copy_(2, slots, key_states[:, :, -self.window :])
        self.values.index_copy_(2, slots, value_states[:, :, -self.window :])
        return (self.keys, self.values) if states is None else states

    def peek(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KeyValue:
        """What `update` would return."""
        key_states, value_states = self._make_ready(key_states, value_states)
        if key_states.shape[2] > 1:
            return self._with_new(key_states, value_states)
        slot = self._new_positions(1) % self.window
        return self.keys.index_copy(2, slot, key_states), self.values.index_copy(2, slot, value_states)

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

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The used slots, and the numbers."""
        tensors, scalars = super().state()
        return tensors, scalars | {"high_water": self.high_water}

    def load_state(self, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        """Takes on a saved state."""
        super().load_state(tensors, scalars)
        self.high_water = scalars["high_water"]

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.high_water = 0

    def _slot_positions(self, num_seen: torch.Tensor) -> torch.Tensor:
        """The last token before `num_seen` that belongs into each slot, `(window,)`; negative if there is none."""
        last = num_seen - 1
        return last - (last - torch.arange(self.window, device=num_seen.device)) % self.window

    def _with_new(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KeyValue:
        return torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)

    def _clear_unused(self) -> None:
        """Zeroes the slots whose tokens have been taken back, or that never had one."""
        positions = self._slot_positions(self.num_seen)
        first_kept = max(0, self.high_water - self.window)
        is_unused = (positions < first_kept)[None, None, :, None]
        self.keys.masked_fill_(is_unused, 0)
        self.values.masked_fill_(is_unused, 0)


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

    def make_layer(self, layer_idx: int, window: int | None) -> KVLayer:
        """A slot for every token, or a ring of `window` slots if that is less."""
        if window is None or window >= self.max_length:
            return StaticLayer(self.max_length)
        return StaticRingLayer(window)

    def options(self) -> dict[str, Any]:
        """The length."""
        return {"max_length": self.max_length}

    def planned_bytes(self, seq_length: int, batch_size: int, dtype: torch.dtype) -> int:
        """The plan's figure for the whole length, and 8 bytes per owner for the number of its tokens."""
        if seq_length == 0:
            return 0
        counters = torch.int64.itemsize * len(self.plan.kv_owners)
        return super().planned_bytes(self.max_length, batch_size, dtype) + counters

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The longest text, or the slots of one layer."""
        return self.max_length if layer_idx is None else self.layers[layer_idx].get_max_length()

    def get_key_positions(self, num_new_tokens: int, layer_idx: int) -> torch.Tensor | None:
        """Which tokens the keys belong to that lie in a ring."""
        layer = self.owners()[layer_idx]
        assert isinstance(layer, StaticLayer)
        return layer.key_positions(num_new_tokens)

    def begin_forward(self, config: LCKVLlamaConfig, attention_mask: torch.Tensor | None, num_new_tokens: int) -> None:
        """Refuses tokens that do not fit; a compiled step cannot look, so its caller has to (`check_length`)."""
        super().begin_forward(config, attention_mask, num_new_tokens)
        if not torch.compiler.is_compiling():
            self.check_length(int(self.get_seq_length(self.plan.kv_owners[0])) + num_new_tokens)

    def check_length(self, seq_length: int) -> None:
        """Refuses texts of more tokens than `max_length`."""
        if seq_length > self.max_length:
            raise UserError(
                f"{seq_length} tokens for cache.max_length={self.max_length}: allowed are as many or fewer"
            )
