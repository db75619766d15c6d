"""Which figures say how good a model is, and which of two values is the better one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lckv.errors import UserError, check_choice
from lckv.reporting.collecting import Run, number
from lckv.reporting.statistics import Summary

_OF_RESULTS = {
    "bits_per_byte": ("eval_bits_per_byte", "bits per byte"),
    "perplexity": ("eval_perplexity", "perplexity"),
    "loss": ("eval_loss", "loss (nats per token)"),
}
_LOWER_IS_BETTER = re.compile(
    r"(^|[_,])(loss|perplexity|ppl|bits|nll|error|divergence|seconds|latency|bytes)([_,]|$)", re.IGNORECASE
)
_NOT_SHOWN = re.compile(r"_stderr(,|$)|^num_|^context_length$|^stride$|^chance_")
"""Standard errors, which the spread over seeds replaces, and what was asked for."""


@dataclass(frozen=True)
class Metric:
    """A figure that every run may have.

    Attributes:
        name: what `metric=` calls it.
        label: what tables and axes call it.
        of: the figure of a run; `None` if it has none.
    """

    name: str
    label: str
    of: Callable[[Run], float | None]

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value is the better one."""
        figure = re.split("[.:]", self.name)[-1]  # a task may be called after errors that are to be found
        return bool(_LOWER_IS_BETTER.search(figure))

    def is_better(self, one: float, other: float) -> bool:
        """Whether `one` is better than `other`."""
        return one < other if self.lower_is_better else one > other

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


def result_metric(name: str) -> Metric:
    """One of the figures that every finished run has in its results."""
    key, label = _OF_RESULTS[name]
    return Metric(name, f"validation {label}" if name == "loss" else label, lambda run: run.figure(key))


def available_metrics(runs: Sequence[Run]) -> dict[str, Metric]:
    """All figures that at least one of the runs has, by name: those of the results, then `evaluation:figure`."""
    metrics = {name: result_metric(name) for name in _OF_RESULTS}
    metrics = {name: metric for name, metric in metrics.items() if any(metric.of(run) is not None for run in runs)}
    return metrics | evaluation_metrics(runs)


def evaluation_metrics(runs: Sequence[Run]) -> dict[str, Metric]:
    """The scalar figures of evaluations, by name: `harness:task.metric`, `recall:accuracy`, `needle:accuracy`."""
    names = dict.fromkeys(name for run in runs for name in evaluation_figures(run))
    return {name: Metric(name, name.replace(":", ": ", 1), _figure_getter(name)) for name in names}


def _figure_getter(name: str) -> Callable[[Run], float | None]:
    return lambda run: evaluation_figures(run).get(name)


def evaluation_figures(run: Run) -> dict[str, float]:
    """The scalar figures of a run's evaluations; of a needle's maps, the means."""
    figures: dict[str, float] = {}
    for evaluation, values in run.evaluations.items():
        if evaluation == "needle":
            values = _means_of_maps(values)
        if evaluation == "harness" and isinstance(values, Mapping):
            values = values.get("tasks")
        figures |= {f"{evaluation}:{key}": value for key, value in _scalars(values)}
    return figures


def _means_of_maps(needle: Any) -> dict[str, float]:
    """The means of the maps that have a row for each depth."""
    figures = {}
    for name, rows in needle.items() if isinstance(needle, Mapping) else ():
        cells = (
            [number(cell) for row in rows if isinstance(row, list) for cell in row] if isinstance(rows, list) else []
        )
        known = [cell for cell in cells if cell is not None]
        if known:
            figures[str(name)] = sum(known) / len(known)
    return figures


def _scalars(values: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if _NOT_SHOWN.search(str(key)):
            continue
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}.")
        elif (figure := number(value)) is not None:
            yield f"{prefix}{key}", figure


def choose_metric(name: str | None, runs: Sequence[Run]) -> Metric:
    """The metric of this name; without one, bits per byte, or perplexity where no run counts the bytes of its text.

    Raises:
        UserError: if no run has it.
    """
    metrics = available_metrics(runs)
    if name is None:
        return next(iter(metrics.values()), result_metric("bits_per_byte"))
    if not metrics:
        check_choice("metric", name, _OF_RESULTS)
        return result_metric(name)
    if name not in metrics and name in _OF_RESULTS:
        raise UserError(f"metric={name}: no finished run has it; allowed are {', '.join(metrics)}")
    check_choice("metric", name, metrics)
    return metrics[name]
