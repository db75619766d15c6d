"""Quality against KV bytes per token."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import quantiles

import numpy
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator
from pandas import DataFrame
from textalloc import allocate

from lckv.reporting.analysis import Report, show_fraction
from lckv.reporting.grouping import Row
from lckv.reporting.metrics import Metric
from lckv.reporting.pictures.base import FONT_SIZE, GRID, MUTED, PAPER, HitTexts, Panel, Picture, Style, add_hits
from lckv.utils.charts import tidy

_SPACE_OF_A_TICK = 0.14
_MAX_LABELS = 10  # more than these cannot stand beside their points
_SPREAD = 0.5  # of the distance between two budgets


def draw_tradeoff(report: Report, styles: Mapping[str, Style]) -> Picture | None:
    """Every group's quality over its KV bytes, with the Pareto fronts; `None` if there are not two to compare."""
    candidates = [row for cohort in report.cohorts for row in cohort.candidates]
    if len(candidates) < 2:
        return None
    metric, label = report.metric, report.metric.label
    fronts = [cohort.front for cohort in report.cohorts if len(cohort.front) > 1]
    edge = _edge([row.quality.mean for row in candidates], metric)
    points = _lay_out(candidates, metric, edge)
    is_crowded = len(points) > _MAX_LABELS
    caption = f"{label[0].upper()}{label[1:]} against the KV bytes that each token adds; "
    caption += f"{'lower' if metric.lower_is_better else 'higher'} is better. "
    caption += "The dashed line joins the patterns that no other beats in both. " if fronts else ""
    caption += "Bars: standard deviation over seeds." if points["std"].any() else ""
    if is_crowded:
        caption += " Lines join the budgets of a family; points of the same bytes stand side by side."
    if points["is_beyond"].any():
        caption += " Open points lie beyond the frame, at the value beside them."
    draw = partial(_draw, points=points, fronts=fronts, metric=metric, styles=styles, edge=edge)
    panel = Panel("", (6.2, 3.6) if is_crowded else (3.6, 2.9), draw)
    legend = {name: styles[name] for name in sorted(points.index)} if is_crowded else {}
    return Picture("quality", "Quality against memory", caption.strip(), [panel], legend)


def _edge(values: Sequence[float], metric: Metric) -> float | None:
    """The value behind which points are outliers (Tukey's fences), where there are enough to tell."""
    if len(values) <= _MAX_LABELS:
        return None
    low, _, high = quantiles(values, n=4)
    return high + 1.5 * (high - low) if metric.lower_is_better else low - 1.5 * (high - low)


def _lay_out(candidates: Sequence[Row], metric: Metric, edge: float | None) -> DataFrame:
    """Where points stand, by label: at their bytes and quality or, in a crowd, nearby.

    Those that need the same bytes are spread a little, and those so much worse than the `edge` that they would press
    all others together stand there.
    """
    columns = ["label", "family_name", "set", "settings", "written", "fraction", "quality"]
    points = DataFrame(candidates)[columns].set_index("label").astype({"written": float, "fraction": float})
    points["mean"] = [quality.mean for quality in points["quality"]]
    points["std"] = [quality.std or 0.0 for quality in points["quality"]]
    points["is_beyond"] = [edge is not None and metric.cost(mean) > metric.cost(edge) for mean in points["mean"]]
    points["y"] = points["mean"].mask(points["is_beyond"], edge)
    gaps = numpy.diff(numpy.log(sorted(set(points["written"]))))
    width = _SPREAD * min(gaps, default=0.0) if len(points) > _MAX_LABELS else 0.0
    # Points of the same bytes form a column; in a crowd it is as wide as `width`, in logs, since the axis is.
    column = points.groupby("written")["written"]
    others = column.transform("size") - 1
    points["x"] = points["written"] * numpy.exp(width * (column.cumcount() / others - 0.5).where(others > 0, 0.0))
    return points


def _draw(
    axes: Axes,
    points: DataFrame,
    fronts: Sequence[Sequence[str]],
    metric: Metric,
    styles: Mapping[str, Style],
    edge: float | None,
) -> HitTexts:
    is_crowded = len(points) > _MAX_LABELS
    if is_crowded:
        settings = points["settings"].map(json.dumps)
        for _, family in points.sort_values("written", kind="stable").groupby(
            ["family_name", "set", settings], sort=False, dropna=False
        ):
            if len(family) > 1:
                color = styles[family.index[0]].color
                axes.plot(family["x"], family["y"], color=color, linewidth=0.9, alpha=0.55, zorder=2)
    for front in fronts:
        line = points.loc[front]
        axes.plot(line["x"], line["y"], color=MUTED, linestyle=(0, (4, 2)), linewidth=1, zorder=2)
    for point in points.itertuples():
        _draw_point(axes, point, styles[point.Index], metric)
    _set_scales(axes, points, metric)
    if edge is not None and points["is_beyond"].any():  # leaves room for what is written there
        room = 0.16 * (points["y"].max() - points["y"].min())
        axes.set_ylim(**({"top": edge + room} if metric.lower_is_better else {"bottom": edge - room}))
    if not is_crowded:
        lines = [list(zip(line["x"], line["y"], strict=True)) for line in (points.loc[front] for front in fronts)]
        bars = [[(point.x, point.y - point.std), (point.x, point.y + point.std)] for point in points.itertuples()]
        _write_labels(axes, points, styles, lines + bars)
    texts = [_hit_text(point, metric) for point in points.itertuples()]
    places = list(zip(points["x"], points["y"], strict=True))
    return add_hits(axes, "hits-quality", places, texts, size=10 if is_crowded else 16)


def _draw_point(axes: Axes, point: Row, style: Style, metric: Metric) -> None:
    axes.errorbar(
        point.x, point.y, yerr=None if point.is_beyond else point.std or None, fmt=style.marker, color=style.color,
        markersize=6.5, markerfacecolor=PAPER if point.is_beyond else style.color, elinewidth=1.1, capsize=2.2,
        markeredgewidth=0.9 if point.is_beyond else 0.6, markeredgecolor=style.color if point.is_beyond else PAPER,
        zorder=3,
    )  # fmt: skip
    if point.is_beyond:
        axes.annotate(
            metric.show(point.mean), (point.x, point.y), (0, 6), textcoords="offset points", ha="center", va="bottom",
            fontsize=6, rotation=60,
        )  # fmt: skip


def _write_labels(
    axes: Axes, points: DataFrame, styles: Mapping[str, Style], lines: Sequence[Sequence[tuple[float, float]]]
) -> None:
    """Writes names beside their points, where they hide neither these nor the `lines`."""
    points = points.sort_values("y", ascending=False, kind="stable")
    limits = axes.get_xlim(), axes.get_ylim()
    x, y = list(points["x"]), list(points["y"])
    x_lines, y_lines = ([[point[side] for point in line] for line in lines] for side in (0, 1))
    _, _, texts, _ = allocate(
        axes, x, y, list(points.index), x_scatter=x, y_scatter=y, x_lines=x_lines, y_lines=y_lines,
        textsize=FONT_SIZE, textcolor=[styles[label].color for label in points.index], linecolor=MUTED, linewidth=0.5,
        min_distance=0.025, max_distance=1.0, margin=0.006, nbr_candidates=2000,
    )  # fmt: skip
    axes.set(xlim=limits[0], ylim=limits[1])
    for text in texts:
        text.set_in_layout(False)  # else the axes would move once more


def _hit_text(point: Row, metric: Metric) -> str:
    """What is shown where one points at a group."""
    quality = f"{metric.label}: {metric.show_summary(point.quality)} (n = {point.quality.n})"
    bytes_per_token = f"{point.written:,.0f} bytes per token, {show_fraction(point.fraction)} of Llama's"
    return f"{point.Index}\n{quality}\nKV: {bytes_per_token}"


def _set_scales(axes: Axes, points: DataFrame, metric: Metric) -> None:
    tidy(axes, color=GRID)
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.12)
    ticks = _ticks(dict(zip(points["written"], points["fraction"], strict=True)))
    shows_fraction = (points["written"] / points["fraction"]).round().nunique() == 1
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(
        [f"{tick:,.0f}" + (f"\n{show_fraction(part)}" if shows_fraction else "") for tick, part in ticks.items()]
    )
    axes.set_xlabel("KV bytes per token (log scale)" + ("; below, of Llama's" if shows_fraction else ""))
    axes.set_ylabel(metric.label)


def _ticks(fractions: Mapping[float, float]) -> dict[float, float]:
    """The bytes that patterns need, as far as their numbers do not run into each other."""
    ordered = sorted(fractions)
    width = math.log(ordered[-1] / ordered[0]) or 1.0
    ticks = [ordered[-1]]
    for value in reversed(ordered):
        if math.log(ticks[-1] / value) > _SPACE_OF_A_TICK * width:
            ticks.append(value)
    return {tick: fractions[tick] for tick in ticks}
