"""Pictures inside a page: no identifiers that clash, the page's colours and fonts, and texts to hover on."""

from __future__ import annotations

import html
import io
import json
import re

from matplotlib.figure import Figure

from lckv.reporting.pictures.base import HitTexts
from lckv.reporting.pictures.style import GRID, INK, MUTED, PALETTE, PAPER

_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    color: f"--c{number}" for number, (color, _) in enumerate(PALETTE)
}


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
    svg = _with_own_ids(svg, name)
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


def _with_own_ids(svg: str, name: str) -> str:
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    return re.sub(r"url\(#", f"url(#{name}-", svg)
