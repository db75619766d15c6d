"""Which figures say how good a model is, how they are shown, and their means, spreads and tests over seeds."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy import stats

from lckv.errors import UserError, check_choice
from lckv.evaluation.results_file import scalar_figures

SIGNIFICANT = 0.05
_NO_SPREAD = 1e-12
_LABELS = {"bits_per_byte": "bits per byte", "perplexity": "perplexity", "loss": "validation loss (nats per token)"}
"""Figures that every finished run has in its results, as `eval_...`."""

_LOWER_IS_BETTER = re.compile(
    r"(^|[_,])(loss|perplexity|ppl|bits|nll|error|divergence|seconds|latency|bytes)([_,]|$)", re.IGNORECASE
)
_NOT_SHOWN = re.compile(r"_stderr([,.]|$)|(^|\.)(num_|chance_|context_length$|stride$)")
"""Standard errors, which the spread over seeds replaces, and what was asked for."""


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


def number(value: Any) -> Any:
    """A finite number as it is; anything else as `None`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return value


def scalar(value: Any) -> str | int | float | bool | None:
    """A value that can be compared as it is; anything else, which only damaged files hold, as text."""
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


@dataclass(frozen=True)
class Metric:
    """A figure that every run may have: one of the results, or `evaluation:figure`."""

    name: str

    @property
    def label(self) -> str:
        """What tables and axes call it."""
        return _LABELS.get(self.name) or self.name.replace(":", ": ", 1)

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value is the better one."""
        figure = re.split("[.:]", self.name)[-1]  # a task may be called after errors that are to be found
        return bool(_LOWER_IS_BETTER.search(figure))

    def cost(self, value: float) -> float:
        """The value, or minus it: what is smaller for a better one."""
        return value if self.lower_is_better else -value

    def show(self, value: float) -> str:
        """The value with as many digits as can matter."""
        return _show(value, value)

    def show_summary(self, summary: Summary) -> str:
        """Mean and standard deviation, in the same digits."""
        spread = "" if summary.std is None else f" ± {_show(summary.std, summary.mean)}"
        return self.show(summary.mean) + spread

    def show_difference(self, difference: float, scale: float) -> str:
        """A difference with its sign, in the digits of a value as large as `scale`."""
        return f"{'−' if difference < 0 else '+'}{_show(abs(difference), scale)}"


def _show(value: float, scale: float) -> str:
    """A value in the digits of one as large as `scale`."""
    if max(abs(value), abs(scale)) >= 1e6:  # of a run that has diverged
        return f"{value:.3g}"
    return f"{value:,.{4 if abs(scale) < 10 else 2}f}"


def metrics_of(results: Mapping[str, Any], evaluations: Mapping[str, Any]) -> dict[str, float]:
    """A run's figures by name: those of the results, then `harness:task.metric`, `recall:accuracy` and so on."""
    figures = {name: number(results.get(f"eval_{name}")) for name in _LABELS}
    for evaluation, values in evaluations.items():
        if evaluation == "needle":
            values = _means_of_maps(values)
        if evaluation == "harness" and isinstance(values, Mapping):
            values = values.get("tasks")
        if isinstance(values, Mapping):
            figures |= {
                f"{evaluation}:{name}": number(value)
                for name, value in scalar_figures(values, separator=".")
                if not _NOT_SHOWN.search(name)
            }
    return {name: value for name, value in figures.items() if value is not None}


def _means_of_maps(needle: Any) -> dict[str, float]:
    """The means of the maps that have a row for each depth."""
    figures = {}
    for name, rows in needle.items() if isinstance(needle, Mapping) else ():
        cells = (
            [number(cell) for row in rows if isinstance(row, list) for cell in row] if isinstance(rows, list) else []
        )
        if known := [cell for cell in cells if cell is not None]:
            figures[str(name)] = sum(known) / len(known)
    return figures


def evaluation_names(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """The figures of evaluations that at least one of the runs has."""
    return [name for name in dict.fromkeys(name for each in metrics for name in each) if ":" in name]


def choose_metric(name: str | None, metrics: Sequence[Mapping[str, float]]) -> Metric:
    """The metric of this name; without one, bits per byte, or perplexity where no run counts the bytes of its text.

    Args:
        name: as it was given.
        metrics: the figures of each finished run.

    Raises:
        UserError: if no run has it.
    """
    known = [each for each in _LABELS if any(each in figures for figures in metrics)] + evaluation_names(metrics)
    if name is None:
        return Metric(next(iter(known), "bits_per_byte"))
    if known and name not in known and name in _LABELS:
        raise UserError(f"metric={name}: no finished run has it; allowed are {', '.join(known)}")
    check_choice("metric", name, known or _LABELS)
    return Metric(name)
