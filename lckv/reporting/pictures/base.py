"""What a picture is: panels that are drawn side by side on paper, and one by one, with hover texts, on a page."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lckv.reporting.pictures.style import GRID, INK, MUTED, PALETTE, PAPER, Style

_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    color: f"--c{number}" for number, (color, _) in enumerate(PALETTE)
}

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
        columns: how many panels stand side by side on paper.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    legend: Mapping[str, Style]
    columns: int = 3


def draw_panel(panel: Panel) -> tuple[Figure, HitTexts]:
    """One panel without its title, for a page that has its own."""
    figure = Figure(figsize=panel.size, dpi=300, layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)  # draws without a display, and leaves a notebook's own figures alone
    axes = figure.subplots()
    axes.set_facecolor("none")
    return figure, panel.draw(axes)


def draw_on_paper(picture: Picture) -> Figure:
    """All panels together, with their titles and the legend."""
    num_columns = min(picture.columns, len(picture.panels))
    num_rows = ceil(len(picture.panels) / num_columns)
    width, height = (max(panel.size[side] for panel in picture.panels) for side in (0, 1))
    keys = [_key(label, style) for label, style in picture.legend.items()]
    legend_columns = max(1, int(width * num_columns / (0.5 + 0.075 * max(map(len, picture.legend), default=1))))
    legend_height = 0.17 * ceil(len(keys) / legend_columns) + 0.1 if keys else 0
    figure = Figure(figsize=(width * num_columns, height * num_rows + legend_height), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(picture.panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, number)
        panel.draw(axes)
        axes.set_title(panel.title, loc="left")
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=legend_columns, frameon=False)
    return figure


def _key(label: str, style: Style) -> Line2D:
    return Line2D(
        [], [], color=style.color, marker=style.marker, linestyle=style.dashes, linewidth=1.2, markersize=5,
        markeredgecolor=PAPER, markeredgewidth=0.5, label=label,
    )  # fmt: skip


def add_hits(axes: Axes, gid: str, points: Sequence[tuple[float, float]], size: float = 14) -> None:
    """Puts invisible markers where one can point at something; large ones, for fingers."""
    line = axes.plot(*zip(*points, strict=True), "o", color=MUTED, markersize=size, alpha=0.0, markeredgewidth=0)[0]
    line.set_gid(gid)


def inline_svg(figure: Figure, hits: HitTexts, name: str, description: str) -> str:
    """The figure as an `<svg>` element.

    Args:
        figure: drawn with the fonts as text, see `lckv.reporting.html`.
        hits: the texts of its invisible markers.
        name: what its identifiers begin with; no other picture of the page has it.
        description: for those who do not see it.
    """
    buffer = io.StringIO()
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
