"""A cache of few bits per number (KIVI, Liu et al., ICML 2024; KVQuant, Hooper et al., NeurIPS 2024).

Recent tokens stay as they are: at least `residual_length` of them, and fewer than `residual_length + group_size`. When
there are more, the oldest `group_size` of them are encoded together, and what is encoded stays as it is: nothing is
rounded twice as the text grows. Reading decodes everything that is visible in one step, and keeps nothing of that.
The tokens of one call see each other unrounded, as KIVI's do; only later calls read them from the codes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from lckv.cache.base import CACHES, KVCache
from lckv.cache.layers import KVLayer, check_crop
from lckv.cache.quantization import ALLOWED_BITS, GroupCodec, Quantized
from lckv.errors import UserError, check_choice, check_whole_number
from lckv.models.iteration import KeyValue

AXES = ("channel", "token")
LAYOUTS = ("dynamic", "paged")


class QuantizedLayer(KVLayer):
    """Keeps encoded groups of tokens, and after them recent tokens as they are.

    Where a window is left, whole groups are dropped from the front: up to `group_size - 1` tokens more than the
    window stay. A window that is no longer than `residual_length` is never encoded, and no token more than it stays.

    Attributes:
        keys: of the recent tokens, `(batch, num_kv_heads, num_recent, head_dim)`.
        values: as `keys`.

    Args:
        window: how many of the last tokens the layer has to keep; `None` for all.
        codecs: for keys and values.
        group_size: tokens that are encoded together.
        residual_length: the fewest recent tokens that stay as they are.
    """

    tensor_names = (
        *("keys", "key_codes", "key_scales", "key_zeros"),
        *("values", "value_codes", "value_scales", "value_zeros"),
    )
    scalar_names = ("seq_length", "record_past")

    def __init__(
        self, window: int | None, codecs: tuple[GroupCodec, GroupCodec], group_size: int, residual_length: int
    ) -> None:
        super().__init__(window)
        self.codecs = codecs
        self.group_size, self.residual_length = group_size, residual_length
        self.encodes = window is None or window > residual_length

    def get_max_length(self) -> int:
        """The most tokens that the layer keeps; -1 if there is no limit."""
        if self.window is None:
            return -1
        return self.window + self.group_size - 1 if self.encodes else self.window

    get_max_cache_shape = get_max_length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes empty storage that fits the given states."""
        super().lazy_initialization(key_states, value_states)
        nothing = (self.keys, self.values)
        self._set_encoded(*(codec.encode(states) for codec, states in zip(self.codecs, nothing, strict=True)))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValue:
        """Appends, encodes what is no longer recent, and returns what the new tokens' queries see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states = self.peek(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.seq_length += key_states.shape[2]
        self._settle()
        return states

    def peek(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KeyValue:
        """The past keys and values that the new tokens' queries see, decoded, followed by the new ones."""
        if not self.is_initialized:
            return key_states, value_states
        num_hidden = self._num_kept - self.get_mask_sizes(0)[0]
        past = self._tokens_from(num_hidden)
        return torch.cat([*past[0], key_states], dim=2), torch.cat([*past[1], value_states], dim=2)

    def check_rollback(self, tokens_to_remove: int) -> None:
        """Refuses to go back to where the window needs a dropped token."""
        num_removed = check_crop(tokens_to_remove, self.seq_length)
        num_left = self.seq_length - num_removed
        num_needed = num_left if self.window is None else min(num_left, self.window - 1)
        if self._num_kept - num_removed < num_needed:
            raise RuntimeError(
                f"a window of {self.window} tokens has dropped what taking back {num_removed} of {self.seq_length} "
                "tokens needs; call activate_past_recording() before the tokens that may be taken back"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, and drops recorded ones that have left the window.

        Of a group that is cut, the tokens that remain are decoded and count as recent from then on: rounded once, and
        once more when they are encoded again with the tokens that follow. Taking back no more tokens than
        `residual_length` never cuts a group.
        """
        self.check_rollback(tokens_to_remove)
        if not self.is_initialized:
            return
        num_kept = self._num_kept + tokens_to_remove
        if num_kept < self._num_encoded:
            self._cut_encoded(num_kept)
        num_recent = num_kept - self._num_encoded
        if num_recent < self.keys.shape[2]:
            self.keys, self.values = (states[:, :, :num_recent].clone() for states in (self.keys, self.values))
        self.seq_length += tokens_to_remove
        self._drop(self._num_behind_window())

    def load_state(self, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        """Takes on a saved state."""
        super().load_state(tensors, scalars)
        if tensors:
            self.dtype = self.keys.dtype

    def planned_bytes(self, seq_length: int, head_dim: int, itemsize: int) -> int:
        """Bytes of one row and head after `seq_length` tokens: codes, scales, zero points and recent tokens."""
        first = self._first_kept(seq_length)
        last = first
        if self.encodes:
            last = max(first, (seq_length - self.residual_length) // self.group_size * self.group_size)
        encoded = sum(codec.num_bytes(last - first, head_dim) for codec in self.codecs)
        return encoded + 2 * (seq_length - last) * head_dim * itemsize

    @property
    def _num_encoded(self) -> int:
        return self.key_codes.shape[2] if self.is_initialized else 0

    @property
    def _num_kept(self) -> int:
        return self._num_encoded + self.keys.shape[2] if self.is_initialized else 0

    def _encoded(self) -> tuple[Quantized, Quantized]:
        return (
            Quantized(self.key_codes, self.key_scales, self.key_zeros),
            Quantized(self.value_codes, self.value_scales, self.value_zeros),
        )

    def _set_encoded(self, keys: Quantized, values: Quantized) -> None:
        self.key_codes, self.key_scales, self.key_zeros = keys
        self.value_codes, self.value_scales, self.value_zeros = values

    def _tokens_from(self, start: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The kept tokens but for the first `start`, decoded: keys and values, each in parts to be joined."""
        num_encoded = self._num_encoded
        recent = [states[:, :, max(0, start - num_encoded) :] for states in (self.keys, self.values)]
        if start >= num_encoded:
            return [recent[0]], [recent[1]]
        edge = start // self.group_size * self.group_size
        decoded = [
            codec.decode(codec.cut(encoded, edge), states.dtype)[:, :, start - edge :]
            for codec, encoded, states in zip(self.codecs, self._encoded(), recent, strict=True)
        ]
        return [decoded[0], recent[0]], [decoded[1], recent[1]]

    def _settle(self) -> None:
        """Drops what has left the window, then encodes what is no longer recent."""
        if not self.record_past:
            self._drop(self._num_behind_window())
        num_old = self.keys.shape[2] - self.residual_length
        num_old -= num_old % self.group_size
        if not self.encodes or num_old <= 0:
            return
        grown = []
        for codec, encoded, states in zip(self.codecs, self._encoded(), (self.keys, self.values), strict=True):
            new = codec.encode(states[:, :, :num_old])
            grown.append(Quantized(*(torch.cat(pair, dim=2) for pair in zip(encoded, new, strict=True))))
        self._set_encoded(*grown)
        self.keys, self.values = (states[:, :, num_old:].clone() for states in (self.keys, self.values))

    def _first_kept(self, seq_length: int) -> int:
        """The first token that stays when there are `seq_length`; at the edge of a group if there are groups."""
        if self.window is None:
            return 0
        first = max(0, seq_length - self.window)
        return first // self.group_size * self.group_size if self.encodes else first

    def _num_behind_window(self) -> int:
        """How many of the kept tokens may be dropped."""
        return max(0, self._first_kept(self.seq_length) - (self.seq_length - self._num_kept))

    def _drop(self, num_tokens: int) -> None:
        """Drops the first of the kept tokens."""
        if num_tokens == 0:
            return
        from_codes = min(num_tokens, self._num_encoded)
        pairs = zip(self.codecs, self._encoded(), strict=True)
        self._set_encoded(*(_copy(codec.cut(encoded, from_codes)) for codec, encoded in pairs))
        if num_tokens > from_codes:
            recent = (states[:, :, num_tokens - from_codes :] for states in (self.keys, self.values))
            self.keys, self.values = (states.clone() for states in recent)

    def _cut_encoded(self, num_kept: int) -> None:
        """Shortens the codes to the whole groups of the first `num_kept` tokens; the rest of these is recent again."""
        edge = num_kept // self.group_size * self.group_size
        keys, values = self._tokens_from(edge)
        self.keys, self.values = (torch.cat(parts, dim=2) for parts in (keys, values))
        pairs = zip(self.codecs, self._encoded(), strict=True)
        self._set_encoded(*(_copy(codec.cut(encoded, 0, edge)) for codec, encoded in pairs))


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

    def codecs(self, head_dim: int) -> tuple[GroupCodec, GroupCodec]:
        """For keys and for values.

        Raises:
            UserError: if the numbers of a head do not fill whole bytes.
        """
        if head_dim * self.bits % 8:
            raise UserError(
                f"cache.bits={self.bits} with head_dim={head_dim}: allowed are heads whose size is divisible by "
                f"{8 // self.bits}, so that they fill whole bytes"
            )
        return (
            GroupCodec.along(self.key_axis, self.bits, self.group_size, head_dim),
            GroupCodec.along(self.value_axis, self.bits, self.group_size, head_dim),
        )

    def as_dict(self) -> dict[str, Any]:
        """The options by name."""
        return asdict(self)


@CACHES.register("quantized")
class QuantizedKVCache(KVCache):
    """Keeps old tokens in 8, 4 or 2 bits per number, and recent ones as they are.

    Args:
        config: the configuration of the model.
        bits: per number: 2, 4 or 8.
        group_size: tokens that are encoded together, and how many numbers share a scale at most.
        residual_length: the fewest recent tokens that stay as they are.
        key_axis: `"channel"` for a scale per channel and `group_size` tokens, or `"token"` for one per token and up
            to `group_size` channels.
        value_axis: the same for values.
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

    def make_layer(self, layer_idx: int, window: int | None) -> KVLayer:
        """Makes the empty store of one owner."""
        options = self.quantization
        codecs = options.codecs(self.config.head_dim)
        return QuantizedLayer(window, codecs, options.group_size, options.residual_length)

    def options(self) -> dict[str, Any]:
        """The arguments, beside `config`, that make an empty cache like this one."""
        return self.quantization.as_dict()

    def planned_bytes(self, seq_length: int, batch_size: int, dtype: torch.dtype) -> int:
        """Bytes that `num_bytes` will report once the cache has seen this much, by arithmetic.

        Args:
            seq_length: tokens of each sequence, padding included; none of them was taken back.
            batch_size: number of sequences.
            dtype: type of the keys and values that the model computes.
        """
        per_head = sum(
            layer.planned_bytes(seq_length, self.config.head_dim, dtype.itemsize)
            for layer in self.owners().values()
            if isinstance(layer, QuantizedLayer)
        )
        return batch_size * self.config.num_key_value_heads * per_head
