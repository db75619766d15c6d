"""The main figures of a report, in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lckv.reporting.analysis import Report
from lckv.reporting.sentences import answers, status
from lckv.reporting.tables import Table, main_table, trouble_table

_SHORT = {
    "KV written (bytes per token)": "KV bytes",
    "of Llama's": "× Llama",
    "FLOPs per token (× Llama)": "FLOPs",
    "time per token (× Llama)": "time",
}
_LABEL_WIDTH = 18
_WIDE = 100
_LEFT_OUT = ("KV resident (bytes per token)", "KV read (bytes per step)", "parameters", "training FLOPs")


def print_report(report: Report, files: Sequence[Path], console: Console) -> None:
    """Prints the answers, the main table, what failed, and where the files are."""
    console.print(Text(status(report), style="bold"))
    for warning in report.warnings:
        console.print(Text(warning, style="yellow"))
    if report.groups:
        console.print(_table(main_table(report), console.width))
    if (troubles := trouble_table(report)) is not None:
        console.print(_table(troubles, console.width))
    for answer in answers(report):
        console.print(Text.assemble(answer.question, " ", (answer.best, "bold"), " ", answer.reason))
    for file in files:
        if file.suffix in (".html", ".md", ".json"):
            console.print(f"written: {file}", markup=False, highlight=False, soft_wrap=True)


def _table(table: Table, width: int) -> RichTable:
    left_out = _LEFT_OUT if width >= _WIDE else (*_LEFT_OUT, "perplexity")
    shown = [place for place, column in enumerate(table.columns) if column not in left_out]
    drawn = RichTable(
        title=table.title,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for place in shown:
        is_text = place in table.text_columns
        name = _SHORT.get(table.columns[place], table.columns[place])
        # A label that is folded inside its words cannot be read; figures can do with two lines.
        min_width = _LABEL_WIDTH if place == 0 else None
        drawn.add_column(Text(name), justify="left" if is_text else "right", overflow="fold", min_width=min_width)
    for row in table.rows:
        drawn.add_row(*(Text(row[place].text) for place in shown))
    return drawn
