"""The patterns that no other beats in both memory and quality."""

from __future__ import annotations

from collections.abc import Sequence

from lckv.reporting.budgets import Candidate
from lckv.reporting.metrics import Metric


def pareto_front(candidates: Sequence[Candidate], metric: Metric) -> list[Candidate]:
    """Those that are better than all that need as few bytes or fewer, from few bytes to many."""
    sign = 1 if metric.lower_is_better else -1
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda each: (each.written, sign * each.quality.mean)):
        if not front or metric.is_better(candidate.quality.mean, front[-1].quality.mean):
            front.append(candidate)
    return front
