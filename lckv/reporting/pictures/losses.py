"""Loss curves, against what was seen, what was computed and what was waited for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter
from pandas import DataFrame, concat

from lckv.reporting.analysis import Report
from lckv.reporting.metrics import number
from lckv.reporting.pictures.base import GRID, MUTED, PAPER, HitTexts, Panel, Picture, Style, add_hits
from lckv.reporting.runs import first_known
from lckv.utils.charts import tidy

_SIZE = (2.9, 2.5)
_WARM_UP = 0.12
_UNFINISHED = Style(MUTED, "o", (0, (1.6, 1.2)))
_DURATIONS = ((3 * 86400, 86400, "days"), (3 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))
KINDS = ("training", "validation")


def curves_of(runs: DataFrame) -> DataFrame:
    """The mean curves of the runs of a group.

    Returns:
        A row for each step that all seeds have logged, with its `kind` ("training": the loss with the text that is
        trained on, "validation": with held-out text), `tokens`, `loss` in nats per token, `seconds` since the start,
        and `flops` spent so far; NaN is what was not logged or is not known.
    """
    # With a teacher, what is minimised is another loss than that of the labels. Evaluations do not log the time;
    # training does, in the same step.
    training = [_curve(lines, "loss", "loss_labels") for lines in runs["lines"]]
    validation = [_curve(lines, "eval_loss") for lines in runs["lines"]]
    validation = [curve.assign(seconds=seen["seconds"]) for curve, seen in zip(validation, training, strict=True)]
    # Where a seed has no such step, the sum is NaN.
    means = [(sum(curves) / len(curves)).sort_index() for curves in (training, validation)]
    curves = concat([mean.assign(kind=kind) for kind, mean in zip(KINDS, means, strict=True)])
    flops = first_known([*runs["train_flops_per_token"], math.nan])
    return curves.dropna(subset=["tokens", "loss"]).assign(flops=lambda curve: flops * curve["tokens"])


def _curve(lines: Iterable[Mapping[str, Any]], name: str, preferred: str = "") -> DataFrame:
    """The loss called `name`, or the `preferred` one beside it, by step; of two lines for a step, the last one's."""
    rows = {}
    for line in lines:
        if number(line.get(name)) is not None and number(line.get("step")) is not None:
            figures = line.get("tokens"), line.get(preferred, line[name]), line.get("seconds")
            rows[line["step"]] = [number(figure) for figure in figures]
    return DataFrame.from_dict(rows, orient="index", columns=["tokens", "loss", "seconds"], dtype=float)


Line = tuple[str, DataFrame, Style]
"""A name, what `curves_of` says, and how it is drawn."""


def draw_losses(report: Report, styles: Mapping[str, Style]) -> Picture | None:
    """Training and validation loss against tokens, FLOPs and time, of runs that failed or still go on too.

    `None` without any curve.
    """
    finished = [(row.label, curves_of(row.runs), styles[row.label]) for row in report.rows]
    unfinished = [
        (f"{run.name} (no result)", curves_of(report.runs.loc[[run.Index]]), _UNFINISHED) for run in report.troubles
    ]
    finished, unfinished = ([line for line in lines if len(line[1])] for lines in (finished, unfinished))
    lines = finished + unfinished
    if not lines:
        return None
    curves = concat(curves for _, curves, _ in lines)
    longest = curves["seconds"].max()  # NaN where none is known
    _, unit, name = next((each for each in _DURATIONS if longest >= each[0]), _DURATIONS[-1])
    abscissas = [
        ("tokens", "tokens", 1, "training tokens"),
        ("FLOPs", "flops", 1, "training FLOPs"),
        ("wall time", "seconds", unit, f"wall time ({name})"),
    ]
    top = _top(concat(curves for _, curves, _ in finished or unfinished))
    panels = [
        Panel(f"against {title}", _SIZE, partial(_draw, lines=lines, column=column, unit=unit, label=label, top=top))
        for title, column, unit, label in abscissas
        if curves[column].notna().any()
    ]
    caption = "Validation loss (markers) and training loss (thin lines) in nats per token, means over seeds."
    legend = {name: style for name, _, style in finished}
    if unfinished:
        legend["no result"] = _UNFINISHED
        caption += " Grey: runs that failed, or have not ended yet."
    return Picture("loss", "Loss curves", caption, panels, legend)


def _draw(axes: Axes, lines: Sequence[Line], column: str, unit: float, label: str, top: float | None) -> HitTexts:
    texts: HitTexts = {}
    for place, (name, curves, style) in enumerate(lines):
        curves = curves.assign(x=curves[column] / unit).dropna(subset=["x"])
        training, validation = (curves[curves["kind"] == kind] for kind in KINDS)
        if len(training):
            axes.plot(training["x"], training["loss"], color=style.color, linewidth=0.6, alpha=0.35, zorder=2)
        if len(validation):
            axes.plot(
                validation["x"], validation["loss"], color=style.color, linestyle=style.dashes, linewidth=1.2,
                zorder=3, marker=style.marker, markersize=3.8, markeredgecolor=PAPER, markeredgewidth=0.4,
            )  # fmt: skip
            points = list(zip(validation["x"], validation["loss"], strict=True))
            told = [f"{name}\n{label}: {_short(x)}\nvalidation loss: {loss:.4f}" for x, loss in points]
            texts |= add_hits(axes, f"hits-loss-{place}", points, told, size=9)
    axes.set(xlabel=label, ylabel="loss (nats per token)")
    if column != "seconds":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_ylim(top=top)
    tidy(axes, color=GRID)
    return texts


def _top(curves: DataFrame) -> float | None:
    """The highest loss after the first steps, which would press all others together."""
    training = curves[curves["kind"] == "training"]
    late = training[training["tokens"] >= _WARM_UP * training["tokens"].max()]["loss"]
    low, high = min(late.min(), *curves[curves["kind"] == "validation"]["loss"]), late.max()
    return high + 0.04 * (high - low) if high > low else None


def _short(value: float) -> str:
    """Four digits, with a unit where there are more before the point."""
    return f"{value:.4g}" if abs(value) < 1e4 else EngFormatter(sep="")(float(f"{value:.4g}"))
