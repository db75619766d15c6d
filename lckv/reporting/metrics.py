"""Which figures say how good a model is, which of two values is the better one, and in how many digits it is shown."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lckv.errors import UserError, check_choice
from lckv.reporting.statistics import Summary

_LABELS = {"bits_per_byte": "bits per byte", "perplexity": "perplexity", "loss": "validation loss (nats per token)"}
"""Figures that every finished run has in its results, as `eval_...`."""

_LOWER_IS_BETTER = re.compile(
    r"(^|[_,])(loss|perplexity|ppl|bits|nll|error|divergence|seconds|latency|bytes)([_,]|$)", re.IGNORECASE
)
_NOT_SHOWN = re.compile(r"_stderr(,|$)|^num_|^context_length$|^stride$|^chance_")
"""Standard errors, which the spread over seeds replaces, and what was asked for."""


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
        figures |= {f"{evaluation}:{key}": value for key, value in _scalars(values)}
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


def _scalars(values: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if _NOT_SHOWN.search(str(key)):
            continue
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}.")
        elif (figure := number(value)) is not None:
            yield f"{prefix}{key}", figure


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
