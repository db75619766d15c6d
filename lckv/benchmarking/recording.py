"""Bytes of keys and values that go into a cache and into attention, counted on the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lckv.cache import KVCache
from lckv.models.attention import LCKVAttention
from lckv.models.iteration import KeyValue
from lckv.models.masks import VisibleKeys


class RecordsWrites(KVCache):
    """To be mixed into a cache class: counts the bytes of the states that `update` is given.

    Attributes:
        written_bytes: so far; may be set to zero.
        written_layers: which layers wrote, in order.
    """

    written_bytes = 0
    written_layers: tuple[int, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeyValue:
        """Counts, and updates."""
        self.written_bytes += key_states.nbytes + value_states.nbytes
        self.written_layers += (layer_idx,)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class ReadCount:
    """Bytes of the keys and values that attention was given, by layer."""

    def __init__(self) -> None:
        self.by_layer: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Over all layers."""
        return sum(self.by_layer.values())

    def hook(self, module: LCKVAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of an attention layer.

        A layer that hides each query's own token by shifting keys against queries leaves out the last key, so that one
        does not count. Keys that only a mask hides do: they are read.
        """
        _, key_states, value_states, visible_keys = _attention_arguments(*args, **kwargs)
        num_bytes = 0
        if key_states is not None and value_states is not None:
            num_keys = key_states.shape[2] - visible_keys.drop_own_token
            num_bytes = (key_states.nbytes + value_states.nbytes) * num_keys // key_states.shape[2]
        self.by_layer[module.layer_idx] = self.by_layer.get(module.layer_idx, 0) + num_bytes


def _attention_arguments(
    hidden_states: torch.Tensor,
    key_states: torch.Tensor | None,
    value_states: torch.Tensor | None,
    visible_keys: VisibleKeys,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, VisibleKeys]:
    """Those that count, however they were passed."""
    return hidden_states, key_states, value_states, visible_keys


@contextmanager
def record_reads(model: nn.Module) -> Iterator[ReadCount]:
    """Counts what the attention layers of `model` are given inside the `with` block."""
    count = ReadCount()
    layers = [module for module in model.modules() if isinstance(module, LCKVAttention)]
    handles = [layer.register_forward_pre_hook(count.hook, with_kwargs=True) for layer in layers]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
