"""A cache of few bits per number (KIVI, Liu et al., ICML 2024; KVQuant, Hooper et al., NeurIPS 2024).

Recent tokens stay as they are: at least `residual_length` of them, and fewer than `residual_length + group_size`. When
there are more, the oldest `group_size` of them are encoded together, and what is encoded stays as it is: nothing is
rounded twice as the text grows. Reading decodes everything that is visible in one step, and keeps nothing of that.
The tokens of one call see each other unrounded, as KIVI's do; only later calls read them from the codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lckv.cache.base import CACHES, KVCache
from lckv.cache.layers import KVLayer, join
from lckv.cache.quantization import ALLOWED_BITS, GroupCodec, Quantized
from lckv.errors import UserError, check_choice, check_whole_number
from lckv.models.parts.sharing_cache import Streams
from lckv.sharing.layout import Store, Stream

AXES = ("channel", "token")
LAYOUTS = ("dynamic", "paged")


class EncodingLayer(KVLayer):
    """Keeps some tokens as they are, and others encoded.

    Attributes:
        streams: of the tokens that are kept as they are.
        codecs: for each stream.
        encoded: each stream's other tokens.
    """

    codecs: tuple[GroupCodec, ...]
    encoded: tuple[Quantized, ...] = ()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Streams such as `keys`, and their codes, `key_codes`, `key_scales` and `key_zeros`, each `(batch, ...)`."""
        tensors = super().tensors()
        for name, encoded in zip(self.names, self.encoded, strict=False):
            tensors.update(zip(_names_of_codes(name), encoded, strict=True))
        return tensors

    def take_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Holds these tensors `(batch, ...)` from now on, named as by `tensors`."""
        super().take_tensors(tensors)
        self.encoded = tuple(Quantized(*(tensors[part] for part in _names_of_codes(name))) for name in self.names)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.encoded = ()


def _names_of_codes(stream: str) -> list[str]:
    return [f"{stream.removesuffix('s')}_{part}" for part in Quantized._fields]


class QuantizedLayer(EncodingLayer):
    """Keeps encoded groups of tokens, and after them recent tokens as they are.

    Where a window is left, whole groups are dropped from the front: up to `group_size - 1` tokens more than the
    window stay. A window that is no longer than `residual_length` is never encoded, and no token more than it stays.

    Attributes:
        streams: of the recent tokens, each `(batch, num_heads, num_recent, head_dim)`.
        encoded: of those before them, `num_encoded` tokens, a multiple of the group's.

    Args:
        store: what the owner keeps.
        codecs: for each stream.
        group_size: tokens that are encoded together.
        residual_length: the fewest recent tokens that stay as they are.
    """

    scalars = {"seq_length": 0, "record_past": False}

    def __init__(self, store: Store, codecs: tuple[GroupCodec, ...], group_size: int, residual_length: int) -> None:
        super().__init__(store)
        self.codecs = codecs
        self.group_size, self.residual_length = group_size, residual_length
        self.encodes = self.window is None or self.window > residual_length

    def get_max_length(self) -> int:
        """The most tokens that the layer keeps; -1 if there is no limit."""
        if self.window is None:
            return -1
        return self.window + self.group_size - 1 if self.encodes else self.window

    def lazy_initialization(self, *streams: torch.Tensor) -> None:
        """Makes empty storage that fits the given streams, each `(batch, num_heads, q_len, head_dim)`."""
        super().lazy_initialization(*streams)
        self.encoded = self._encode(self.streams)

    def write(self, streams: Streams) -> Streams:
        """Appends, encodes what is old, and returns what is seen, each `(batch, num_heads, kv_len, head_dim)`."""
        if not self.is_initialized:
            self.lazy_initialization(*streams)
        seen = self.peek(streams)
        self.streams = join(self.streams, streams)
        self.seq_length += streams[0].shape[2]
        self._settle()
        return seen

    def peek(self, streams: Streams) -> Streams:
        """The past tokens, decoded, followed by the new ones, each `(batch, num_heads, kv_len, head_dim)`."""
        if not self.is_initialized:
            return streams
        num_hidden = self.count_kept() - self.get_mask_sizes(0)[0]  # kept as part of a group, but out of the window
        past = self._tokens_from(num_hidden)
        return tuple(torch.cat([*parts, new], dim=2) for parts, new in zip(past, streams, strict=True))

    def count_kept(self) -> int:
        """How many of the last tokens are here, encoded or not."""
        return self._num_encoded + self.streams[0].shape[2] if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, and drops recorded ones that have left the window.

        Of a group that is cut, the tokens that remain are decoded and count as recent from then on: rounded once, and
        once more when they are encoded again with the tokens that follow. Taking back no more tokens than
        `residual_length` never cuts a group.
        """
        self.check_rollback(tokens_to_remove)
        if not self.is_initialized:
            return
        num_kept = self.count_kept() + tokens_to_remove
        if num_kept < self._num_encoded:
            self._cut_encoded(num_kept)
        num_recent = num_kept - self._num_encoded
        if num_recent < self.streams[0].shape[2]:
            self.streams = tuple(states[:, :, :num_recent].clone() for states in self.streams)
        self.seq_length += tokens_to_remove
        self._drop(self._num_behind_window())

    def planned_bytes(self, seq_length: int, batch_size: int, itemsize: int) -> int:
        """What `num_bytes` will be: codes, scales, zero points and recent tokens."""
        first = self._first_kept(seq_length)
        last = first
        if self.encodes:
            last = max(first, (seq_length - self.residual_length) // self.group_size * self.group_size)
        recent = (seq_length - last) * self.store.size * itemsize
        pairs = zip(self.store.streams, self.codecs, strict=True)
        encoded = sum(stream.num_heads * codec.num_bytes(last - first, stream.head_dim) for stream, codec in pairs)
        return batch_size * (encoded + recent)

    @property
    def _num_encoded(self) -> int:
        return self.encoded[0].codes.shape[2] if self.is_initialized else 0

    def _encode(self, streams: Streams) -> tuple[Quantized, ...]:
        """Each stream's tokens, `(batch, num_heads, num_tokens, head_dim)`, encoded by its codec."""
        return tuple(codec.encode(states) for codec, states in zip(self.codecs, streams, strict=True))

    def _cut(self, start: int, stop: int | None = None) -> tuple[Quantized, ...]:
        """The encoded tokens from `start` to `stop`, both at the edges of groups, as views."""
        pairs = zip(self.codecs, self.encoded, strict=True)
        return tuple(codec.cut(encoded, start, stop) for codec, encoded in pairs)

    def _tokens_from(self, start: int) -> list[list[torch.Tensor]]:
        """The kept tokens but for the first `start`, decoded: for each stream, parts to be joined."""
        num_encoded = self._num_encoded
        recent = [states[:, :, max(0, start - num_encoded) :] for states in self.streams]
        if start >= num_encoded:
            return [[states] for states in recent]
        edge = start // self.group_size * self.group_size  # codes can be cut there; the rest is cut once decoded
        return [
            [codec.decode(encoded, states.dtype)[:, :, start - edge :], states]
            for codec, encoded, states in zip(self.codecs, self._cut(edge), recent, strict=True)
        ]

    def _settle(self) -> None:
        """Drops what has left the window, then encodes what is no longer recent."""
        if not self.record_past:
            self._drop(self._num_behind_window())
        num_old = self.streams[0].shape[2] - self.residual_length
        num_old -= num_old % self.group_size
        if not self.encodes or num_old <= 0:
            return
        new = self._encode(tuple(states[:, :, :num_old] for states in self.streams))
        self.encoded = tuple(Quantized(*join(*pair)) for pair in zip(self.encoded, new, strict=True))
        self.streams = tuple(states[:, :, num_old:].clone() for states in self.streams)

    def _first_kept(self, seq_length: int) -> int:
        """The first token that stays when there are `seq_length`; at the edge of a group if there are groups."""
        if self.window is None:
            return 0
        first = max(0, seq_length - self.window)
        return first // self.group_size * self.group_size if self.encodes else first

    def _num_behind_window(self) -> int:
        """How many of the kept tokens may be dropped."""
        return max(0, self._first_kept(self.seq_length) - (self.seq_length - self.count_kept()))

    def _drop(self, num_tokens: int) -> None:
        """Drops the first of the kept tokens."""
        if num_tokens == 0:
            return
        from_codes = min(num_tokens, self._num_encoded)
        self.encoded = tuple(map(_copy, self._cut(from_codes)))
        if num_tokens > from_codes:
            self.streams = tuple(states[:, :, num_tokens - from_codes :].clone() for states in self.streams)

    def _cut_encoded(self, num_kept: int) -> None:
        """Shortens the codes to the whole groups of the first `num_kept` tokens; the rest of these is recent again."""
        edge = num_kept // self.group_size * self.group_size
        self.streams = tuple(torch.cat(parts, dim=2) for parts in self._tokens_from(edge))
        self.encoded = tuple(map(_copy, self._cut(0, edge)))


def _copy(encoded: Quantized) -> Quantized:
    """The tensors without what else their memory held."""
    return Quantized(*(tensor.clone() for tensor in encoded))


@dataclass(frozen=True)
class QuantizedOptions:
    """The options of [`QuantizedKVCache`], checked.

    Raises:
        UserError: for an option out of range.
    """

    bits: int = 8
    group_size: int = 64
    residual_length: int = 32
    key_axis: str = "channel"
    value_axis: str = "token"
    layout: str = "dynamic"

    def __post_init__(self) -> None:
        if self.bits not in ALLOWED_BITS:
            raise UserError(f"cache.bits={self.bits!r}: allowed are 2, 4 and 8")
        check_whole_number("cache.group_size", self.group_size)
        check_whole_number("cache.residual_length", self.residual_length, 0)
        check_choice("cache.key_axis", self.key_axis, AXES)
        check_choice("cache.value_axis", self.value_axis, AXES)
        check_choice("cache.layout", self.layout, LAYOUTS)

    def codecs(self, streams: Sequence[Stream]) -> tuple[GroupCodec, ...]:
        """For each stream: along `key_axis` for keys and what is rotated, else along `value_axis`.

        Raises:
            UserError: if the numbers of a head do not fill whole bytes.
        """
        for stream in streams:
            if stream.head_dim * self.bits % 8:
                raise UserError(
                    f"cache.bits={self.bits} with head_dim={stream.head_dim}: allowed are heads whose size is "
                    f"divisible by {8 // self.bits}, so that they fill whole bytes"
                )
        return tuple(
            GroupCodec.along(
                self.key_axis if stream.is_rotated or stream.name == "keys" else self.value_axis,
                self.bits,
                self.group_size,
                stream.head_dim,
            )
            for stream in streams
        )


@CACHES.register("quantized")
class QuantizedKVCache(KVCache):
    """Keeps old tokens in 8, 4 or 2 bits per number, and recent ones as they are.

    Args:
        config: the configuration of the model.
        bits: per number: 2, 4 or 8.
        group_size: tokens that are encoded together, and how many numbers share a scale at most.
        residual_length: the fewest recent tokens that stay as they are.
        key_axis: for keys and other rotated streams, `"channel"` for a scale per channel and `group_size` tokens, or
            `"token"` for one per token and up to `group_size` channels.
        value_axis: the same for values and other streams.
        layout: `"dynamic"` for tensors that grow, and rings where only windows are read; `"paged"` for pages of
            `group_size` tokens, for which `build_cache` makes a `QuantizedPagedKVCache`.
        num_pages: for `"paged"`: pages in each layer's pool; `None` for as many as are needed.

    Raises:
        UserError: for an option out of range, and heads whose numbers do not fill whole bytes.
    """

    name = "quantized"

    def __init__(
        self,
        config: Any,
        bits: int = 8,
        group_size: int = 64,
        residual_length: int = 32,
        key_axis: str = "channel",
        value_axis: str = "token",
        layout: str = "dynamic",
        num_pages: int | None = None,
    ) -> None:
        self.quantization = QuantizedOptions(bits, group_size, residual_length, key_axis, value_axis, layout)
        if layout != "dynamic":
            raise UserError(f"cache.layout={layout!r}: such a cache is a QuantizedPagedKVCache; use build_cache")
        if num_pages is not None:
            raise UserError(f"cache.num_pages={num_pages!r} with cache.layout='dynamic': allowed is 'paged'")
        super().__init__(config)

    @classmethod
    def class_for(cls, options: dict[str, Any]) -> type[KVCache]:
        """This class, or that of caches in pages."""
        if options.get("layout") != "paged":
            return cls
        from lckv.cache.paged import QuantizedPagedKVCache

        return QuantizedPagedKVCache

    def make_layer(self, store: Store) -> KVLayer:
        """Makes the empty store of one owner."""
        options = self.quantization
        return QuantizedLayer(store, options.codecs(store.streams), options.group_size, options.residual_length)

    def options(self) -> dict[str, Any]:
        """The arguments, beside `config`, that make an empty cache like this one."""
        return asdict(self.quantization)
