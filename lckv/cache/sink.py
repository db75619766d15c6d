"""A cache for endless text: the first tokens, the last ones, and nothing between (StreamingLLM).

Language models put much of their attention on the first tokens, whatever these say, and fall apart when a window
drops them. Kept as "attention sinks" in front of the window, they hold the model together for texts of any length
(Xiao et al., ICLR 2024). What counts as a token's position is its place in the cache, not in the text.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from lckv.cache.base import CACHES, KVCache
from lckv.cache.dynamic import RingLayer
from lckv.cache.layers import KVLayer, check_crop, join, roll_ring, writable
from lckv.errors import UserError, check_whole_number
from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.parts.planes import Planes, rotate_planes
from lckv.models.parts.rotary import PositionEmbeddings, apply_rotary, rotary_frequencies
from lckv.models.parts.sharing_cache import Streams
from lckv.sharing.layout import Store
from lckv.utils.padding import count_padding

GROWING_ROPE_TYPES = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the length of the text, so that no key can be moved."""


class KeyRotation:
    """Moves rotated streams to other positions. Layers of a kind share one, so that a step makes its tables once.

    No tensor outlives a step: the next one moves keys by another distance, and needs other tables.

    Args:
        config: the configuration of the model, which has the frequencies.
        label: of which rotary embedding; see [`LCKVLlamaConfig.rope_label`].
    """

    def __init__(self, config: Any, label: str | None = None) -> None:
        self.config, self.label = config, label
        self._last: tuple[Any, PositionEmbeddings] | None = None

    def __call__(self, key_states: torch.Tensor, shifts: list[int], planes: Planes = ()) -> torch.Tensor:
        """Moves keys `(batch, num_heads, num_tokens, head_dim)` on by `shifts` positions, one for each row or all.

        With `planes`, only what these rotate at its end. It is a pure rotation, computed in float32 or better: keys
        that are scaled as well (YaRN) stay so.
        """
        if not any(shifts):
            return key_states
        dtype = torch.promote_types(key_states.dtype, torch.float32)
        key = (shifts, dtype, key_states.device)
        last = self._last  # read once: another thread may write it
        if last is None or last[0] != key:
            self._last = last = key, self._make_tables(shifts, dtype, key_states.device)
        states = key_states.to(dtype)
        moved = rotate_planes(states, last[1], planes) if planes else apply_rotary(states, last[1])
        return moved.to(key_states.dtype)

    def forget_tables(self) -> None:
        """Frees the tables: the step is over."""
        self._last = None

    @cached_property
    def _frequencies(self) -> list[float]:
        return rotary_frequencies(self.config, self.label).tolist()  # head_dim / 2 numbers

    def _make_tables(self, shifts: list[int], dtype: torch.dtype, device: torch.device) -> PositionEmbeddings:
        """Cosines and sines `(batch or 1, 1, 1, head_dim)`; float64 keeps the angles exact for shifts of any size."""
        frequencies = torch.tensor(self._frequencies, dtype=torch.float64)
        angles = torch.tensor(shifts, dtype=torch.float64)[:, None, None, None] * frequencies
        angles = torch.cat([-angles, angles], dim=-1)  # as a model's tables are
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


class Movable(KVLayer):
    """A store whose rotated streams can be counted from a later token than the text's first.

    Attributes:
        num_sinks: how many of its first tokens stay as they are, whatever is counted.
        offset: the other tokens are rotated as if the text had begun that many tokens later.
    """

    num_sinks = 0
    offset: int

    def __init__(self, store: Store, rotation: KeyRotation) -> None:
        super().__init__(store)
        self.rotation = rotation

    def rotated(self, streams: Streams, shifts: list[int]) -> Streams:
        """These `(batch, num_heads, num_tokens, head_dim)`, the rotated ones moved on by `shifts` positions."""
        pairs = zip(self.store.streams, streams, strict=True)
        return tuple(
            self.rotation(states, shifts, stream.planes) if stream.is_rotated else states for stream, states in pairs
        )

    def rebase(self, offset: int) -> None:
        """Rotates the window, in place of the text's beginning, to count from token `offset`."""
        if self.is_initialized:
            sinks = tuple(states[:, :, : self.num_sinks] for states in self.streams)
            window = tuple(states[:, :, self.num_sinks :] for states in self.streams)
            self.streams = join(sinks, self.rotated(window, [self.offset - offset]))
        self.offset = offset

    def has_settled(self) -> bool:
        """Whether all of the window may be counted from a later token."""
        return not self.record_past


class SinkLayer(Movable):
    """Keeps the first `num_sinks` and the last `window` tokens of every row.

    The tensors `(batch, num_heads, min(seq_len, num_sinks + window), head_dim)` hold the sinks, then the window. Once
    they are full, the window is a ring: token *t* lies in slot `num_sinks + (t - num_sinks) % window`, where it
    overwrites the token that leaves. Until then, and while tokens are recorded for a rollback, they are in order, and
    as long as it takes.

    Sinks lie here as they came, rotated by their first positions, and are moved up to the window only in what is
    returned: moving the stored ones with every token would add up errors.

    A row with padding on the left has its sinks behind the padding. Until such a row has dropped a token of its own,
    the slots of its sinks hold those tokens that left the window last, so that it keeps all it has.

    Attributes:
        padding: for each row, how many tokens of padding come first; empty if there is none.
        is_ring: whether the window is laid out as a ring.
    """

    scalars = {"seq_length": 0, "offset": 0, "padding": [], "is_ring": False, "record_past": False}
    window: int
    padding: list[int]
    is_ring: bool

    def __init__(self, store: Store, num_sinks: int, window: int, rotation: KeyRotation) -> None:
        super().__init__(store, rotation)
        self.num_sinks, self.window, self.capacity = num_sinks, window, num_sinks + window

    def get_max_length(self) -> int:
        """The most tokens that the layer keeps."""
        return self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens `write` will return; which they are is said by `key_positions`."""
        num_past = min(self.seq_length, self.capacity - 1) if self.drops(query_length) else self.seq_length
        return num_past + query_length, self.seq_length - num_past

    def drops(self, num_new: int) -> bool:
        """Whether, with `num_new` more, more tokens will have come than the layer keeps."""
        return self.seq_length + num_new > self.capacity

    def key_positions(self, num_new_tokens: int) -> torch.Tensor | None:
        """Which tokens `write` will return, `(batch or 1, kv_len)`; `None` as long as it returns all."""
        if not self.drops(num_new_tokens):
            return None
        total = self.seq_length + num_new_tokens
        first = torch.tensor(self._first_sinks(total))[:, None]
        sinks = first + torch.arange(self.num_sinks)
        window = torch.arange(total - self.window, total).expand(len(first), -1)
        return torch.cat([sinks, window], dim=1)

    def peek(self, streams: Streams) -> Streams:
        """The cached tokens that the new ones see, sinks at their place in the cache, then the new ones.

        Each stream is `(batch, num_heads, kv_len, head_dim)`.
        """
        num_new = streams[0].shape[2]
        self._check_room(num_new)
        if not self.is_initialized:
            return streams
        total = self.seq_length + num_new
        sinks, *window = zip(*(self._visible_parts(states, total) for states in self.streams), strict=True)
        if self.drops(num_new):
            sinks = self.rotated(sinks, self._sink_shifts(total))
        return tuple(torch.cat(parts, dim=2) for parts in zip(sinks, *window, streams, strict=True))

    def write(self, streams: Streams) -> Streams:
        """Writes over what leaves, and returns what is seen, each `(batch, num_heads, kv_len, head_dim)`."""
        if not self.is_initialized:
            self.lazy_initialization(*streams)
        seen = self.peek(streams)
        num_new = streams[0].shape[2]
        if self.drops(num_new):
            self.streams = tuple(self._store(*pair) for pair in zip(self.streams, streams, strict=True))
            self.is_ring = not self.record_past
        else:
            self.streams = seen  # never written into: the step that drops a token makes new tensors
        self.seq_length += num_new
        return seen

    def check_rollback(self, tokens_to_remove: int) -> None:
        """Refuses to go back to where a dropped token would be in the window again."""
        num_removed = check_crop(tokens_to_remove, self.seq_length)
        start = self._start()
        if self.seq_length - num_removed < start and self._sink_shifts(start) != self._sink_shifts(self.capacity):
            raise RuntimeError(
                f"{self.num_sinks} sinks and a window of {self.window} tokens have dropped what taking back "
                f"{num_removed} of {self.seq_length} tokens needs; call activate_past_recording() before the tokens "
                "that may be taken back"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, and drops recorded ones that have left the window."""
        self.check_rollback(tokens_to_remove)
        if not self.is_initialized or (tokens_to_remove == 0 and self.is_ring):
            return
        num_left = self.seq_length + tokens_to_remove
        self.change_tensors(lambda states: self._cut_back(states, num_left))
        self.seq_length, self.is_ring = num_left, self.streams[0].shape[2] == self.capacity

    def has_settled(self) -> bool:
        """Whether the sinks of every row stay from now on."""
        return self.seq_length >= self.capacity + max(self.padding, default=0) and not self.record_past

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch, `(new_batch,)`, in this order."""
        super().batch_select_indices(indices)
        if self.padding:
            self.padding = torch.tensor(self.padding)[torch.as_tensor(indices).cpu()].tolist()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.padding = [padding for padding in self.padding for _ in range(repeats)]

    def _check_room(self, num_new: int) -> None:
        if num_new > 1 and self.drops(num_new):
            raise RuntimeError(
                f"{num_new} tokens at once after {self.seq_length}, in a cache of {self.capacity}: beyond its size "
                "every token sees other sinks, so they must come one at a time"
            )

    def _start(self) -> int:
        """How many tokens had come when the layer last dropped one (`capacity` if it never has): what came is here."""
        num_slots = self.streams[0].shape[2] if self.is_initialized else 0
        return self.capacity + self.seq_length - num_slots

    def _first_sinks(self, seq_length: int) -> list[int]:
        """The first token of each row's sinks, after `seq_length` tokens."""
        return [min(padding, max(0, seq_length - self.capacity)) for padding in self.padding or [0]]

    def _sink_shifts(self, seq_length: int) -> list[int]:
        """By how much each row's sinks have to move, after `seq_length` tokens, to lie right before the window."""
        return [max(0, seq_length - self.capacity - padding) - self.offset for padding in self.padding or [0]]

    def _visible_parts(self, states: torch.Tensor, total: int) -> list[torch.Tensor]:
        """The cached part of what token `total - 1` sees: the sinks as stored, then the window in order, in pieces."""
        if total <= self.capacity:
            return [states[:, :, : self.num_sinks], states[:, :, self.num_sinks :]]
        if self.is_ring and self._first_sinks(total) == self._first_sinks(self.seq_length):
            leaving = self._ring_slot()
            return [
                states[:, :, : self.num_sinks],
                states[:, :, leaving + 1 :],
                states[:, :, self.num_sinks : leaving],
            ]
        return self._pick(self._in_order(states), total, self.window - 1)

    def _pick(self, states: torch.Tensor, total: int, num_last: int) -> list[torch.Tensor]:
        """Of all that is here in order: the sinks after `total` tokens, and the last `num_last` tokens."""
        window = states[:, :, states.shape[2] - num_last :]
        moves = [
            new - old for new, old in zip(self._first_sinks(total), self._first_sinks(self._start()), strict=True)
        ]
        if not any(moves):
            return [states[:, :, : self.num_sinks], window]
        slots = torch.tensor(moves)[:, None] + torch.arange(self.num_sinks)  # (batch, num_sinks)
        slots = slots.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return [states.gather(2, slots), window]

    def _store(self, states: torch.Tensor, new_states: torch.Tensor) -> torch.Tensor:
        """The tensor with one more token, which drops another; `new_states` `(batch, num_heads, 1, head_dim)`."""
        total = self.seq_length + 1
        if self.record_past:
            return torch.cat([self._in_order(states), new_states], dim=2)
        if not self.is_ring:
            return self._as_ring(torch.cat([*self._visible_parts(states, total), new_states], dim=2), total)
        states, leaving = writable(states), self._ring_slot()
        if self._first_sinks(total) != self._first_sinks(self.seq_length):
            states[:, :, : self.num_sinks] = self._visible_parts(states, total)[0]
        states[:, :, leaving : leaving + 1] = new_states
        return states

    def _cut_back(self, states: torch.Tensor, num_left: int) -> torch.Tensor:
        """What the tensor was, or would have been, after `num_left` tokens."""
        states = self._in_order(states)
        states = states[:, :, : states.shape[2] - (self.seq_length - num_left)]
        num_slots = min(num_left, self.capacity)
        if num_left >= self._start():
            states = torch.cat(self._pick(states, num_left, self.window), dim=2)
        else:  # all that was dropped is padding, and zeros will do for it
            states = torch.nn.functional.pad(states, (0, 0, num_slots - states.shape[2], 0))
        return self._as_ring(states, num_left) if num_slots == self.capacity else states.clone()

    def _ring_slot(self) -> int:
        """Where the next token goes, and the one that leaves is."""
        return self.num_sinks + (self.seq_length - self.num_sinks) % self.window

    def _in_order(self, states: torch.Tensor) -> torch.Tensor:
        """The sinks, then the window, oldest first."""
        if not self.is_ring:
            return states
        return roll_ring(states, self.num_sinks - self._ring_slot(), self.num_sinks)

    def _as_ring(self, states: torch.Tensor, seq_length: int) -> torch.Tensor:
        """The same for a full tensor in order, the other way round."""
        return roll_ring(states, (seq_length - self.num_sinks) % self.window, self.num_sinks)


class MovableRingLayer(Movable, RingLayer):
    """A ring whose tokens can be counted from a later one, like a [`SinkLayer`]'s."""

    scalars = {**RingLayer.scalars, "offset": 0}


@CACHES.register("sink")
class SinkKVCache(KVCache):
    """Keeps the first `num_sinks` and the last `window` tokens, at positions 0, 1, 2, ... of the cache.

    Keys, and what else is rotated, come rotated by their position in the text. Attention depends on differences of
    positions alone, so the window can stay as it is, and the sinks are moved up to it whenever they are read, from the
    keys as they came: errors do not add up. Beyond its size every token sees the sinks at other places, so tokens then
    go through the model one at a time; what fits goes in at once.

    Owners whose readers all have a window keep only that, as in the default cache: they hold no sinks. A reader with
    a window that shares an owner with one without sees those of the kept tokens that are in its window.

    Positions stay bounded where the caller gives the model none: from time to time the window's keys are rotated
    back once, and counting goes on from the size of the cache. As the next time comes only when all of them are gone,
    a key is rotated back at most once. Positions that the caller does give count from the beginning of the text.

    Args:
        config: the configuration of the model that will use the cache.
        num_sinks: how many of the first tokens, behind padding on the left, to keep; 0 makes a plain window.
        window: how many of the last tokens to keep, the newest included.

    Raises:
        UserError: for values out of range, learned positions, and rotary embeddings that change with the length of the
            text.
    """

    name = "sink"
    renumbers = True

    def __init__(self, config: Any, num_sinks: int = 4, window: int = 1020) -> None:
        check_whole_number("cache.num_sinks", num_sinks, 0)
        check_whole_number("cache.window", window)
        self.num_sinks, self.window = num_sinks, window
        self.rotations: dict[str | None, KeyRotation] = {}
        super().__init__(config)
        _check_positions(config)
        self.span = max(num_sinks + window, *(layer.get_max_length() for layer in self._movable()))

    def make_layer(self, store: Store) -> KVLayer:
        """Sinks and window, or a ring of the tokens that the owner's readers see."""
        label = self.config.rope_label(store.owner)
        rotation = self.rotations.setdefault(label, KeyRotation(self.config, label))
        if store.window is not None:
            return MovableRingLayer(store, rotation)
        return SinkLayer(store, self.num_sinks, self.window, rotation)

    @property
    def offset(self) -> int:
        """The token from which positions count."""
        return self._movable()[0].offset

    def begin_forward(self, config: LCKVLlamaConfig, attention_mask: torch.Tensor | None, num_new_tokens: int) -> None:
        """Notes where each row's text begins, by an `attention_mask` `(batch, past + q_len)` with zeros at padding."""
        super().begin_forward(config, attention_mask, num_new_tokens)
        if attention_mask is None or attention_mask.ndim != 2:
            return
        padding = [] if attention_mask[:, 0].all() else count_padding(attention_mask)
        for layer in self._sink_layers():
            layer.padding = padding

    def begin_positions(self, are_given: bool) -> None:
        """Counts from the beginning of the text if the caller does; else from a later token, if it is time to."""
        offset = self.offset
        if are_given:
            offset = 0
        elif self.get_next_position() >= 2 * self.span and all(layer.has_settled() for layer in self._movable()):
            offset = self.get_seq_length() - self.span
        if offset != self.offset:
            for layer in self._movable():
                layer.rebase(offset)
            self._forget_tables()

    def write(self, streams: Streams, layer_idx: int) -> Streams:
        """Adds new tokens of an owner, and returns what queries see, each `(batch, num_heads, kv_len, head_dim)`."""
        seen = super().write(streams, layer_idx)
        if len({layer.seq_length for layer in self._movable()}) == 1:  # this was the last layer of the step
            self._forget_tables()
        return seen

    def get_next_position(self) -> int:
        """The rotary position of the next token, below twice the size of the cache plus the tokens of one call."""
        return self.get_seq_length() - self.offset

    def needs_single_tokens(self, num_new_tokens: int) -> bool:
        """Whether more than one token comes and not all fit."""
        return num_new_tokens > 1 and any(layer.drops(num_new_tokens) for layer in self._sink_layers())

    def get_key_positions(self, num_new_tokens: int, layer_idx: int) -> torch.Tensor | None:
        """Which tokens `write` is about to return, `(batch or 1, kv_len)`."""
        layer = self.owners().get(layer_idx) or self.storage(layer_idx)
        return layer.key_positions(num_new_tokens) if isinstance(layer, SinkLayer) else None

    def get_rotary_positions(self, num_new_tokens: int, layer_idx: int) -> torch.Tensor | None:
        """None: whatever was dropped, what is returned counts as consecutive tokens, the new ones last."""
        return None

    def _forget_tables(self) -> None:
        for rotation in self.rotations.values():
            rotation.forget_tables()

    def _sink_layers(self) -> list[SinkLayer]:
        return [layer for layer in self.layers if isinstance(layer, SinkLayer)]

    def _movable(self) -> list[Movable]:
        return [layer for layer in self.layers if isinstance(layer, Movable)]


def _check_positions(config: Any) -> None:
    """Refuses positions that cannot be moved: those in the tokens themselves, and growing rotary embeddings."""
    if config.learned_positions:
        raise UserError(
            "cache 'sink' for a model with learned_positions: what it keeps of a token says where in the text that "
            "was, so that no token can be moved; allowed are models whose keys are rotated"
        )
    for rope_type in (parameters["rope_type"] for parameters in config.rotations.values()):
        if rope_type in GROWING_ROPE_TYPES:
            raise UserError(
                f"cache 'sink' for a model with rope_type={rope_type!r}: allowed are types whose frequencies do not "
                "depend on the text's length, such as 'default', 'linear', 'llama3' and 'yarn'"
            )
