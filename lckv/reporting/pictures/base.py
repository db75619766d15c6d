"""What a picture is: panels that are drawn side by side on paper, and one by one, with hover texts, on a page.

Its colours, markers and fonts: one colour per family of patterns, one marker per group, in all pictures of a report.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import ceil
from typing import Any

import numpy
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle

from lckv.reporting.grouping import Row
from lckv.utils.charts import new_chart

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
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    color: f"--c{number}" for number, (color, _) in enumerate(PALETTE)
}
_MARKERS = "osD^vP<X>hp*"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.6, 1.2)), (0, (5, 1.4, 1.4, 1.4)))

_PANELS_PER_ROW = 3  # on paper

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

    def mark(self) -> str:
        """The marker in its colour as a small `<svg>` element, which ends 1 from its middle."""
        marker = MarkerStyle(self.marker)
        path = marker.get_path().transformed(marker.get_transform())
        polygon = numpy.asarray(path.to_polygons(closed_only=False)[0], dtype=float) * (1, -1)
        points = " ".join(f"{x:.2f},{y:.2f}" for x, y in polygon / abs(polygon).max())
        shape = f'<polygon points="{points}" fill="{color_of(self.color)}"/>'
        return f'<svg class="mark" viewBox="-1.1 -1.1 2.2 2.2" aria-hidden="true">{shape}</svg>'


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


HitTexts = dict[str, list[str]]
"""For each `gid` of a line of invisible markers: the text of each of them."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: what the panel shows; empty where the picture has no other.
        size: width and height in inches.
        draw: draws into the axes, and returns the texts to show where one points at something.
    """

    title: str
    size: tuple[float, float]
    draw: Callable[[Axes], HitTexts]


@dataclass(frozen=True)
class Picture:
    """One or more panels.

    Attributes:
        name: of its files.
        title: a heading.
        caption: what is to be seen, and how it was measured.
        panels: side by side.
        legend: the styles of what no panel names itself.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    legend: Mapping[str, Style]


def draw_panel(panel: Panel) -> tuple[Figure, HitTexts]:
    """One panel without its title, for a page that has its own."""
    figure, (axes,) = new_chart(panel.size, dpi=300)
    figure.set_facecolor("none")
    axes.set_facecolor("none")
    return figure, panel.draw(axes)


def draw_on_paper(picture: Picture) -> Figure:
    """All panels together, with their titles and the legend."""
    num_columns = min(_PANELS_PER_ROW, len(picture.panels))
    num_rows = ceil(len(picture.panels) / num_columns)
    width, height = (max(panel.size[side] for panel in picture.panels) for side in (0, 1))
    keys = [
        Line2D(
            [], [], color=style.color, marker=style.marker, linestyle=style.dashes, linewidth=1.2, markersize=5,
            markeredgecolor=PAPER, markeredgewidth=0.5, label=label,
        )
        for label, style in picture.legend.items()
    ]  # fmt: skip
    legend_columns = max(1, int(width * num_columns / (0.5 + 0.075 * max(map(len, picture.legend), default=1))))
    legend_height = 0.17 * ceil(len(keys) / legend_columns) + 0.1 if keys else 0
    size = width * num_columns, height * num_rows + legend_height
    figure, all_axes = new_chart(size, num_rows, num_columns, dpi=300)
    for axes, panel in zip_longest(all_axes, picture.panels):
        if panel is None:
            axes.remove()
            continue
        panel.draw(axes)
        axes.set_title(panel.title, loc="left")
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=legend_columns, frameon=False)
    return figure


def add_hits(
    axes: Axes, gid: str, points: Sequence[tuple[float, float]], texts: Sequence[str], size: float = 14
) -> HitTexts:
    """Puts invisible markers where one can point at something; large ones, for fingers."""
    line = axes.plot(*zip(*points, strict=True), "o", color=MUTED, markersize=size, alpha=0.0, markeredgewidth=0)[0]
    line.set_gid(gid)
    return {gid: list(texts)}


def inline_svg(panel: Panel, name: str, description: str) -> str:
    """A panel as an `<svg>` element of a page.

    Args:
        panel: what is drawn.
        name: what its identifiers begin with; no other picture of the page has it.
        description: for those who do not see it.
    """
    buffer = io.StringIO()
    # Text stays text, in the fonts of the page: it can be searched, and is small.
    with rc_context({**RC, "svg.fonttype": "none"}):
        figure, hits = draw_panel(panel)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace('xlink:href="#', 'href="#')
    svg = re.sub(r'\bid="|href="#|url\(#', lambda found: f"{found[0]}{name}-", svg)  # other pictures have these too
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: color_of(found[0]), svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for gid, texts in hits.items():
        data = html.escape(json.dumps(texts), quote=True)
        svg = svg.replace(f'<g id="{name}-{gid}">', f'<g id="{name}-{gid}" class="hits" data-texts="{data}">')
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    label = html.escape(description, quote=True)
    _, inside = svg.split(">", 1)  # behind the opening tag
    return f'<svg {view_box[0]} role="group" aria-label="{label}">{inside}'


def color_of(color: str) -> str:
    """A colour of ours as the page calls it, so that it can have another one in the dark."""
    return f"var({_VARIABLES[color]})" if color in _VARIABLES else color
