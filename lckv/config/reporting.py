"""What can be configured of reports."""

from __future__ import annotations

from dataclasses import dataclass

from lckv.config.keys import Group, literal


@dataclass
class ReportConfig(Group):
    """Everything that `python -m lckv.report` needs.

    Attributes:
        folder: what holds the run folders, at any depth; also the first word of the command line.
        out: the folder of the report; only an earlier report is replaced. None: `report` in `folder`.
        metric: the quality to compare and to draw: "bits_per_byte", "perplexity", "loss", or a figure of an evaluation
            such as `harness:arc_easy.acc`; None: bits per byte where runs have it.
    """

    folder: str | None = literal(required="give the one that holds the runs: python -m lckv.report runs/sweep")
    out: str | None = literal()
    metric: str | None = literal()
