"""Names beside points, placed where they hide nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from lckv.reporting.pictures.style import MUTED

# Where a name may stand, seen from its point, in the order of preference: x and y offset in points, alignments.
_DIRECTIONS = (
    *((1, 0.0, "left", "center"), (0.7, 0.7, "left", "bottom"), (0.7, -0.7, "left", "top")),
    *((-1, 0.0, "right", "center"), (0.0, 1, "center", "bottom"), (0.0, -1, "center", "top")),
    *((-0.7, 0.7, "right", "bottom"), (-0.7, -0.7, "right", "top")),
)
_DISTANCES = (7.0, 12.0, 18.0, 26.0, 36.0, 48.0, 62.0)
_NEAR = 13.0
_POINT_RADIUS = 3.6
_LINE_RADIUS = 0.8


@dataclass(frozen=True)
class Label:
    """A name and what it belongs to.

    Attributes:
        text: the name.
        point: in the units of the axes.
        color: of the name.
    """

    text: str
    point: tuple[float, float]
    color: str


def place_labels(axes: Axes, labels: Sequence[Label], obstacles: Sequence[tuple[float, float]]) -> None:
    """Writes each name beside its point; one that finds no free place takes the least crowded.

    Args:
        axes: with its limits already set.
        labels: the names.
        obstacles: further places that should stay visible, in the units of the axes.
    """
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()  # the layout decides where the axes are
    dots = [_around(axes, label.point, _POINT_RADIUS) for label in labels]
    taken = [*dots, *(_around(axes, place, _LINE_RADIUS) for place in obstacles)]
    for label in sorted(labels, key=lambda label: -label.point[1]):
        text = _best_place(axes, label, taken, canvas.get_renderer())
        taken.append(_extent(text, canvas.get_renderer()))


def _around(axes: Axes, point: tuple[float, float], radius: float) -> Bbox:
    x, y = axes.transData.transform(point)
    reach = radius * axes.figure.dpi / 72
    return Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)


def _best_place(axes: Axes, label: Label, taken: Sequence[Bbox], renderer: RendererAgg) -> Annotation:
    """Tries all places, and keeps the first without an overlap, or else the one with the least."""
    best, least = None, float("inf")
    for distance, (x, y, ha, va) in product(_DISTANCES, _DIRECTIONS):
        text = _write(axes, label, (x * distance, y * distance), ha, va)
        overlap = _overlap(_extent(text, renderer), taken, axes.bbox)
        if overlap >= least:
            text.remove()
            continue
        if best is not None:
            best.remove()
        best, least = text, overlap
        if least == 0:
            break
    assert best is not None
    return best


def _write(axes: Axes, label: Label, offset: tuple[float, float], ha: str, va: str) -> Annotation:
    """A name that is far away gets a line to its point."""
    line = {"arrowstyle": "-", "linewidth": 0.5, "color": MUTED, "shrinkA": 1, "shrinkB": 4}
    text = axes.annotate(
        label.text, label.point, offset, textcoords="offset points", ha=ha, va=va, color=label.color,
        arrowprops=line if max(map(abs, offset)) > _NEAR else None,
    )  # fmt: skip
    text.set_in_layout(False)  # else the axes would move once more
    return text


def _extent(text: Annotation, renderer: RendererAgg) -> Bbox:
    """Of the name without the line to its point."""
    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)


def _overlap(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Area that is taken already, or lies outside."""
    outside = box.width * box.height - _area(box, frame)
    return outside * 3 + sum(_area(box, other) for other in taken)


def _area(one: Bbox, other: Bbox) -> float:
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else float(common.width * common.height)
