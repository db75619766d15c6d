"""What training costs, relative to Llama."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from lckv.reporting.analysis import Report
from lckv.reporting.grouping import Row
from lckv.reporting.pictures.base import GRID, INK, MUTED, PAPER, HitTexts, Panel, Picture, Style, add_hits
from lckv.utils.charts import tidy


def draw_costs(report: Report, styles: Mapping[str, Style]) -> Picture | None:
    """Bars of FLOPs and of measured time per training token; `None` if there is nothing but Llama."""
    rows = [row for row in report.rows if row.flops_ratio is not None]
    if len(rows) < 2:
        return None
    is_timed = any(row.time_ratio is not None for row in rows)
    height = 0.75 + (0.34 if is_timed else 0.24) * len(rows)
    caption = "FLOPs of training on one token, relative to Llama, iterations counted."
    if is_timed:
        caption += " Hatched: measured time, where both ran alike; other load on the machine falls into it."
    width = 2.4 + 0.06 * max(len(row.label) for row in rows)
    panel = Panel("", (width, height), lambda axes: _draw(axes, rows, styles, is_timed))
    return Picture("cost", "Training cost relative to Llama", caption, [panel], {})


def _draw(axes: Axes, rows: Sequence[Row], styles: Mapping[str, Style], is_timed: bool) -> HitTexts:
    thickness = 0.38 if is_timed else 0.7
    shift = thickness / 2 if is_timed else 0
    for place, row in enumerate(rows):
        color = styles[row.label].color
        _bar(axes, place - shift, row.flops_ratio, thickness, color=color)
        if row.time_ratio is not None:
            _bar(axes, place + shift, row.time_ratio, thickness, color=color, hatch="/////", alpha=0.75)
    axes.axvline(1, color=INK, linewidth=0.8, zorder=4)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("training cost per token (Llama = 1)")
    axes.set_xlim(0, 1.13 * max(max(row.flops_ratio, row.time_ratio or 0) for row in rows))
    axes.tick_params(axis="y", length=0)
    tidy(axes, "x", GRID)
    if is_timed:
        time = Patch(facecolor=MUTED, hatch="/////", edgecolor=PAPER, label="time")
        axes.legend(
            handles=[Patch(facecolor=MUTED, label="FLOPs"), time],
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=2,
            frameon=False,
            borderaxespad=0.2,
        )
    middles = [(row.flops_ratio / 2, place) for place, row in enumerate(rows)]
    return add_hits(axes, "hits-cost", middles, [_text(row) for row in rows], size=20)


def _bar(axes: Axes, place: float, value: float, thickness: float, **style: Any) -> None:
    axes.barh(place, value, height=thickness * 0.92, edgecolor=PAPER, linewidth=0.4, **style)
    axes.annotate(
        f"{value:.2f}", (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7, zorder=5,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4},
    )  # fmt: skip


def _text(row: Row) -> str:
    time = "" if row.time_ratio is None else f"\nmeasured time: {row.time_ratio:.3f} × Llama"
    return f"{row.label}\nFLOPs per token: {row.flops_ratio:.3f} × Llama{time}"
