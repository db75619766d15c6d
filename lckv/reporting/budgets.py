"""KV budgets that the runs themselves suggest, and who is best in each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from lckv.reporting.grouping import Group
from lckv.reporting.metrics import Metric
from lckv.reporting.statistics import Summary, summarize

_MAX_BUDGETS = 6
_TOLERANCE = 1e-9
_MAX_DENOMINATOR = 64


@dataclass(frozen=True)
class Candidate:
    """A group that has both a quality and a number of KV bytes.

    Attributes:
        group: the runs.
        written: KV bytes per token.
        fraction: of Llama's.
        quality: the metric over its seeds.
    """

    group: Group
    written: float
    fraction: float
    quality: Summary


def candidates_of(groups: Iterable[Group], metric: Metric) -> list[Candidate]:
    """The groups that can be compared by memory and quality."""
    candidates = []
    for group in groups:
        quality = summarize(group.values(metric).values())
        if quality is not None and group.written is not None and group.fraction is not None:
            candidates.append(Candidate(group, group.written, group.fraction, quality))
    return candidates


def budgets_of(candidates: Sequence[Candidate]) -> list[float]:
    """Fractions of Llama's bytes, from large to small: those that patterns need, or where these are many, halves."""
    needed = sorted({round(candidate.fraction, 9) for candidate in candidates}, reverse=True)
    if len(needed) <= _MAX_BUDGETS:
        return needed
    halves = [needed[0], *(0.5**power for power in range(1, 16) if needed[-1] < 0.5**power < needed[0]), needed[-1]]
    return [budget for place, budget in enumerate(halves) if place == 0 or _between(needed, budget, halves[place - 1])]


def _between(needed: Iterable[float], low: float, high: float) -> bool:
    """Whether the lower of two budgets shuts anybody out."""
    return any(low < fraction <= high for fraction in needed)


def within(candidates: Iterable[Candidate], budget: float) -> list[Candidate]:
    """Those that need no more than the budget."""
    return [candidate for candidate in candidates if candidate.fraction <= budget + _TOLERANCE]


def ranked(candidates: Iterable[Candidate], metric: Metric) -> list[Candidate]:
    """The best first; of equals, the one that needs less."""
    sign = 1 if metric.lower_is_better else -1
    return sorted(candidates, key=lambda each: (sign * each.quality.mean, each.written))


def budget_of(candidate: Candidate, budgets: Sequence[float]) -> float:
    """The smallest budget that a candidate keeps to."""
    return min(budget for budget in budgets if candidate.fraction <= budget + _TOLERANCE)


def show_fraction(fraction: float) -> str:
    """3/8 where it is one, else percent."""
    nearest = Fraction(fraction).limit_denominator(_MAX_DENOMINATOR)
    return str(nearest) if abs(nearest - fraction) < 1e-6 else f"{fraction:.3g}"
