"""What every cache has in common: one store per owner, that is per layer that computes streams, none for readers."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch

from lckv.cache.layers import KVLayer, ReaderLayer
from lckv.errors import UserError, near_miss
from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.parts.sharing_cache import SharingCache, Streams
from lckv.sharing.layout import KVLayout, Store, Stream
from lckv.sharing.patterns import SharingPlan
from lckv.utils.registry import Registry

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
    parameters = _option_parameters(cache_class)
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


def _option_parameters(cache_class: type[KVCache]) -> dict[str, inspect.Parameter]:
    return {name: each for name, each in inspect.signature(cache_class).parameters.items() if name != "config"}


def check_offloading(offloading: bool | None) -> None:
    """Refuses to offload where there is nothing to offload from.

    Raises:
        UserError: naming the key.
    """
    if offloading and not torch.cuda.is_available():
        raise UserError("cache.offloading=True: allowed is False, as there is no CUDA device to offload from")


class KVCache(SharingCache, ABC):
    """A transformers cache with one [`KVLayer`] per owner of the model's `kv_layout`.

    The model hands it streams with `write`, and gets those back that the new tokens' queries see; `peek` is for passes
    before the last one, which keep nothing. Subclasses give `make_layer`, and register themselves in [`CACHES`] under
    `name`.

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
        self.plan, self.config = plan_of(config), config
        self.layout: KVLayout = config.kv_layout
        stores = {store.owner: self.make_layer(store) for store in self.layout.stores}
        super().__init__(layers=self._one_per_decoder_layer(stores))
        self.offloading = offloading
        if offloading:
            self.prefetch_stream = torch.cuda.Stream()

    @classmethod
    def class_for(cls, options: dict[str, Any]) -> type[KVCache]:
        """The class of caches with these options: this one, unless an option stands for another."""
        return cls

    @abstractmethod
    def make_layer(self, store: Store) -> KVLayer:
        """Makes the empty store of one owner."""

    def options(self) -> dict[str, Any]:
        """The arguments, beside `config`, that make an empty cache like this one: attributes of the same name."""
        return {name: getattr(self, name) for name in _option_parameters(type(self))}

    def storage(self, layer_idx: int) -> KVLayer:
        """The store that holds what layer `layer_idx` reads; of several, that of the first stream."""
        return self.owners()[self.layout.sources[layer_idx][0].owner]

    def owners(self) -> dict[int, KVLayer]:
        """The stores, by the index of the layer that computes what they keep (and may read another layer's)."""
        return {owner: layer for owner, layer in enumerate(self.layers) if isinstance(layer, KVLayer)}

    def num_bytes(self) -> int:
        """Bytes of all live tensors of the cache."""
        return sum(layer.num_bytes() for layer in self.owners().values())

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What has to be saved: tensors `(batch, ...)` by unique names, and what JSON can hold."""
        tensors: dict[str, torch.Tensor] = {}
        scalars: dict[str, Any] = {}
        for owner, layer in self.owners().items():
            own_tensors, scalars[str(owner)] = layer.state()
            tensors |= {f"layers.{owner}.{name}": tensor for name, tensor in own_tensors.items()}
        return tensors, {"layers": scalars}

    def load_state(self, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        """Takes on what `state` of a cache with the same options returned, tensors `(batch, ...)` and all else."""
        for owner, layer in self.owners().items():
            prefix = f"layers.{owner}."
            own_tensors = {
                name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
            }
            layer.load_state(own_tensors, scalars["layers"][str(owner)])

    def planned_bytes(self, seq_length: int, batch_size: int, dtype: torch.dtype) -> int:
        """Bytes that `num_bytes` will report once the cache has seen this much, by arithmetic.

        Args:
            seq_length: tokens of each sequence; padding counts, but not where pages are kept. None was taken back.
            batch_size: number of sequences.
            dtype: type of the streams that the model computes.
        """
        if seq_length == 0:
            return 0
        layers = self.owners().values()
        return sum(layer.planned_bytes(seq_length, batch_size, dtype.itemsize) for layer in layers)

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 while the cache is empty."""
        tensors = [tensor for layer in self.owners().values() for tensor in layer.tensors().values()]
        return tensors[0].shape[0] if tensors else -1

    def begin_forward(self, config: LCKVLlamaConfig, attention_mask: torch.Tensor | None, num_new_tokens: int) -> None:
        """Refuses a model whose owners keep something else than the cache was made for, or more of it.

        `attention_mask` is as the model got it, `(batch, past + q_len)` with zeros at padding, 4D, or `None`.
        """
        if config is self.config:  # true of almost every step, and looking closer takes time
            return
        allowed = "allowed is a cache made from the model's own configuration"
        if config.sharing_plan.layer_types != self.plan.layer_types:
            raise UserError(
                f"a cache for layer_types {self.plan.layer_types!r} in a model with "
                f"{config.sharing_plan.layer_types!r}: {allowed}"
            )
        kept = self.config.sliding_window
        if config.sliding_window > kept and any(store.window is not None for store in self.layout.stores):
            raise UserError(
                f"a cache for a sliding_window of {kept} in a model with {config.sliding_window}: {allowed}"
            )
        if not torch.compiler.is_compiling():  # a compiled step continues what an eager one began
            mine, given = self.layout.streams, config.kv_layout.streams
            if mine != given:
                raise UserError(
                    f"a cache for {describe_streams(mine)} in a model with {describe_streams(given)}: {allowed}"
                )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`write` as transformers calls it, for owners of two streams `(batch, num_kv_heads, q_len, head_dim)`."""
        keys, values = self.write((key_states, value_states), layer_idx)
        return keys, values

    def write(self, streams: Streams, layer_idx: int) -> Streams:
        """Adds the new tokens of an owner, and returns what their queries may see.

        Args:
            streams: of the new tokens, each `(batch, num_heads, q_len, head_dim)`.
            layer_idx: the owner.

        Returns:
            Each stream `(batch, num_heads, kv_len, head_dim)`, the new tokens last.

        Raises:
            UserError: if the cache holds numbers of another type.
        """
        streams = self._in_stored_types(layer_idx, streams)
        layer: Any = self.layers[layer_idx]
        if not self.offloading:
            return layer.write(streams)
        self._fetch(layer_idx, streams[0].device)
        self.prefetch(layer_idx + 1, only_non_sliding=False)
        seen: Streams = layer.write(streams)
        self.offload(layer_idx, only_non_sliding=False)
        return seen

    def peek(self, streams: Streams, layer_idx: int) -> Streams:
        """What `write` would return, each `(batch, num_heads, kv_len, head_dim)`, but keeps nothing."""
        streams = self._in_stored_types(layer_idx, streams)
        if self.offloading:
            self._fetch(layer_idx, streams[0].device)
        layer: Any = self.layers[layer_idx]
        return layer.peek(streams)

    def _in_stored_types(self, layer_idx: int, streams: Streams) -> Streams:
        """Refuses to mix types: the cache would be promoted, or the new tokens rounded, without anybody noticing.

        Under autocast, which computes some things in fewer bits than others anyway, new tokens are stored in the types
        of those before them.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, KVLayer) or not layer.streams:
            return streams
        differ = False
        for held, new in zip(layer.streams, streams, strict=True):
            if held.dtype == new.dtype:
                continue
            if not torch.is_autocast_enabled(new.device.type):
                raise UserError(
                    f"layer {layer_idx} of the cache holds {_name(held.dtype)}, and the model gives it "
                    f"{_name(new.dtype)}: allowed is {_name(held.dtype)}, the type with which the cache was filled"
                )
            differ = True
        if not differ:
            return streams
        return tuple(new.to(held.dtype) for held, new in zip(layer.streams, streams, strict=True))

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
        forked.layers = self._one_per_decoder_layer({owner: layer.fork() for owner, layer in self.owners().items()})
        return forked

    def _one_per_decoder_layer(self, stores: dict[int, KVLayer]) -> list[Any]:
        """The owners' stores, and readers between them."""
        sources = enumerate(self.layout.sources)
        return [stores[layer] if layer in stores else ReaderLayer(layer, read, stores) for layer, read in sources]


def plan_of(config: Any) -> SharingPlan:
    """The sharing pattern of a model.

    Raises:
        UserError: if the model is not one of ours.
    """
    plan = getattr(config, "sharing_plan", None)
    if plan is None:
        raise UserError(f"a cache for model type {config.model_type!r}: allowed is 'lckv-llama'")
    return plan


def describe_streams(stores: Mapping[int, Sequence[Stream]]) -> str:
    """What owners keep of a token, such as `2 heads of 8 rotated keys and 2 heads of 8 values in layers 0, 2`."""
    layers: dict[str, list[str]] = {}
    for owner, streams in stores.items():
        each = (
            f"{stream.num_heads} head{'s' * (stream.num_heads != 1)} of {stream.head_dim} "
            f"{'rotated ' * stream.is_rotated}{stream.name}"
            f"{f' of planes {list(stream.planes)}' if stream.planes else ''}"
            for stream in streams
        )
        layers.setdefault(" and ".join(each), []).append(str(owner))
    return "; ".join(f"{streams} in layers {', '.join(owners)}" for streams, owners in layers.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
