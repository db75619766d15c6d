"""What the stores of every cache have in common: those of layers that compute keys and values (KV), and of readers."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from transformers.cache_utils import CacheLayerMixin

from lckv.models.iteration import KeyValue


class KVLayer(CacheLayerMixin):
    """The keys and values of one layer that computes them.

    A subclass keeps them in any form. It says with `tensors` what it holds, all of it with the batch as first
    dimension, and the rest of this class (counting bytes, reordering, moving between devices, saving) works on that.

    Attributes:
        window: how many of the last tokens the layer has to keep for its readers; `None` for all.
        seq_length: tokens seen so far, dropped ones included.
    """

    is_croppable = True
    keys: torch.Tensor  # None until the first update
    values: torch.Tensor
    tensor_names: ClassVar[tuple[str, ...]] = ("keys", "values")
    scalar_names: ClassVar[tuple[str, ...]] = ("seq_length",)

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.seq_length = 0
        self.record_past = False

    @property
    def is_sliding(self) -> bool:
        """Whether old tokens are dropped."""
        return self.window is not None

    @abstractmethod
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValue:
        """Adds the new tokens' keys and values `(batch, num_kv_heads, q_len, head_dim)`.

        Returns:
            Those that the new tokens' queries may see, the new ones last, as `get_mask_sizes` announced them.
        """

    @abstractmethod
    def peek(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KeyValue:
        """Returns what `update` would, but keeps nothing."""

    def check_rollback(self, tokens_to_remove: int) -> None:
        """Refuses, before anything changes, what `crop` cannot do.

        Raises:
            RuntimeError: if tokens that are needed again have been dropped.
        """

    @abstractmethod
    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, and drops recorded ones that have left the window.

        Raises:
            RuntimeError: if tokens that are needed again have been dropped; nothing has changed then.
        """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes empty storage that fits the given states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.seq_length

    def get_max_length(self) -> int:
        """The most tokens that the layer keeps; -1 if there is no limit."""
        return -1 if self.window is None else self.window

    get_max_cache_shape = get_max_length  # its name in older transformers

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `update` will return for `query_length` new tokens, and which token the first belongs to."""
        num_past = self.seq_length if self.window is None else min(self.seq_length, self.window - 1)
        return num_past + query_length, self.seq_length - num_past

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the layer holds now, by attribute name, each with the batch as first dimension."""
        if not self.is_initialized:
            return {}
        return {name: tensor for name in self.tensor_names if (tensor := getattr(self, name)) is not None}

    def num_bytes(self) -> int:
        """Bytes of the live tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What has to be saved: tensors, and plain numbers."""
        return self.tensors(), {name: getattr(self, name) for name in self.scalar_names}

    def load_state(self, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        """Takes on a saved state."""
        for name, value in (scalars | tensors).items():
            setattr(self, name, value)
        if tensors:
            first = next(iter(tensors.values()))
            self.dtype, self.device, self.is_initialized = first.dtype, first.device, True

    def fork(self) -> Self:
        """A layer with the same content whose updates leave this one alone."""
        forked = copy.copy(self)
        for name, tensor in self.tensors().items():
            setattr(forked, name, tensor.clone())
        return forked

    def activate_past_recording(self) -> None:
        """From now on tokens that leave the window stay until the next `crop`, so that it can bring them back.

        As in transformers this holds until `reset`, or until `record_past` is set to false.
        """
        self.record_past = True

    def reset(self) -> None:
        """Forgets everything."""
        for name in self.tensor_names:
            setattr(self, name, None)
        self.is_initialized, self.record_past, self.seq_length = False, False, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row *i* becomes row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch, in this order."""
        for name, tensor in self.tensors().items():
            rows = indices.to(tensor.device) if isinstance(indices, torch.Tensor) else indices
            setattr(self, name, tensor[rows])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch `repeats` times."""
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Moves everything to the CPU."""
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves everything back to the device of the first update."""
        for name, tensor in self.tensors().items():
            if tensor.device != self.device:
                setattr(self, name, tensor.to(self.device, non_blocking=True))


class ReaderLayer(CacheLayerMixin):
    """Stands where a layer computes no KV: it resolves to the layer it reads, owns nothing and is never written.

    Args:
        owner: the store of the layer whose KV this one reads.
        layer_idx: the reader.
        owner_idx: the layer that it reads.
    """

    supports_early_init = False

    def __init__(self, owner: KVLayer, layer_idx: int, owner_idx: int) -> None:
        self.owner, self.layer_idx, self.owner_idx = owner, layer_idx, owner_idx

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """The owner's own tensor."""
        return self.owner.keys

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """The owner's own tensor."""
        return self.owner.values

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the owner is."""
        return self.owner.is_initialized

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether the owner is."""
        return self.owner.is_compileable

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the owner is."""
        return self.owner.is_croppable

    @property
    def is_sliding(self) -> bool:
        """Whether the owner drops old tokens."""
        return self.owner.is_sliding

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValue:
        """Refuses: a reader never writes."""
        raise RuntimeError(f"layer {self.layer_idx} reads the KV of layer {self.owner_idx} and never writes any")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Refuses: there is nothing to initialize."""
        self.update(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens that the owner has seen."""
        return self.owner.get_seq_length()

    def get_max_length(self) -> int:
        """The most tokens that the owner keeps."""
        return self.owner.get_max_length()

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The owner's."""
        return self.owner.get_mask_sizes(query_length)

    def offload(self) -> None:
        """The owner does it."""

    def prefetch(self) -> None:
        """The owner does it."""

    def reset(self) -> None:
        """The owner does it."""

    def crop(self, tokens_to_remove: int) -> None:
        """The owner does it."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """The owner does it."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """The owner does it."""

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The owner does it."""


def writable(states: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if it was made in inference mode, which allows no writing outside that mode."""
    return states.clone() if states.is_inference() and not torch.is_inference_mode_enabled() else states


def check_crop(tokens_to_remove: int, seq_length: int) -> int:
    """The number of tokens to take back, from transformers' negative number.

    Raises:
        ValueError: for a positive number, which once meant the length to keep, and for more tokens than there are.
    """
    if not -seq_length <= tokens_to_remove <= 0:
        raise ValueError(f"crop({tokens_to_remove}) of {seq_length} tokens: allowed are {-seq_length} to 0")
    return -tokens_to_remove
