"""Quality against KV bytes per token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

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
    panel = Panel("", (3.6, 2.9), lambda axes: _draw(axes, candidates, fronts, report.metric, styles))
    names = [candidate.group.label for candidate in candidates]
    legend = {name: styles[name] for name in names} if len(names) > _MAX_LABELS else {}
    return Picture("quality", "Quality against memory", caption.strip(), [panel], legend)


def _draw(
    axes: Axes,
    candidates: Sequence[Candidate],
    fronts: Sequence[Sequence[Candidate]],
    metric: Metric,
    styles: Mapping[str, Style],
) -> HitTexts:
    for front in fronts:
        axes.plot(*_coordinates(front), color=MUTED, linestyle=(0, (4, 2)), linewidth=1, zorder=2)
    for candidate in candidates:
        style = styles[candidate.group.label]
        axes.errorbar(
            candidate.written, candidate.quality.mean, yerr=candidate.quality.std or None, fmt=style.marker,
            color=style.color, markersize=6.5, markeredgecolor=PAPER, markeredgewidth=0.6, elinewidth=1.1, capsize=2.2,
            zorder=3,
        )  # fmt: skip
    _set_scales(axes, candidates, metric)
    points = list(zip(*_coordinates(candidates), strict=True))
    names = [candidate.group.label for candidate in candidates] if len(candidates) <= _MAX_LABELS else []
    labels = [Label(name, point, styles[name].color) for name, point in zip(names, points, strict=False)]
    place_labels(axes, labels, [*_along_fronts(fronts), *_along_bars(candidates)])
    add_hits(axes, "hits-quality", points, size=16)
    return {"hits-quality": [hit_text(candidate, metric) for candidate in candidates]}


def _coordinates(candidates: Sequence[Candidate]) -> tuple[list[float], list[float]]:
    return [each.written for each in candidates], [each.quality.mean for each in candidates]


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
