"""The main figures of a report, in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lckv.reporting.analysis import Report
from lckv.reporting.sentences import answers, status
from lckv.reporting.tables import Table, main_table, trouble_table

_SHORT = {
    "KV written (bytes per token)": "KV bytes written",
    "of Llama's": "× Llama",
    "FLOPs per token (× Llama)": "FLOPs",
    "time per token (× Llama)": "time",
}
_LEFT_OUT = ("KV resident (bytes per token)", "KV read (bytes per step)", "parameters", "training FLOPs")


def print_report(report: Report, files: Sequence[Path], console: Console) -> None:
    """Prints the answers, the main table, what failed, and where the files are."""
    console.print(Text(status(report), style="bold"))
    for warning in report.warnings:
        console.print(Text(warning, style="yellow"))
    if report.groups:
        console.print(_table(main_table(report)))
    if (troubles := trouble_table(report)) is not None:
        console.print(_table(troubles))
    for answer in answers(report):
        console.print(Text.assemble(answer.question, " ", (answer.best, "bold"), " ", answer.reason))
    for file in files:
        if file.suffix in (".html", ".md", ".json"):
            console.print(f"written: {file}", markup=False, highlight=False, soft_wrap=True)


def _table(table: Table) -> RichTable:
    shown = [place for place, column in enumerate(table.columns) if column not in _LEFT_OUT]
    drawn = RichTable(title=table.title, title_justify="left")
    for place in shown:
        is_text = place in table.text_columns
        name = _SHORT.get(table.columns[place], table.columns[place])
        drawn.add_column(Text(name), justify="left" if is_text else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(row[place].text) for place in shown))
    return drawn
