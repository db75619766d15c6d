"""Colours, markers and fonts: one colour per family of patterns, one marker per group, in all pictures of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.markers import MarkerStyle

from lckv.reporting.grouping import Row

INK, MUTED, GRID, PAPER = "#1a1a1b", "#6b6b6c", "#e3e3e4", "#fffffe"
"""Colours that a page with a dark scheme replaces; none of them is used for anything else."""

# Okabe and Ito's without black and yellow, then two of Tol's, and a brown; each with a lighter one for dark pages.
PALETTE = (
    ("#0072b2", "#4aa8e8"),
    ("#d55e00", "#f5853f"),
    ("#009e73", "#2cc79a"),
    ("#cc79a7", "#e59cc6"),
    ("#e69f00", "#f2b632"),
    ("#56b4e9", "#a4dcfb"),
    ("#882255", "#d0709f"),
    ("#999933", "#c6c65c"),
    ("#8c564b", "#c99a8f"),
)
_MARKERS = "osD^vP<X>hp*"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.6, 1.2)), (0, (5, 1.4, 1.4, 1.4)))

FONT_SIZE = 8.0
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": FONT_SIZE,
    "text.parse_math": False,
    "axes.titlesize": FONT_SIZE + 0.5,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE - 0.5,
    "ytick.labelsize": FONT_SIZE - 0.5,
    "legend.fontsize": FONT_SIZE - 0.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "svg.hashsalt": "lckv",
    "hatch.linewidth": 0.6,
}
"""For `matplotlib.rc_context`."""


@dataclass(frozen=True)
class Style:
    """How a group looks.

    Attributes:
        color: the same for all groups of one family of patterns.
        marker: another one for each group, as far as there are enough.
        dashes: of its lines; another one for each group of a family, as far as there are enough.
    """

    color: str
    marker: str
    dashes: Any

    def outline(self) -> list[tuple[float, float]]:
        """The marker as a polygon, at most 1 from its middle."""
        marker = MarkerStyle(self.marker)
        path = marker.get_path().transformed(marker.get_transform())
        polygon = numpy.asarray(path.to_polygons(closed_only=False)[0], dtype=float)
        corners = [(float(x), -float(y)) for x, y in polygon]
        reach = max(abs(value) for corner in corners for value in corner)
        return [(x / reach, y / reach) for x, y in corners]


def styles_of(groups: Sequence[Row]) -> dict[str, Style]:
    """A style for each group, by its label: Llama in the colour of the text, the others after the palette."""
    families = list(dict.fromkeys(group.family_name for group in groups if not group.is_llama))
    members: Counter[str | None] = Counter()
    styles = {}
    for place, group in enumerate(groups):
        color = INK if group.is_llama else PALETTE[families.index(group.family_name) % len(PALETTE)][0]
        dashes = _DASHES[members[group.family_name] % len(_DASHES)]
        members[group.family_name] += 1
        styles[group.label] = Style(color, _MARKERS[place % len(_MARKERS)], dashes)
    return styles


def tidy(axes: Axes, grid: str = "both") -> None:
    """Takes away what carries no information."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
