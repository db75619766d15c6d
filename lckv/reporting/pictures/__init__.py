"""The pictures of a report, for paper and for a page."""

from __future__ import annotations

from lckv.reporting.analysis import Report
from lckv.reporting.pictures.base import Picture, styles_of
from lckv.reporting.pictures.costs import draw_costs
from lckv.reporting.pictures.losses import draw_losses
from lckv.reporting.pictures.needles import draw_needles
from lckv.reporting.pictures.tradeoff import draw_tradeoff

__all__ = ["Picture", "pictures_of"]


def pictures_of(report: Report) -> list[Picture]:
    """All pictures that the runs have figures for."""
    styles = styles_of(report.rows)
    drawn = (draw(report, styles) for draw in (draw_tradeoff, draw_losses, draw_costs, draw_needles))
    return [picture for picture in drawn if picture is not None]
