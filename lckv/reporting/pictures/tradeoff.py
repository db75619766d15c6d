"""Quality against KV bytes per token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import quantiles

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from lckv.reporting.analysis import Report
from lckv.reporting.budgets import Candidate, show_fraction
from lckv.reporting.metrics import Metric
from lckv.reporting.pictures.base import HitTexts, Panel, Picture, add_hits
from lckv.reporting.pictures.labels import Label, place_labels
from lckv.reporting.pictures.style import MUTED, PAPER, Style, tidy

_SPACE_OF_A_TICK = 0.14
_STEPS = 12
_MAX_LABELS = 10  # more than these cannot stand beside their points
_SPREAD = 0.5  # of the distance between two budgets


def draw_tradeoff(report: Report, styles: Mapping[str, Style]) -> Picture | None:
    """Every group's quality over its KV bytes, with the Pareto fronts; `None` if there are not two to compare."""
    candidates = [candidate for cohort in report.cohorts for candidate in cohort.candidates]
    if len(candidates) < 2:
        return None
    direction = "lower" if report.metric.lower_is_better else "higher"
    fronts = [cohort.front for cohort in report.cohorts if len(cohort.front) > 1]
    label = report.metric.label
    caption = f"{label[0].upper()}{label[1:]} against the KV bytes that each token adds; {direction} is better. "
    caption += "The dashed line joins the patterns that no other beats in both. " if fronts else ""
    caption += "Bars: standard deviation over seeds." if any(each.quality.std for each in candidates) else ""
    names = [candidate.group.label for candidate in candidates]
    is_crowded = len(names) > _MAX_LABELS
    layout = _lay_out(candidates, report.metric)
    if is_crowded:
        caption += " Lines join the budgets of a family; points of the same bytes stand side by side."
    if layout.beyond:
        caption += " Open points lie beyond the frame, at the value beside them."
    size = (6.2, 3.6) if is_crowded else (3.6, 2.9)
    panel = Panel("", size, lambda axes: _draw(axes, candidates, fronts, report.metric, styles, layout))
    legend = {name: styles[name] for name in sorted(names)} if is_crowded else {}
    return Picture("quality", "Quality against memory", caption.strip(), [panel], legend)


@dataclass(frozen=True)
class _Layout:
    """Where points stand.

    Attributes:
        points: bytes and quality as drawn, by label.
        beyond: labels of those whose quality is so much worse that it would press all others together.
        edge: where these are drawn; `None` without any.
    """

    points: Mapping[str, tuple[float, float]]
    beyond: frozenset[str]
    edge: float | None

    def coordinates(self, candidates: Sequence[Candidate]) -> tuple[list[float], list[float]]:
        places = [self.points[each.group.label] for each in candidates]
        return [x for x, _ in places], [y for _, y in places]


def _lay_out(candidates: Sequence[Candidate], metric: Metric) -> _Layout:
    edge = _edge([candidate.quality.mean for candidate in candidates], metric)
    beyond = {
        each.group.label: edge for each in candidates if edge is not None and metric.is_better(edge, each.quality.mean)
    }
    columns = _side_by_side(candidates)
    points = {
        each.group.label: (columns[each.group.label], beyond.get(each.group.label, each.quality.mean))
        for each in candidates
    }
    return _Layout(points, frozenset(beyond), edge if beyond else None)


def _edge(values: Sequence[float], metric: Metric) -> float | None:
    """The value behind which points are outliers (Tukey's fences), where there are enough to tell."""
    if len(values) <= _MAX_LABELS:
        return None
    low, _, high = quantiles(values, n=4)
    return high + 1.5 * (high - low) if metric.lower_is_better else low - 1.5 * (high - low)


def _side_by_side(candidates: Sequence[Candidate]) -> dict[str, float]:
    """Bytes as drawn: those of many groups that need the same are spread a little."""
    columns: dict[float, list[str]] = {}
    for candidate in candidates:
        columns.setdefault(candidate.written, []).append(candidate.group.label)
    gaps = [math.log(other / one) for one, other in pairwise(sorted(columns))]
    width = _SPREAD * min(gaps, default=0.0) if len(candidates) > _MAX_LABELS else 0.0
    return {
        label: written * math.exp(width * (place / (len(labels) - 1) - 0.5)) if len(labels) > 1 else written
        for written, labels in columns.items()
        for place, label in enumerate(labels)
    }


def _families(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """The groups of each family that was tried at several budgets, in the order of their bytes."""
    if len(candidates) <= _MAX_LABELS:
        return []
    families: dict[tuple[str | None, object], list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda each: each.written):
        key = (candidate.group.family_name, (candidate.group.cohort, tuple(candidate.group.settings.items())))
        families.setdefault(key, []).append(candidate)
    return [family for family in families.values() if len(family) > 1]


def _draw(
    axes: Axes,
    candidates: Sequence[Candidate],
    fronts: Sequence[Sequence[Candidate]],
    metric: Metric,
    styles: Mapping[str, Style],
    layout: _Layout,
) -> HitTexts:
    for family in _families(candidates):
        color = styles[family[0].group.label].color
        axes.plot(*layout.coordinates(family), color=color, linewidth=0.9, alpha=0.55, zorder=2)
    for front in fronts:
        axes.plot(*layout.coordinates(front), color=MUTED, linestyle=(0, (4, 2)), linewidth=1, zorder=2)
    for candidate in candidates:
        _draw_point(axes, candidate, styles[candidate.group.label], layout, metric)
    _set_scales(axes, candidates, metric)
    _set_edge(axes, layout, metric)
    points = list(zip(*layout.coordinates(candidates), strict=True))
    names = [candidate.group.label for candidate in candidates] if len(candidates) <= _MAX_LABELS else []
    labels = [Label(name, point, styles[name].color) for name, point in zip(names, points, strict=False)]
    place_labels(axes, labels, [*_along_fronts(fronts), *_along_bars(candidates)])
    add_hits(axes, "hits-quality", points, size=16 if len(candidates) <= _MAX_LABELS else 10)
    return {"hits-quality": [hit_text(candidate, metric) for candidate in candidates]}


def _draw_point(axes: Axes, candidate: Candidate, style: Style, layout: _Layout, metric: Metric) -> None:
    place = layout.points[candidate.group.label]
    is_beyond = candidate.group.label in layout.beyond
    axes.errorbar(
        *place, yerr=None if is_beyond else candidate.quality.std or None, fmt=style.marker, color=style.color,
        markersize=6.5, markerfacecolor=PAPER if is_beyond else style.color, markeredgewidth=0.9 if is_beyond else 0.6,
        markeredgecolor=style.color if is_beyond else PAPER, elinewidth=1.1, capsize=2.2, zorder=3,
    )  # fmt: skip
    if is_beyond:
        text = metric.show(candidate.quality.mean)
        axes.annotate(
            text, place, (0, 6), textcoords="offset points", ha="center", va="bottom", fontsize=6, rotation=60
        )


def _set_edge(axes: Axes, layout: _Layout, metric: Metric) -> None:
    """Leaves room for what is written at the points on the edge."""
    if layout.edge is not None:
        values = [value for _, value in layout.points.values()]
        room = 0.16 * (max(values) - min(values))
        if metric.lower_is_better:
            axes.set_ylim(top=layout.edge + room)
        else:
            axes.set_ylim(bottom=layout.edge - room)


def _along_fronts(fronts: Sequence[Sequence[Candidate]]) -> Iterator[tuple[float, float]]:
    """Places on the lines, which are straight where the bytes are logarithmic."""
    for one, other in (pair for front in fronts for pair in pairwise(front)):
        for part in range(1, _STEPS):
            way = part / _STEPS
            level = one.quality.mean + way * (other.quality.mean - one.quality.mean)
            yield one.written * (other.written / one.written) ** way, level


def _along_bars(candidates: Sequence[Candidate]) -> Iterator[tuple[float, float]]:
    for candidate in candidates:
        for part in range(-_STEPS, _STEPS + 1):
            spread = candidate.quality.std or 0.0
            yield candidate.written, candidate.quality.mean + spread * part / _STEPS


def hit_text(candidate: Candidate, metric: Metric) -> str:
    """What is shown where one points at a group."""
    quality = f"{metric.label}: {metric.show_summary(candidate.quality)} (n = {candidate.quality.n})"
    return (
        f"{candidate.group.label}\n{quality}\n"
        f"KV: {candidate.written:,.0f} bytes per token, {show_fraction(candidate.fraction)} of Llama's"
    )


def _set_scales(axes: Axes, candidates: Sequence[Candidate], metric: Metric) -> None:
    tidy(axes)
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.12)
    bytes_of_llama = {candidate.written / candidate.fraction for candidate in candidates}
    ticks = _ticks({candidate.written: candidate.fraction for candidate in candidates})
    shows_fraction = len({round(each) for each in bytes_of_llama}) == 1
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(
        [f"{tick:,.0f}" + (f"\n{show_fraction(part)}" if shows_fraction else "") for tick, part in ticks.items()]
    )
    axes.set_xlabel("KV bytes per token (log scale)" + ("; below, of Llama's" if shows_fraction else ""))
    axes.set_ylabel(metric.label)


def _ticks(values: Mapping[float, float]) -> dict[float, float]:
    """The bytes that patterns need, as far as their numbers do not run into each other."""
    ordered = sorted(values)
    width = math.log(ordered[-1] / ordered[0]) or 1.0
    ticks = [ordered[-1]]
    for value in reversed(ordered):
        if math.log(ticks[-1] / value) > _SPACE_OF_A_TICK * width:
            ticks.append(value)
    return {tick: values[tick] for tick in ticks}
