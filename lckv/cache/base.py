"""What every cache has in common: one store per layer that computes keys and values (KV), none for its readers."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self, cast

import torch

from lckv.cache.layers import KVLayer, ReaderLayer
from lckv.costs import ModelSizes, count_kv_bytes
from lckv.errors import UserError, near_miss
from lckv.models.configuration_lckv import LCKVLlamaConfig
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


def check_offloading(offloading: bool | None) -> None:
    """Refuses to offload where there is nothing to offload from.

    Raises:
        UserError: naming the key.
    """
    if offloading and not torch.cuda.is_available():
        raise UserError("cache.offloading=True: allowed is False, as there is no CUDA device to offload from")


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
        check_offloading(offloading)
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

    def begin_forward(self, config: LCKVLlamaConfig, attention_mask: torch.Tensor | None, num_new_tokens: int) -> None:
        """Refuses a model with another pattern than the cache was made for, or with windows that it does not keep."""
        allowed = "allowed is a cache made from the model's own configuration"
        if config.sharing_plan.layer_types != self.plan.layer_types:
            raise UserError(
                f"a cache for layer_types {self.plan.layer_types!r} in a model with "
                f"{config.sharing_plan.layer_types!r}: {allowed}"
            )
        kept = self.config.sliding_window
        if config.sliding_window > kept and any(map(self.plan.owner_is_sliding, self.plan.kv_owners)):
            raise UserError(
                f"a cache for a sliding_window of {kept} in a model with {config.sliding_window}: {allowed}"
            )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeyValue:
        """Adds the new tokens of a layer that computes KV, and returns what their queries may see.

        Raises:
            UserError: if the cache holds numbers of another type.
        """
        key_states, value_states = self._in_stored_types(layer_idx, (key_states, value_states))
        if self.offloading:
            self._fetch(layer_idx, key_states.device)
            self.prefetch(layer_idx + 1, only_non_sliding=False)
        layer: Any = self.layers[layer_idx]
        states: KeyValue = layer.update(key_states, value_states, *args, **kwargs)
        if self.offloading:
            self.offload(layer_idx, only_non_sliding=False)
        return states

    def _in_stored_types(self, layer_idx: int, states: KeyValue) -> KeyValue:
        """Refuses to mix types: the cache would be promoted, or the new tokens rounded, without anybody noticing.

        Under autocast, which computes some things in fewer bits than others anyway, new tokens are stored in the types
        of those before them.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, KVLayer) or not layer.is_initialized:
            return states
        dtypes = layer.keys.dtype, layer.values.dtype
        for dtype, new in zip(dtypes, states, strict=True):
            if dtype != new.dtype and not torch.is_autocast_enabled(new.device.type):
                raise UserError(
                    f"layer {layer_idx} of the cache holds {_name(dtype)}, and the model gives it "
                    f"{_name(new.dtype)}: allowed is {_name(dtype)}, the type with which the cache was filled"
                )
        return states[0].to(dtypes[0]), states[1].to(dtypes[1])

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
        key_states, value_states = self._in_stored_types(layer_idx, (key_states, value_states))
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_per_decoder_layer(plan: SharingPlan, stores: dict[int, KVLayer]) -> list[Any]:
    """The owners' stores, and readers between them."""
    return [
        stores[layer.layer_idx]
        if layer.computes_kv
        else ReaderLayer(stores[layer.kv_source], layer.layer_idx, layer.kv_source)
        for layer in plan.layers
    ]
