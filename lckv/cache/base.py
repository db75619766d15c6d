"""What every cache has in common: one store per layer that computes keys and values (KV), none for its readers."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self, cast

import torch
from transformers.cache_utils import CacheLayerMixin

from lckv.costs import ModelSizes, count_kv_bytes
from lckv.errors import UserError, near_miss
from lckv.models.iteration import KeyValue
from lckv.models.sharing_cache import SharingCache
from lckv.patterns import SharingPlan
from lckv.registry import Registry

CACHES: Registry[type[KVCache]] = Registry("cache")
"""Every cache class, by the name that `cache=<name>` gives."""


def build_cache(name: str, config: Any, **options: Any) -> KVCache:
    """Makes an empty cache.

    Args:
        name: an entry of [`CACHES`].
        config: the configuration of the model that will use the cache.
        options: the class's own.

    Raises:
        UserError: for an unknown name or option, a value out of range, and options that the model does not allow.
    """
    cache_class = CACHES[name]
    parameters = dict(inspect.signature(cache_class).parameters)
    parameters.pop("config")
    allowed = list(parameters)
    for option in options:
        if option not in allowed:
            raise UserError(
                f"cache {name!r} has no option {option!r}: "
                f"allowed are {', '.join(allowed) or 'none'}{near_miss(option, allowed)}"
            )
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise UserError(f"cache {name!r} needs {option!r}: give cache.{option}")
    return cache_class.class_for(options)(config, **options)


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


class KVCache(SharingCache, ABC):
    """A transformers cache with one [`KVLayer`] per layer that computes KV.

    Subclasses give `make_layer`, and register themselves in [`CACHES`] under `name`.

    Args:
        config: the configuration of the model that will use the cache.
        offloading: whether to keep the stores in the CPU's memory, and to bring each to the GPU while it is used. The
            next one comes while the GPU computes with the one before.

    Raises:
        UserError: if the model is not one of ours, and for offloading where there is no GPU.
    """

    name: ClassVar[str]

    def __init__(self, config: Any, offloading: bool = False) -> None:
        if offloading and not torch.cuda.is_available():
            raise UserError("cache.offloading=True: allowed is False, as there is no CUDA device to offload from")
        plan = plan_of(config)
        self.plan: SharingPlan = plan
        self.config = config
        stores = {
            owner: self.make_layer(owner, config.sliding_window if plan.owner_is_sliding(owner) else None)
            for owner in plan.kv_owners
        }
        super().__init__(layers=_one_per_decoder_layer(plan, stores))
        self.offloading = offloading
        if offloading:
            self.prefetch_stream = torch.cuda.Stream()

    @classmethod
    def class_for(cls, options: dict[str, Any]) -> type[KVCache]:
        """The class of caches with these options: this one, unless an option stands for another."""
        return cls

    @abstractmethod
    def make_layer(self, layer_idx: int, window: int | None) -> KVLayer:
        """Makes the empty store of the owner `layer_idx`, which has to keep `window` tokens, or all."""

    def options(self) -> dict[str, Any]:
        """The arguments, beside `config`, that make an empty cache like this one."""
        return {}

    def storage(self, layer_idx: int) -> KVLayer:
        """The store that holds what layer `layer_idx` reads."""
        return self.owners()[self.plan.kv_source[layer_idx]]

    def owners(self) -> dict[int, KVLayer]:
        """The stores, by the index of the layer that computes their KV (and may read another layer's)."""
        return {owner: layer for owner, layer in enumerate(self.layers) if isinstance(layer, KVLayer)}

    def num_bytes(self) -> int:
        """Bytes of all live tensors of the cache."""
        return sum(layer.num_bytes() for layer in self.owners().values())

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What has to be saved: tensors by unique names, and what JSON can hold."""
        tensors: dict[str, torch.Tensor] = {}
        scalars: dict[str, Any] = {}
        for owner, layer in self.owners().items():
            own_tensors, scalars[str(owner)] = layer.state()
            tensors |= {f"layers.{owner}.{name}": tensor for name, tensor in own_tensors.items()}
        return tensors, {"layers": scalars}

    def load_state(self, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        """Takes on what `state` of a cache with the same options returned."""
        for owner, layer in self.owners().items():
            prefix = f"layers.{owner}."
            own_tensors = {
                name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
            }
            layer.load_state(own_tensors, scalars["layers"][str(owner)])

    def planned_bytes(self, seq_length: int, batch_size: int, dtype: torch.dtype) -> int:
        """Bytes that `num_bytes` will report once the cache has seen this much, by arithmetic.

        Args:
            seq_length: tokens of each sequence, padding included.
            batch_size: number of sequences.
            dtype: type of the keys and values that the model computes.
        """
        if seq_length == 0:
            return 0
        sizes, dtype_name = ModelSizes.from_config(self.config), str(dtype).removeprefix("torch.")
        return batch_size * count_kv_bytes(self.plan, sizes, seq_length, dtype_name).resident_total

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 while the cache is empty."""
        tensors = [tensor for layer in self.owners().values() for tensor in layer.tensors().values()]
        return tensors[0].shape[0] if tensors else -1

    def begin_forward(self, plan: SharingPlan, attention_mask: torch.Tensor | None, num_new_tokens: int) -> None:
        """Refuses a model with another pattern than the cache was made for."""
        if plan.layer_types != self.plan.layer_types:
            raise UserError(
                f"a cache for layer_types {self.plan.layer_types!r} in a model with {plan.layer_types!r}: "
                "allowed is a cache made from the model's own configuration"
            )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeyValue:
        """Adds the new tokens of a layer that computes KV, and returns what their queries may see.

        Raises:
            UserError: if the cache holds numbers of another type.
        """
        self._check_dtype(layer_idx, key_states)
        if self.offloading:
            self._fetch(layer_idx, key_states.device)
            self.prefetch(layer_idx + 1, only_non_sliding=False)
        layer: Any = self.layers[layer_idx]
        states: KeyValue = layer.update(key_states, value_states, *args, **kwargs)
        if self.offloading:
            self.offload(layer_idx, only_non_sliding=False)
        return states

    def _check_dtype(self, layer_idx: int, states: torch.Tensor) -> None:
        """Refuses to mix types: the cache would be promoted, or the new tokens rounded, without anybody noticing.

        Autocast may: it gives some chunks another type than others.
        """
        layer, dtype = self.layers[layer_idx], states.dtype
        if not isinstance(layer, KVLayer) or not layer.is_initialized or layer.dtype == dtype:
            return
        if not torch.is_autocast_enabled(states.device.type):
            raise UserError(
                f"layer {layer_idx} of the cache holds {_name(layer.dtype)}, and the model gives it {_name(dtype)}: "
                f"allowed is {_name(layer.dtype)}, the type with which the cache was filled"
            )

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Begins to bring the next store at or after `layer_idx` to the GPU; after the last comes the first."""
        stores = {
            owner: layer for owner, layer in self.owners().items() if not (only_non_sliding and layer.is_sliding)
        }
        following = [layer for owner, layer in stores.items() if owner >= layer_idx] + list(stores.values())
        if len(stores) > 1:  # the only one is needed at once, and fetched where it is
            with torch.cuda.stream(cast(torch.cuda.Stream, self.prefetch_stream)):
                following[0].prefetch()

    def _fetch(self, layer_idx: int, device: torch.device) -> None:
        """Waits for a store to be on the GPU."""
        stream = torch.cuda.current_stream(device)
        stream.wait_stream(self.prefetch_stream)
        layer: Any = self.layers[layer_idx]
        layer.device = device  # a cache that was loaded to the CPU does not know where it is used
        layer.prefetch()
        # What comes next may get the memory of tensors that are still read here, or being copied away.
        self.prefetch_stream.wait_stream(stream)

    def peek(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> KeyValue:
        """What `update` would return, but keeps nothing."""
        self._check_dtype(layer_idx, key_states)
        if self.offloading:
            self._fetch(layer_idx, key_states.device)
        return self.owners()[layer_idx].peek(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens of every sequence.

        Raises:
            ValueError: unless there are as many.
            RuntimeError: if tokens that are needed again have been dropped; nothing has changed then.
        """
        for layer in self.owners().values():
            layer.check_rollback(tokens_to_remove)
        super().crop(tokens_to_remove)

    def fork(self) -> Self:
        """A cache with the same content; what is done to one from now on does not disturb the other."""
        forked = copy.copy(self)
        stores = {owner: layer.fork() for owner, layer in self.owners().items()}
        forked.layers = _one_per_decoder_layer(self.plan, stores)
        return forked


def plan_of(config: Any) -> SharingPlan:
    """The sharing pattern of a model.

    Raises:
        UserError: if the model is not one of ours.
    """
    plan = getattr(config, "sharing_plan", None)
    if plan is None:
        raise UserError(f"a cache for model type {config.model_type!r}: allowed is 'lckv-llama'")
    return plan


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _one_per_decoder_layer(plan: SharingPlan, stores: dict[int, KVLayer]) -> list[Any]:
    """The owners' stores, and readers between them."""
    return [
        stores[layer.layer_idx]
        if layer.computes_kv
        else ReaderLayer(stores[layer.kv_source], layer.layer_idx, layer.kv_source)
        for layer in plan.layers
    ]
