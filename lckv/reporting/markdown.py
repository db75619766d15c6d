"""The report as Markdown, with its pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lckv.reporting.analysis import Report
from lckv.reporting.notes import method_notes
from lckv.reporting.pictures import Picture
from lckv.reporting.sentences import answers, status
from lckv.reporting.tables import Cell, Table, tables_of


def to_markdown(report: Report, pictures: Sequence[Picture]) -> str:
    """The whole report; pictures are named as files in the same folder."""
    return "\n".join(_lines(report, pictures)) + "\n"


def _lines(report: Report, pictures: Sequence[Picture]) -> Iterator[str]:
    yield f"# {escape(report.title)}: report"
    yield ""
    yield escape(status(report))
    for warning in report.warnings:
        yield ""
        yield f"> **Warning:** {escape(warning)}."
    yield ""
    for answer in answers(report):
        yield f"- {escape(answer.question)} **{escape(answer.best)}** {escape(answer.reason)}"
    first, *others = tables_of(report)
    if first.rows:
        yield from _table(first)
    for picture in pictures:
        yield from ("", f"## {picture.title}", "", f"![{picture.title}]({picture.name}.png)", "", picture.caption)
    for table in others:
        yield from _table(table)
    yield from ("", "## Notes", "")
    for note in (*report.notes, *method_notes(report)):
        yield f"- {escape(note)}"


def _table(table: Table) -> Iterator[str]:
    rule = ["---" if place in table.text_columns else "---:" for place in range(len(table.columns))]
    yield from ("", f"## {escape(table.title)}", "")
    for row in ([escape(column.strip()) for column in table.columns], rule, *(map(_cell, row) for row in table.rows)):
        yield f"| {' | '.join(row)} |"


def _cell(cell: Cell) -> str:
    return escape(cell.text) + (f" `{cell.code}`" if cell.code else "")


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_|<>\[\]#~])", r"\\\1", " ".join(text.split()))
