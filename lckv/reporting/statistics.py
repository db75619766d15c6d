"""Means, spreads and tests over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy import stats

SIGNIFICANT = 0.05
_NO_SPREAD = 1e-12


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1; `None` of one value) of `n` values, one for each seed."""

    mean: float
    std: float | None
    n: int


def summarize(values: Iterable[float | None]) -> Summary | None:
    """Mean, sample standard deviation and number of the values that are known; `None` of none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Summary(mean, None, 1)
    # Not the sum of squares: those of runs that have diverged are beyond a float.
    std = math.hypot(*(value - mean for value in known)) / math.sqrt(len(known) - 1)
    return Summary(mean, std, len(known))


@dataclass(frozen=True)
class Comparison:
    """The difference of two groups' means, and how likely chance alone makes one so large.

    Attributes:
        difference: the first group's mean minus the second's.
        test: its name, or why there is none.
        p: of the test, two-sided; `None` without one.
        adjusted_p: after Holm, among all tests of the same kind.
    """

    difference: float
    test: str
    p: float | None = None
    adjusted_p: float | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the difference is more than the noise of the seeds."""
        return self.adjusted_p is not None and self.adjusted_p < SIGNIFICANT


def compare(one: Mapping[Any, float], other: Mapping[Any, float]) -> Comparison:
    """Tests two groups of values by seed: paired where both have the same seeds, else Welch's."""
    difference = math.fsum(one.values()) / len(one) - math.fsum(other.values()) / len(other)
    if min(len(one), len(other)) < 2:
        return Comparison(difference, "one seed: no test")
    is_paired = one.keys() == other.keys()
    if _has_no_spread(one, other, is_paired):
        return Comparison(difference, "no spread: no test")
    if is_paired:
        result = stats.ttest_rel(list(one.values()), [other[seed] for seed in one])
        return Comparison(difference, "paired t-test", float(result.pvalue))
    result = stats.ttest_ind(list(one.values()), list(other.values()), equal_var=False)
    return Comparison(difference, "Welch's t-test", float(result.pvalue))


def _has_no_spread(one: Mapping[Any, float], other: Mapping[Any, float], is_paired: bool) -> bool:
    """Whether seeds change nothing that the test looks at, which makes its statistic infinite or undefined."""
    columns = [[one[seed] - other[seed] for seed in one]] if is_paired else [[*one.values()], [*other.values()]]
    scale = max(map(abs, (*one.values(), *other.values())))
    return all(max(column) - min(column) <= _NO_SPREAD * scale for column in columns)


def adjust(comparisons: Sequence[Any]) -> list[Any]:
    """The comparisons, `None` among them, with their p-values adjusted among each other, after Holm.

    The chance of any false alarm among them stays below the level.
    """
    p_values = {place: each.p for place, each in enumerate(comparisons) if each is not None and each.p is not None}
    adjusted, largest = list(comparisons), 0.0
    for rank, place in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = replace(comparisons[place], adjusted_p=largest)
    return adjusted
