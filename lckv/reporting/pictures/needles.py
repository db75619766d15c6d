"""Where in a long text a needle is found again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy
from matplotlib.axes import Axes

from lckv.reporting.analysis import Report
from lckv.reporting.grouping import Row
from lckv.reporting.pictures.base import PAPER, HitTexts, Panel, Picture, Style, add_hits
from lckv.utils.charts import draw_cells


class NeedleMap(NamedTuple):
    """The accuracy of a group, the mean over seeds.

    Attributes:
        label: the group's.
        lengths: tokens of the prompt.
        depths: where the needle lies, 0 to 1.
        accuracy: a row for each depth, a value for each length; `None` where there is none.
    """

    label: str
    lengths: list[float]
    depths: list[float]
    accuracy: list[list[float | None]]


def needle_maps(groups: Sequence[Row]) -> list[NeedleMap]:
    """The maps of the groups that have one, of the runs that were tried at the lengths and depths of the first one."""
    maps = []
    for row in groups:
        found = [each for each in map(_of_run, row.runs["evaluations"]) if each is not None]
        if not found:
            continue
        lengths, depths, _ = found[0]
        alike = numpy.array([cells for *place, cells in found if place == [lengths, depths]])
        known = numpy.isfinite(alike)  # (seeds, depths, lengths)
        sums, counts = numpy.where(known, alike, 0).sum(axis=0), known.sum(axis=0)
        means = [
            [float(total / count) if count else None for total, count in zip(*cells, strict=True)]
            for cells in zip(sums, counts, strict=True)
        ]
        maps.append(NeedleMap(row.label, lengths, depths, means))
    return maps


def _of_run(evaluations: Mapping[str, Any]) -> tuple[list[float], list[float], numpy.ndarray] | None:
    """Lengths, depths and accuracies `(num_depths, num_lengths)` of a run; `None` where they are not all there."""
    needle: Any = evaluations.get("needle")
    try:
        lengths, depths, cells = needle["lengths"], needle["depths"], numpy.array(needle["accuracy"], dtype=float)
        is_whole = cells.size > 0 and cells.shape == (len(depths), len(lengths))
        return (lengths, depths, cells) if is_whole and numpy.isfinite([*lengths, *depths]).all() else None
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def draw_needles(report: Report, styles: Mapping[str, Style]) -> Picture | None:
    """One heat map for each group; `None` without any."""
    maps = needle_maps(report.rows)
    if not maps:
        return None
    width = max(2.3, *(0.75 + 0.42 * len(each.lengths) for each in maps))
    height = max(1.7, *(0.8 + 0.27 * len(each.depths) for each in maps))
    panels = [Panel(each.label, (width, height), partial(_draw, needle=each)) for each in maps]
    caption = (
        "Accuracy of finding a needle by length of the text and depth of the needle (0%: first), mean over seeds; "
        "dark blue is 0, yellow is 1, in all maps."
    )
    return Picture("needle", "Needle in a haystack", caption, panels, {})


def _draw(axes: Axes, needle: NeedleMap) -> HitTexts:
    values = numpy.array(needle.accuracy, dtype=float)  # in which `None` is NaN
    lengths = [f"{each / 1024:g}k" if each >= 1024 and each % 512 == 0 else f"{each:g}" for each in needle.lengths]
    draw_cells(axes, values, lengths, [f"{each:.0%}" for each in needle.depths], edge=PAPER)
    axes.set(xlabel="tokens", ylabel="depth")
    texts = [
        f"{needle.label}\n{needle.lengths[column]:,} tokens, depth {needle.depths[row]:.0%}\naccuracy: "
        + ("–" if numpy.isnan(value) else f"{value:.3f}")
        for (row, column), value in numpy.ndenumerate(values)
    ]
    points = [(column + 0.5, row + 0.5) for row, column in numpy.ndindex(values.shape)]
    return add_hits(axes, "hits-needle", points, texts, size=16)
