"""Repeated passes over layers that read upward.

Where a layer reads the keys and values (KV) of a layer above it, one parallel pass is not enough: in each pass, upward
readers use what the pass before wrote, starting from all-zero KV. After *p* passes the first *p* tokens are exact
(Wu and Tu, ACL 2024). The passes before the last matter only for the KV they leave behind, so they run nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from lckv.models.sharing_cache import SharingCache
from lckv.patterns import Segment, SharingPlan

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one owner, each `(batch, num_kv_heads, kv_len, head_dim)`."""

KeyValues = dict[int, KeyValue]
"""What each owner's readers see, by layer index. Every pass makes a new dictionary; none is written twice."""


@dataclass(frozen=True)
class PassSchedule:
    """How often a cycle runs.

    Attributes:
        num_ungraded: passes without gradient, or the most of them if they stop at `tolerance`.
        num_graded: passes with gradient after those.
        tolerance: relative change of KV at which the ungraded passes stop early, or `None`.
    """

    num_ungraded: int
    num_graded: int
    tolerance: float | None

    @classmethod
    def from_config(
        cls, forward_passes: int | str, backward_passes: int, tolerance: float, num_new_tokens: int
    ) -> PassSchedule:
        """Plans the passes for `num_new_tokens`, of which as many passes make an exact result.

        Where nobody wants a gradient, a converged iteration needs but one more pass: the one that writes the cache.
        """
        if not isinstance(forward_passes, int) and not torch.is_grad_enabled():
            backward_passes = 1
        num_graded = min(backward_passes, num_new_tokens)
        num_ungraded = num_new_tokens - num_graded
        if isinstance(forward_passes, int):
            return cls(min(forward_passes, num_ungraded), num_graded, None)
        return cls(num_ungraded, num_graded, tolerance)


@dataclass(frozen=True)
class CycleReport:
    """What the passes over one cycle came to.

    Attributes:
        num_passes: how many there were.
        residual: how far the KV of the owners read upward moved in the last pass, relative to its size (a scalar);
            `None` if that was not asked for, or there was but one pass.
    """

    num_passes: int
    residual: torch.Tensor | None


RunLayers = Callable[[torch.Tensor, KeyValues, "Cache | CacheView | None", bool], tuple[torch.Tensor, KeyValues]]
"""`run(hidden_states, key_values, past_key_values, is_last)` runs a cycle's layers once.

It returns the hidden states that leave the cycle (only the last pass has any) and `key_values` with the cycle's
entries replaced by what this pass computed.
"""


def run_cycle(
    run: RunLayers,
    hidden_states: torch.Tensor,
    key_values: KeyValues,
    past_key_values: Cache | None,
    owners: tuple[int, ...],
    schedule: PassSchedule,
    *,
    needs_residual: bool,
) -> tuple[torch.Tensor, KeyValues, CycleReport]:
    """Runs a cycle as often as its schedule says.

    Args:
        run: runs the cycle's layers once.
        hidden_states: `(batch, q_len, hidden_size)`, what enters the cycle; every pass starts from it.
        key_values: KV of the layers below, and of the cycle's owners for earlier tokens if there are any.
        past_key_values: the cache; only the last pass writes to it.
        owners: the owners that are read upward, whose KV has to settle.
        schedule: how often to run.
        needs_residual: whether to measure how far KV still moved in the last pass.

    Returns:
        The hidden states that leave the cycle, `key_values` with the cycle's own entries, and what it took.
    """
    num_ungraded = 0
    with _without_gradient():
        while num_ungraded < schedule.num_ungraded:
            previous = key_values
            _, key_values = run(hidden_states, previous, CacheView.of(past_key_values), False)
            num_ungraded += 1
            if schedule.tolerance is not None and num_ungraded > 1:
                if relative_change(previous, key_values, owners) < schedule.tolerance:
                    break
    for _ in range(schedule.num_graded - 1):
        _, key_values = run(hidden_states, key_values, CacheView.of(past_key_values), False)
    previous = key_values
    output, key_values = run(hidden_states, previous, past_key_values, True)
    num_passes = num_ungraded + schedule.num_graded
    residual = relative_change(previous, key_values, owners) if needs_residual and num_passes > 1 else None
    return output, key_values, CycleReport(num_passes, residual)


def _without_gradient() -> AbstractContextManager[object]:
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


@torch.no_grad()
def relative_change(before: KeyValues, after: KeyValues, owners: tuple[int, ...]) -> torch.Tensor:
    """Distance between the KV of two passes over the size of the later, in the Frobenius norm: a scalar."""
    pairs = [pair for owner in owners for pair in zip(before[owner], after[owner], strict=True)]
    distance = torch.stack([(new.float() - old.float()).square().sum() for old, new in pairs]).sum()
    size = torch.stack([new.float().square().sum() for _, new in pairs]).sum()
    return (distance / size.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()


def owners_read_upward(plan: SharingPlan, segment: Segment) -> tuple[int, ...]:
    """The layers of a cycle that some layer below them reads, from the bottom."""
    readers = plan.layers[segment.start : segment.stop]
    return tuple(sorted({layer.kv_source for layer in readers if layer.is_upward}))


class CacheView:
    """What a pass before the last sees of a cache: `update` returns the same keys and values but keeps nothing."""

    def __init__(self, past_key_values: Cache) -> None:
        self._cache = past_key_values

    @classmethod
    def of(cls, past_key_values: Cache | None) -> CacheView | None:
        """A view of the cache, if there is one."""
        return None if past_key_values is None else cls(past_key_values)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> KeyValue:
        """Returns the cached keys and values of `layer_idx` followed by the given ones."""
        if isinstance(self._cache, SharingCache):
            keys, values = self._cache.peek((key_states, value_states), layer_idx)
            return keys, values
        if layer_idx >= len(self._cache.layers):
            return key_states, value_states
        layer = _copy_to_write(self._cache.layers[layer_idx])
        if layer.is_initialized and layer.keys.device != key_states.device:  # the cache is offloaded
            layer.keys, layer.values = layer.keys.to(key_states.device), layer.values.to(key_states.device)
        keys, values = layer.update(key_states, value_states)
        return keys, values


def _copy_to_write(layer: Any) -> Any:
    """A copy of a cache layer whose updates leave the original alone."""
    copied = copy.copy(layer)
    if isinstance(layer, DynamicLayer):
        return copied  # growing layers replace their tensors, static ones write into them
    copied.cumulative_length = layer.cumulative_length.clone()
    if layer.is_initialized:
        copied.keys, copied.values = layer.keys.clone(), layer.values.clone()
    return copied


def with_past(
    key_values: KeyValues, owners: tuple[int, ...], past_key_values: Cache, zeros: torch.Tensor
) -> KeyValues:
    """Adds, for `owners`, the cached keys and values of earlier tokens, with all-zero ones for the new tokens.

    Args:
        key_values: the KV so far; stays as it is.
        owners: the owners to add.
        past_key_values: the cache, which holds earlier tokens.
        zeros: `(batch, num_kv_heads, q_len, head_dim)`.
    """
    view = CacheView(past_key_values)
    return key_values | {owner: view.update(zeros, zeros, owner) for owner in owners}


def new_sequential_cache(num_hidden_layers: int) -> DynamicCache:
    """A cache that forgets nothing and lets gradients through, for running token by token."""
    cache = DynamicCache()
    cache.layers = [DynamicLayer() for _ in range(num_hidden_layers)]
    return cache
