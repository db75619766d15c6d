"""Rows of different lengths in one tensor: padding on the left, and positions that do not count it."""

from __future__ import annotations

import torch


def pad_left(
    rows: list[list[int]], pad_token_id: int, num_columns: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pads rows of tokens on the left.

    Args:
        rows: one or more tokens each.
        pad_token_id: what stands before them.
        num_columns: how long all become; by default as long as the longest.

    Returns:
        `(batch, q_len)` tokens, and the mask of the same shape with zeros at padding; `None` if there is no padding.
    """
    width = max(map(len, rows)) if num_columns is None else num_columns
    padded = [[pad_token_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    is_padded = any(len(row) < width for row in rows)
    return torch.tensor(padded), torch.tensor(mask) if is_padded else None


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Each token's position among the real tokens of its row, `(batch, kv_len)`; 0 for padding before them."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def count_padding(attention_mask: torch.Tensor) -> list[int]:
    """How many zeros each row of `(batch, kv_len)` begins with."""
    return (attention_mask.bool().cumsum(dim=1) == 0).sum(dim=1).tolist()
