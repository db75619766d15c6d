"""Samples of the cases of a test, in the place of all of them."""

from collections.abc import Sequence
from typing import Any


def pairwise(first: Sequence[Any], second: Sequence[Any], third: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    """All pairs of values, not all triples: of `third`, the shortest list, each pair of the others gets the next."""
    assert len(third) <= min(len(first), len(second))
    return [
        (one, other, third[(row + column) % len(third)])
        for row, one in enumerate(first)
        for column, other in enumerate(second)
    ]
