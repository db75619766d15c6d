"""What the stores of every cache have in common: those of owners, which keep streams, and what stands for readers."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from transformers.cache_utils import CacheLayerMixin

from lckv.models.parts.sharing_cache import Streams
from lckv.sharing.layout import Store, StreamSource


class KVLayer(CacheLayerMixin):
    """What one owner keeps for its readers: the streams of its `store`, such as keys and values.

    A subclass keeps them in any form. It says with `tensors` what it holds, all of it with the batch as first
    dimension, and takes such tensors on with `take_tensors`; the rest of this class (counting bytes, reordering,
    moving between devices, saving) works on that.

    Args:
        store: the streams, and how many of the last tokens the readers need.

    Attributes:
        window: how many of the last tokens the layer keeps; `None` for all.
        streams: what is kept, in the order of the store, each `(batch, num_heads, num_kept, head_dim)` of its own;
            empty until the first tokens come.
        seq_length: tokens seen so far, dropped ones included.
        record_past: whether tokens that leave the window stay until the next `crop`.
        scalars: the attributes that are saved beside the tensors, as they are in an empty layer.
    """

    is_croppable = True
    scalars: ClassVar[dict[str, Any]] = {"seq_length": 0}

    def __init__(self, store: Store) -> None:
        # Not the parent's: it would set `keys` and `values`, which are read from the streams here.
        self.store, self.window = store, store.window
        self.names = tuple(stream.name for stream in store.streams)
        self.streams: Streams = ()
        self.seq_length, self.record_past = 0, False
        self._set_scalars(self.scalars)

    def _set_scalars(self, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            setattr(self, name, copy.copy(value))

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether there are tensors."""
        return len(self.streams) > 0

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """For transformers: the first stream, `(batch, num_heads, kv_len, head_dim)`."""
        return self.streams[0] if self.streams else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """For transformers: the last stream, `(batch, num_heads, kv_len, head_dim)`."""
        return self.streams[-1] if self.streams else None

    @property
    def is_sliding(self) -> bool:
        """Whether old tokens are dropped."""
        return self.window is not None

    @abstractmethod
    def write(self, streams: Streams) -> Streams:
        """Adds the new tokens' streams, each `(batch, num_heads, q_len, head_dim)`.

        Returns:
            For each stream, `(batch, num_heads, kv_len, head_dim)`: the tokens that the queries of the new ones may
            see, the new ones last, as many as `get_mask_sizes` announced.
        """

    @abstractmethod
    def peek(self, streams: Streams) -> Streams:
        """What `write` would return, each `(batch, num_heads, kv_len, head_dim)`, but keeps nothing."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """`write` as transformers calls it, for stores of two streams `(batch, num_kv_heads, q_len, head_dim)`."""
        return self.write((key_states, value_states))

    def count_kept(self) -> int:
        """How many of the last tokens are here."""
        return self.seq_length

    def check_rollback(self, tokens_to_remove: int) -> None:
        """Refuses, before anything changes, what `crop` cannot do.

        Raises:
            ValueError: for more tokens than there are.
            RuntimeError: if tokens that are needed again have been dropped.
        """
        num_removed = check_crop(tokens_to_remove, self.seq_length)
        num_left = self.seq_length - num_removed
        num_needed = num_left if self.window is None else min(num_left, self.window - 1)
        if self.count_kept() - num_removed < num_needed:
            raise RuntimeError(
                f"a window of {self.window} tokens has dropped what taking back {num_removed} of {self.seq_length} "
                "tokens needs; call activate_past_recording() before the tokens that may be taken back"
            )

    @abstractmethod
    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, and drops recorded ones that have left the window.

        Raises:
            RuntimeError: if tokens that are needed again have been dropped; nothing has changed then.
        """

    def lazy_initialization(self, *streams: torch.Tensor) -> None:
        """Makes empty storage that fits the given streams, each `(batch, num_heads, q_len, head_dim)`."""
        self.dtype, self.device = streams[0].dtype, streams[0].device
        self.streams = tuple(states[:, :, :0].clone() for states in streams)

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.seq_length

    def get_max_length(self) -> int:
        """The most tokens that the layer keeps; -1 if there is no limit."""
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens `write` will return for `query_length` new ones, and which token is the first of them."""
        num_past = self.seq_length if self.window is None else min(self.seq_length, self.window - 1)
        return num_past + query_length, self.seq_length - num_past

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the layer holds now, by name, each `(batch, ...)`."""
        return dict(zip(self.names, self.streams, strict=False))  # there are no streams before the first tokens

    def take_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Holds these tensors `(batch, ...)` from now on, named as by `tensors`."""
        self.streams = tuple(tensors[name] for name in self.names)

    def change_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Holds what `change` makes of each tensor `(batch, ...)`."""
        if self.is_initialized:
            self.take_tensors({name: change(tensor) for name, tensor in self.tensors().items()})

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The same, for a change of the batch: from `(batch, ...)` to `(new_batch, ...)`."""
        self.change_tensors(change)

    def num_bytes(self) -> int:
        """Bytes of the live tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def planned_bytes(self, seq_length: int, batch_size: int, itemsize: int) -> int:
        """What `num_bytes` will be, by arithmetic.

        Args:
            seq_length: tokens of each sequence, at least one, padding included.
            batch_size: number of sequences.
            itemsize: bytes of a number.
        """
        most = self.get_max_length()
        num_tokens = seq_length if most < 0 else min(seq_length, most)
        return batch_size * num_tokens * self.store.size * itemsize

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What has to be saved: tensors `(batch, ...)`, and plain numbers."""
        return self.tensors(), {name: getattr(self, name) for name in self.scalars}

    def load_state(self, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        """Takes on a saved state, tensors of `(batch, ...)` and plain numbers."""
        self._set_scalars(scalars)
        if tensors:
            self.take_tensors(tensors)
            self.dtype, self.device = self.streams[0].dtype, self.streams[0].device

    def fork(self) -> Self:
        """A layer with the same content whose updates leave this one alone."""
        forked = copy.copy(self)
        forked.change_tensors(torch.clone)
        return forked

    def activate_past_recording(self) -> None:
        """From now on tokens that leave the window stay until the next `crop`, so that it can bring them back.

        As in transformers this holds until `reset`, or until `record_past` is set to false.
        """
        self.record_past = True

    def reset(self) -> None:
        """Forgets everything."""
        self.streams, self.seq_length, self.record_past = (), 0, False
        self._set_scalars(self.scalars)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row *i* becomes row `beam_idx[i]`, `(batch,)`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch, `(new_batch,)`, in this order."""
        self.change_rows(
            lambda tensor: tensor[indices.to(tensor.device) if isinstance(indices, torch.Tensor) else indices]
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch `repeats` times."""
        self.change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Moves everything to the CPU."""
        self.change_tensors(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves everything back to the device of the first tokens."""
        self.change_tensors(lambda tensor: tensor.to(self.device, non_blocking=True))


class ReaderLayer(CacheLayerMixin):
    """Stands where a layer computes no streams: it resolves to what it reads, owns nothing and is never written.

    Args:
        layer_idx: the reader.
        sources: the streams that it reads. Where they are of several owners, these keep the same tokens, so that the
            first one can be asked for all but the tensors.
        stores: of the owners, by layer.
    """

    supports_early_init = False

    def __init__(self, layer_idx: int, sources: Sequence[StreamSource], stores: Mapping[int, KVLayer]) -> None:
        self.layer_idx, self.sources = layer_idx, tuple(sources)
        self.read = tuple(stores[source.owner] for source in sources)  # for each stream
        self.owner = owner = self.read[0]
        self.is_compileable, self.is_croppable = owner.is_compileable, owner.is_croppable
        self.is_sliding = owner.is_sliding

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """For transformers: the owner's own tensor of the first stream, `(batch, num_heads, kv_len, head_dim)`."""
        return self.owner.streams[self.sources[0].index] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """For transformers: the owner's own tensor of the last stream, `(batch, num_heads, kv_len, head_dim)`."""
        return self.read[-1].streams[self.sources[-1].index] if self.read[-1].is_initialized else None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the owner is."""
        return self.owner.is_initialized

    def write(self, *streams: Any, **kwargs: Any) -> Any:
        """Refuses: a reader never writes."""
        owners = " and ".join(f"layer {owner}" for owner in sorted({source.owner for source in self.sources}))
        raise RuntimeError(f"layer {self.layer_idx} reads the KV of {owners} and never writes any")

    update = lazy_initialization = write

    def get_seq_length(self) -> int:
        """Tokens that the owner has seen."""
        return self.owner.get_seq_length()

    def get_max_length(self) -> int:
        """The most tokens that the owner keeps."""
        return self.owner.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The owner's."""
        return self.owner.get_mask_sizes(query_length)

    def leave_to_owner(self, *args: Any) -> None:
        """Does nothing: what is done to the owner's tensors is done for its readers too."""

    offload = prefetch = reset = crop = batch_repeat_interleave = batch_select_indices = leave_to_owner
    reorder_cache = leave_to_owner  # type: ignore[assignment]


def join(past: Streams, new: Streams) -> Streams:
    """For each stream `(batch, num_heads, kv_len, head_dim)`, the past tokens and then the new ones."""
    return tuple(torch.cat(pair, dim=2) for pair in zip(past, new, strict=True))


def roll_ring(states: torch.Tensor, num_steps: int, num_fixed: int = 0) -> torch.Tensor:
    """`(batch, num_heads, num_slots, head_dim)` with all slots but the first `num_fixed` moved on in a circle.

    In a ring the token at position *p* lies in slot `p % num_slots`, so that the oldest of those that end at
    `seq_length` lies in slot `seq_length % num_slots`: as many steps turn tokens in order into a ring, and back.
    """
    ring = states[:, :, num_fixed:].roll(num_steps, dims=2)
    return torch.cat([states[:, :, :num_fixed], ring], dim=2) if num_fixed else ring


def writable(states: torch.Tensor) -> torch.Tensor:
    """The tensor `(batch, ...)`, or a copy if it was made in inference mode, which allows no writing outside."""
    return states.clone() if states.is_inference() and not torch.is_inference_mode_enabled() else states


def check_crop(tokens_to_remove: int, seq_length: int) -> int:
    """The number of tokens to take back, from transformers' negative number.

    Raises:
        ValueError: for a positive number, which once meant the length to keep, and for more tokens than there are.
    """
    if not -seq_length <= tokens_to_remove <= 0:
        raise ValueError(f"crop({tokens_to_remove}) of {seq_length} tokens: allowed are {-seq_length} to 0")
    return -tokens_to_remove
