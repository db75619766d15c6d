"""The report as one HTML file that needs nothing else: style, script and pictures are inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context

from lckv.reporting.analysis import Report
from lckv.reporting.notes import method_notes
from lckv.reporting.pictures import Picture
from lckv.reporting.pictures.base import draw_panel
from lckv.reporting.pictures.inline_svg import color_of, inline_svg
from lckv.reporting.pictures.style import PALETTE, RC, Style, styles_of
from lckv.reporting.sentences import answers, status
from lckv.reporting.tables import tables_of

_SINGLE, _ONE_OF_MANY = 165, 128
"""Pixels per inch, where the window is wide enough: three panels of loss curves stand side by side."""


@dataclass(frozen=True)
class _InlinePanel:
    title: str
    svg: str
    width: int


def to_html(report: Report, pictures: Sequence[Picture]) -> str:
    """The whole report."""
    environment = Environment(
        loader=PackageLoader("lckv.reporting", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    main, *others = tables_of(report)
    return environment.get_template("template.html").render(
        title=report.title,
        status=status(report),
        warnings=report.warnings,
        answers=answers(report),
        main=main,
        tables=others,
        figures=[(picture, _panels(picture), _marks(picture.legend)) for picture in pictures],
        marks=_marks(styles_of(report.groups)),
        notes=[*report.notes, *method_notes(report)],
        palette=list(enumerate(PALETTE)),
    )


def _panels(picture: Picture) -> list[_InlinePanel]:
    panels = []
    scale = _SINGLE if len(picture.panels) == 1 else _ONE_OF_MANY
    for number, panel in enumerate(picture.panels):
        # Text stays text, in the fonts of the page: it can be searched, and is small.
        with rc_context({**RC, "svg.fonttype": "none"}):
            figure, hits = draw_panel(panel)
            description = f"{picture.title} {panel.title}".strip()
            svg = inline_svg(figure, hits, f"{picture.name}{number}", description)
        panels.append(_InlinePanel(panel.title, svg, round(panel.size[0] * scale)))
    return panels


def _marks(styles: Mapping[str, Style]) -> dict[str, str]:
    """A small picture of each group's colour and marker."""
    return {label: _mark(style) for label, style in styles.items()}


def _mark(style: Style) -> str:
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in style.outline())
    shape = f'<polygon points="{points}" fill="{color_of(style.color)}"/>'
    return f'<svg class="mark" viewBox="-1.1 -1.1 2.2 2.2" aria-hidden="true">{shape}</svg>'
