"""The tables of a report, for Markdown, HTML and the terminal alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pandas import DataFrame

from lckv.reporting.analysis import Report, show_fraction, summarize_metric
from lckv.reporting.grouping import Row
from lckv.reporting.metrics import Comparison, Metric, Summary
from lckv.reporting.sentences import show_p

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table.

    Attributes:
        text: what is shown.
        value: what it is sorted by; `None` sorts last.
        code: a `layer_types` string below the text.
        group: the label of the group whose colour and marker belong to it.
    """

    text: str
    value: float | str | None = None
    code: str = ""
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a heading.

    Attributes:
        name: a short name, for links.
        title: the heading.
        columns: their names.
        rows: their cells.
        text_columns: which columns hold text; the others hold figures.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: Iterable[int] = (0,)


def tables_of(report: Report) -> list[Table]:
    """All tables that the runs have figures for; the first one is the main one, be it empty."""
    others = [
        *([_significance(report)] if len(report.rows) > 1 else []),
        *([_sets(report)] if len(report.cohorts) > 1 else []),
        _evaluations(report),
        trouble_table(report),
    ]
    return [main_table(report), *(table for table in others if table.rows)]


def _text(text: str) -> Cell:
    return Cell(text, text)


def _figure(value: Any, show: Callable[[Any], str]) -> Cell:
    return Cell(MISSING) if value is None else Cell(show(value), value)


def _quality(summary: Summary | None, metric: Metric) -> Cell:
    return Cell(MISSING) if summary is None else Cell(metric.show_summary(summary), summary.mean)


def main_table(report: Report) -> Table:
    """Every group with what it needs, what it reaches and what its training costs."""
    metrics = [Metric("bits_per_byte"), Metric("perplexity")]
    metrics = metrics if report.metric in metrics else [report.metric, *metrics]
    rows = [_results(row, metrics) for row in report.rows]
    text_columns = (0, 1) if len(report.cohorts) > 1 else (0,)
    return Table("results", "Results", list(*rows[:1]), [list(row.values()) for row in rows], text_columns)


def _results(row: Row, metrics: Sequence[Metric]) -> dict[str, Cell]:
    count, ratio = "{:,.0f}".format, "{:.2f}".format
    layer_types = "" if row.layer_types in (None, row.label) else row.layer_types
    return {
        "pattern": Cell(row.label, row.label, code=layer_types, group=row.label),
        **({"set": _text(row.set)} if row.set else {}),
        "KV written (bytes per token)": _figure(row.written, count),
        "of Llama's": _figure(row.fraction, lambda value: f"{100 * value:.3g}%"),
        "KV resident (bytes per token)": _figure(row.resident, count),
        "KV read (bytes per step)": _figure(row.read, count),
        "parameters": _figure(row.num_parameters, count),
        **{metric.label: _quality(summarize_metric(row.runs, metric.name), metric) for metric in metrics},
        "seeds": _figure(len(row.runs), count),
        "FLOPs per token (× Llama)": _figure(row.flops_ratio, ratio),
        "time per token (× Llama)": _figure(row.time_ratio, ratio),
        "training FLOPs": _figure(row.train_flops, lambda value: f"{value:.3g}".replace("e+", "e")),
    }


def _significance(report: Report) -> Table:
    """The tests of each group against Llama and against the best of its budget."""
    columns = ["pattern", "seeds", "minus Llama", "test", "p", "p (Holm)"]
    columns += ["budget", "best in budget", "minus best", "test against best", "p", "p (Holm)"]
    rows = []
    for cohort in report.cohorts:
        for row in cohort.groups.itertuples():
            without_llama = "is the baseline" if row.label == row.baseline else "no Llama to compare with"
            against, best, without_best = None, [Cell(MISSING), Cell(MISSING)], MISSING
            if (budget := cohort.budget_of(row.label)) is not None:
                label, limit = budget.best.label, f"≤ {show_fraction(budget.fraction)}"
                best = [Cell(limit, budget.fraction), Cell(label, label, group=label)]
                against = budget.versus_best.get(row.label)
                without_best = "is the best" if label == row.label else MISSING
            rows.append(
                [
                    Cell(row.label, row.label, group=row.label),
                    _figure(row.quality and row.quality.n, str),
                    *_test(row, row.versus_llama, report.metric, without_llama),
                    *best,
                    *_test(row, against, report.metric, without_best),
                ]
            )
    title = f"Significance of differences in {report.metric.label}"
    return Table("significance", title, columns, rows, (0, 3, 7, 9))


def _test(row: Row, test: Comparison | None, metric: Metric, without: str) -> list[Cell]:
    if test is None:
        return [Cell(MISSING), _text(without), Cell(MISSING), Cell(MISSING)]
    scale = row.quality.mean if row.quality else 0.0
    difference = Cell(metric.show_difference(test.difference, scale), test.difference)
    p_values = [Cell(show_p(p).removeprefix("p = ").removeprefix("p "), p) for p in (test.p, test.adjusted_p)]
    return [difference, _text(test.test), *p_values]


def _evaluations(report: Report) -> Table:
    """The scalar figures of evaluations, a row each and a column for every group."""
    columns = ["figure", *report.evaluations.columns]
    rows = [
        [_text(Metric(name).label), *(_quality(summary, Metric(name)) for summary in summaries)]
        for name, *summaries in report.evaluations.itertuples(name=None)
    ]
    return Table("evaluations", "Evaluations", columns, rows)


def trouble_table(report: Report) -> Table:
    """The runs that no figure is taken from, with the reason."""
    rows = [
        [
            _text(run.name),
            Cell(run.family or MISSING, run.family, code=run.layer_types or ""),
            _text(run.state),
            _text(run.reason),
        ]
        for run in report.troubles
    ]
    return Table("troubles", "Failed and unfinished runs", ("run", "pattern", "state", "reason"), rows, range(4))


def _sets(report: Report) -> Table:
    """In what the sets of runs differ that cannot be compared."""
    provenances = DataFrame([cohort.provenance for cohort in report.cohorts])
    differing = provenances.loc[:, provenances.nunique() > 1]
    rows = [
        [_text(cohort.name), _text(", ".join(cohort.groups["label"])), *(_text(value[:16]) for value in values)]
        for cohort, values in zip(report.cohorts, differing.values, strict=True)
    ]
    columns = ("set", "patterns", *differing.columns)
    return Table("sets", "Sets of comparable runs", columns, rows, range(len(columns)))
