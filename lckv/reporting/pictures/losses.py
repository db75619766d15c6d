"""Loss curves, against what was seen, what was computed and what was waited for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter
from pandas import DataFrame, concat

from lckv.reporting.analysis import Report
from lckv.reporting.metrics import number
from lckv.reporting.pictures.base import HitTexts, Panel, Picture, add_hits
from lckv.reporting.pictures.style import MUTED, PAPER, Style, tidy
from lckv.reporting.runs import first_known

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


class _Line(NamedTuple):
    name: str
    curves: DataFrame
    style: Style


class _Abscissa(NamedTuple):
    column: str
    unit: float
    label: str


def draw_losses(report: Report, styles: Mapping[str, Style]) -> Picture | None:
    """Training and validation loss against tokens, FLOPs and time, of runs that failed or still go on too.

    `None` without any curve.
    """
    finished = [_Line(row.label, curves_of(row.runs), styles[row.label]) for row in report.rows]
    unfinished = [
        _Line(f"{run.name} (no result)", curves_of(report.runs.loc[[run.Index]]), _UNFINISHED)
        for run in report.troubles
    ]
    finished, unfinished = ([line for line in lines if len(line.curves)] for lines in (finished, unfinished))
    lines = finished + unfinished
    if not lines:
        return None
    longest = max((0.0, *(second for line in lines for second in line.curves["seconds"].dropna())))
    _, unit, name = next(duration for duration in _DURATIONS if longest >= duration[0])
    abscissas = {
        "tokens": _Abscissa("tokens", 1, "training tokens"),
        "FLOPs": _Abscissa("flops", 1, "training FLOPs"),
        "wall time": _Abscissa("seconds", unit, f"wall time ({name})"),
    }
    top = _top(concat(line.curves for line in finished or unfinished))
    panels = [
        Panel(f"against {title}", _SIZE, partial(_draw, lines=lines, by=by, top=top))
        for title, by in abscissas.items()
        if any(line.curves[by.column].notna().any() for line in lines)
    ]
    caption = "Validation loss (markers) and training loss (thin lines) in nats per token, means over seeds."
    legend = {line.name: line.style for line in finished}
    if unfinished:
        legend["no result"] = _UNFINISHED
        caption += " Grey: runs that failed, or have not ended yet."
    return Picture("loss", "Loss curves", caption, panels, legend)


def _draw(axes: Axes, lines: Sequence[_Line], by: _Abscissa, top: float | None) -> HitTexts:
    texts: HitTexts = {}
    for place, line in enumerate(lines):
        curves = line.curves.assign(x=line.curves[by.column] / by.unit).dropna(subset=["x"])
        training, validation = (curves[curves["kind"] == kind] for kind in KINDS)
        color, dashes = line.style.color, line.style.dashes
        if len(training):
            axes.plot(training["x"], training["loss"], color=color, linewidth=0.6, alpha=0.35, zorder=2)
        if len(validation):
            axes.plot(
                validation["x"], validation["loss"], color=color, linestyle=dashes, linewidth=1.2, zorder=3,
                marker=line.style.marker, markersize=3.8, markeredgecolor=PAPER, markeredgewidth=0.4,
            )  # fmt: skip
            points = list(zip(validation["x"], validation["loss"], strict=True))
            gid = f"hits-loss-{place}"
            add_hits(axes, gid, points, size=9)
            texts[gid] = [f"{line.name}\n{by.label}: {_short(x)}\nvalidation loss: {loss:.4f}" for x, loss in points]
    axes.set_xlabel(by.label)
    axes.set_ylabel("loss (nats per token)")
    if by.column != "seconds":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_ylim(top=top)
    tidy(axes)
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
