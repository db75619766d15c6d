"""Writes a report: its folder, all of it or nothing and over nothing but an earlier one, and a terminal's part."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from pandas import DataFrame
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

import lckv
from lckv.errors import UserError
from lckv.reporting.analysis import Cohort, Report
from lckv.reporting.grouping import Row
from lckv.reporting.pictures import Picture, pictures_of
from lckv.reporting.pictures.base import PALETTE, RC, Style, draw_on_paper, inline_svg, styles_of
from lckv.reporting.pictures.losses import KINDS, curves_of
from lckv.reporting.pictures.needles import needle_maps
from lckv.reporting.runs import first_known, table
from lckv.reporting.sentences import answers, method_notes, status
from lckv.reporting.tables import Table, main_table, tables_of, trouble_table
from lckv.utils.storage import check_folder, new_folder

_MADE_BY = "lckv.report"
_FIGURES = "report.json"
_SHORT = {
    "KV written (bytes per token)": "KV bytes",
    "of Llama's": "× Llama",
    "FLOPs per token (× Llama)": "FLOPs",
    "time per token (× Llama)": "time",
}
_LABEL_WIDTH = 18
_WIDE = 100
_LEFT_OUT = ("KV resident (bytes per token)", "KV read (bytes per step)", "parameters", "training FLOPs")
_SINGLE, _ONE_OF_MANY = 165, 128
"""Pixels per inch, where the window is wide enough: three panels of loss curves stand side by side."""


def check_out(out: Path) -> None:
    """Refuses a place where something else than an earlier report would be lost.

    Raises:
        UserError: if it is a folder with other things, or the current one, or it cannot be written to.
    """
    if out.resolve() == Path.cwd():
        raise UserError(f"out={out}: is the current folder, which a report would take the place of; name another")
    if out.is_symlink():
        raise UserError(f"out={out}: is a link; name a folder")
    check_folder(out, f"out={out}")
    others = {path.name for path in out.iterdir()} - _own_files(out) if out.is_dir() else set()
    if others:
        raise UserError(f"out={out}: holds {min(others)}, which is no part of a report; give another out=...")


def _own_files(out: Path) -> set[str]:
    """The files of an earlier report, which its figures list."""
    try:
        figures = json.loads((out / _FIGURES).read_text(encoding="utf-8"))
        return set(figures["files"]) if figures["made_by"] == _MADE_BY else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def write_report(report: Report, out: Path) -> list[Path]:
    """Writes Markdown, HTML, pictures and figures, and returns their paths.

    Raises:
        UserError: see `check_out`.
    """
    check_out(out)
    pictures = pictures_of(report)
    with new_folder(out, replaces=True) as folder:
        for name, text in render(report, pictures).items():
            (folder / name).write_text(text, encoding="utf-8")
        for picture in pictures:
            with rc_context(RC):
                figure = draw_on_paper(picture)
                figure.savefig(folder / f"{picture.name}.png")
                figure.savefig(folder / f"{picture.name}.svg", metadata={"Date": None})
        files = sorted([*(path.name for path in folder.iterdir()), _FIGURES])
        figures = json.dumps({**figures_of(report), "files": files}, default=asdict, indent=2, allow_nan=False)
        (folder / _FIGURES).write_text(figures + "\n", encoding="utf-8")
        check_out(out)  # perhaps it was filled meanwhile
    return [out / name for name in files]


def render(report: Report, pictures: Sequence[Picture]) -> dict[str, str]:
    """The report as Markdown, with its pictures beside it, and as a page that needs nothing else, by file name."""
    environment = Environment(
        loader=PackageLoader("lckv.reporting", "."), autoescape=lambda name: str(name).endswith(".html"),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["plain"] = escape_markdown

    def marks(styles: Mapping[str, Style]) -> dict[str, str]:
        return {label: style.mark() for label, style in styles.items()}

    main, *others = tables_of(report)
    content = {
        "title": report.title,
        "status": status(report),
        "warnings": report.warnings,
        "answers": answers(report),
        "main": main,
        "tables": others,
        "figures": [(picture, _inline(picture), marks(picture.legend)) for picture in pictures],
        "marks": marks(styles_of(report.rows)),
        "notes": [*report.notes, *method_notes(report)],
        "palette": list(enumerate(PALETTE)),
    }
    return {name: environment.get_template(name).render(content) for name in ("report.md", "report.html")}


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_|<>\[\]#~])", r"\\\1", " ".join(text.split()))


def _inline(picture: Picture) -> list[dict[str, Any]]:
    scale = _SINGLE if len(picture.panels) == 1 else _ONE_OF_MANY
    return [
        {
            "title": panel.title,
            "svg": inline_svg(panel, f"{picture.name}{number}", f"{picture.title} {panel.title}".strip()),
            "width": round(panel.size[0] * scale),
        }
        for number, panel in enumerate(picture.panels)
    ]


def figures_of(report: Report) -> dict[str, Any]:
    """All figures, for other programs; what is not known is `None`."""
    curves = {row.label: curves_of(row.runs) for row in report.rows}
    return {
        "made_by": _MADE_BY,
        "lckv_version": lckv.__version__,
        "title": report.title,
        "metric": report.metric.name,
        "status": status(report),
        "answers": [str(answer) for answer in answers(report)],
        "warnings": report.warnings,
        "notes": report.notes,
        "sets": [_cohort(cohort, report) for cohort in report.cohorts],
        "curves": {
            label: {kind: _points(curve, kind) for kind in KINDS} for label, curve in curves.items() if len(curve)
        },
        "needle": [each._asdict() for each in needle_maps(report.rows)],
        "troubles": [
            {"run": run.name, "layer_types": run.layer_types, "state": run.state, "reason": run.reason}
            for run in report.troubles
        ],
    }


def _points(curve: DataFrame, kind: str) -> list[dict[str, float | None]]:
    columns = ["tokens", "loss", "seconds", "flops"]
    return table(curve.loc[curve["kind"] == kind, columns].to_dict("records")).to_dict("records")


def _cohort(cohort: Cohort, report: Report) -> dict[str, Any]:
    budgets = [
        {
            "fraction": each.fraction,
            "best": each.best.label,
            "ranking": [row.label for row in each.ranking],
            "versus_best": each.versus_best,
        }
        for each in cohort.budgets
    ]
    return {
        "name": cohort.name,
        "provenance": cohort.provenance,
        "groups": [_group(row, report) for row in cohort.groups.itertuples()],
        "pareto_front": cohort.front,
        "budgets": budgets,
    }


def _group(row: Row, report: Report) -> dict[str, Any]:
    name = report.metric.name
    return {
        "label": row.label,
        "family": row.family,
        "layer_types": row.layer_types,
        "runs": [
            {"name": run.name, "seed": run.seed, "quality": run.metrics.get(name)} for run in row.runs.itertuples()
        ],
        "kv_bytes": {each: first_known(row.runs[each]) for each in ("written", "resident", "read")},
        "kv_fraction": row.fraction,
        "num_parameters": row.num_parameters,
        "quality": row.quality,
        "bits_per_byte": row.bits_per_byte,
        "perplexity": row.perplexity,
        "evaluations": report.evaluations[row.label].to_dict(),
        "train_flops_ratio": row.flops_ratio,
        "train_time_ratio": row.time_ratio,
        "tokens_per_second": row.speed,
        "train_flops": row.train_flops,
        "baseline": row.baseline,
        "versus_llama": row.versus_llama,
    }


def print_report(report: Report, files: Sequence[Path], console: Console) -> None:
    """Prints the answers, the main table, what failed, and where the files are."""
    console.print(Text(status(report), style="bold"), soft_wrap=False)
    for warning in report.warnings:
        console.print(Text(warning, style="yellow"), soft_wrap=False)
    if report.cohorts:
        console.print(_table(main_table(report), console.width), soft_wrap=False)
    if (troubles := trouble_table(report)).rows:
        console.print(_table(troubles, console.width), soft_wrap=False)
    for answer in answers(report):
        sentence = Text.assemble(answer.question, " ", (answer.best, "bold"), " ", answer.reason)
        console.print(sentence, soft_wrap=False)
    for file in files:
        if file.suffix in (".html", ".md", ".json"):
            console.print(f"written: {file}")


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
