"""The rule for who sees whom, in the form in which transformers builds masks from rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MaskFunction = Callable[..., Any]
"""Transformers' kind: `(batch_idx, head_idx, q_idx, kv_idx)`, with positions as indices, to whether the query sees."""


@dataclass(frozen=True)
class Geometry:
    """Where the keys and queries of layers of one kind lie.

    Attributes:
        kv_length: number of keys.
        kv_offset: position of the first.
        q_offset: position of the first query.
        key_positions: the position of each key, `(batch, kv_len)`, negative for empty slots; `None` where they are
            consecutive.
    """

    kv_length: int
    kv_offset: int
    q_offset: int | torch.Tensor
    key_positions: torch.Tensor | None = None


def build_rule(
    at: Geometry,
    hides_own_token: bool,
    window: int | None,
    padding: torch.Tensor | None,
    documents: torch.Tensor | None,
    allowed: torch.Tensor | None,
) -> MaskFunction:
    """Who sees whom: causality, the window, and what padding, documents and a 4D mask leave."""
    kv_offset, q_offset, key_positions = at.kv_offset, at.q_offset, at.key_positions

    def sees(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        index = kv_idx - kv_offset
        if key_positions is not None:
            kv_idx = key_positions[batch_idx, index]
        visible = kv_idx < q_idx if hides_own_token else kv_idx <= q_idx
        if key_positions is not None:
            visible, kv_idx = visible & (kv_idx >= 0), kv_idx.clamp(min=0)  # an empty slot has no token
        if window is not None:
            visible = visible & (kv_idx > q_idx - window)
        if padding is not None:
            visible = visible & padding[batch_idx, kv_idx]
        if documents is not None:
            visible = visible & (documents[batch_idx, q_idx] == documents[batch_idx, kv_idx])
        if allowed is not None:
            visible = visible & allowed[batch_idx, q_idx - q_offset, index]
        return visible

    return sees


def or_own_token(sees: MaskFunction, nothing: torch.Tensor, at: Geometry) -> MaskFunction:
    """The same rule, but queries that see `nothing`, `(batch, q_len)`, see their own token."""
    kv_offset, q_offset, key_positions = at.kv_offset, at.q_offset, at.key_positions

    def sees_something(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        position = kv_idx if key_positions is None else key_positions[batch_idx, kv_idx - kv_offset]
        own_token = nothing[batch_idx, q_idx - q_offset] & (position == q_idx)
        return sees(batch_idx, head_idx, q_idx, kv_idx) | own_token

    return sees_something
