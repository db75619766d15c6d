"""How many sequences fit into a budget of bytes."""

from __future__ import annotations

from collections.abc import Callable


def largest_batch(planned_bytes: Callable[[int], int], budget: int, limit: int) -> int:
    """The largest batch whose KV fit into the budget.

    Args:
        planned_bytes: from a batch size to bytes; grows with it.
        budget: in bytes.
        limit: the largest batch that is looked at.

    Returns:
        A number from 0, if not even one sequence fits, to `limit`.
    """
    fits, too_many = 0, limit + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if planned_bytes(middle) <= budget:
            fits = middle
        else:
            too_many = middle
    return fits
