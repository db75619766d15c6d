"""The tables of a report, for Markdown, HTML and the terminal alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lckv.reporting.analysis import Budget, Cohort, Report, Row
from lckv.reporting.budgets import show_fraction
from lckv.reporting.metrics import Metric, evaluation_metrics, result_metric
from lckv.reporting.sentences import show_p
from lckv.reporting.statistics import Comparison, Summary, summarize

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
        columns: their names; the first one holds text, the others figures unless `is_text` says so.
        rows: their cells.
        text_columns: which columns hold text.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    text_columns: frozenset[int] = frozenset({0})


def tables_of(report: Report) -> list[Table]:
    """All tables that the runs have figures for; the first one is the main one, be it empty."""
    further = [set_table(report), evaluation_table(report), trouble_table(report)]
    significance = [significance_table(report)] if len(report.groups) > 1 else []
    return [main_table(report), *significance, *(table for table in further if table is not None)]


def main_table(report: Report) -> Table:
    """Every group with what it needs, what it reaches and what its training costs."""
    extra = [] if report.metric.name in ("bits_per_byte", "perplexity") else [report.metric]
    qualities = [*extra, result_metric("bits_per_byte"), result_metric("perplexity")]
    columns: list[tuple[str, Callable[[Row], Cell]]] = [
        ("pattern", pattern_cell),
        ("KV written (bytes per token)", lambda row: _count(row.group.written)),
        ("of Llama's", lambda row: _percent(row.group.fraction)),
        ("KV resident (bytes per token)", lambda row: _count(row.group.figure("kv_bytes", "resident"))),
        ("KV read (bytes per step)", lambda row: _count(row.group.figure("kv_bytes", "read"))),
        ("parameters", lambda row: _count(row.group.figure("num_parameters"))),
        *((metric.label, _quality_getter(metric)) for metric in qualities),
        ("seeds", lambda row: _count(len(row.group.runs))),
        ("FLOPs per token (× Llama)", lambda row: _ratio(row.flops_ratio)),
        ("time per token (× Llama)", lambda row: _ratio(row.time_ratio)),
        ("training FLOPs", lambda row: _scientific(row.train_flops)),
    ]
    table = _build("results", "Results", columns, report.rows)
    return _with_sets(table, report)


def _quality_getter(metric: Metric) -> Callable[[Row], Cell]:
    return lambda row: quality_cell(summarize(row.group.values(metric).values()), metric)


def _build(name: str, title: str, columns: Sequence[tuple[str, Callable[[Row], Cell]]], rows: Iterable[Row]) -> Table:
    names = tuple(column for column, _ in columns)
    return Table(name, title, names, tuple(tuple(cell(row) for _, cell in columns) for row in rows))


def _with_sets(table: Table, report: Report) -> Table:
    """With a column that says which rows can be compared, where not all can."""
    if len(report.cohorts) < 2:
        return table
    names = [cohort.name for cohort in report.cohorts for _ in cohort.rows]
    rows = tuple((row[0], Cell(name, name), *row[1:]) for row, name in zip(table.rows, names, strict=True))
    return Table(
        table.name, table.title, (table.columns[0], "set", *table.columns[1:]), rows, table.text_columns | {1}
    )


def significance_table(report: Report) -> Table:
    """The tests of each group against Llama and against the best of its budget."""
    columns: tuple[str, ...] = ("pattern", "seeds", "minus Llama", "test", "p", "p (Holm)")
    columns += ("budget", "best in budget", "minus best", "test against best", "p ", "p (Holm) ")
    rows = [_significance(row, cohort, report.metric) for cohort in report.cohorts for row in cohort.rows]
    title = f"Significance of differences in {report.metric.label}"
    return Table("significance", title, columns, tuple(rows), frozenset({0, 3, 7, 9}))


def _significance(row: Row, cohort: Cohort, metric: Metric) -> tuple[Cell, ...]:
    label, quality = row.group.label, row.quality
    scale = quality.mean if quality else 0.0
    llama = _comparison_cells(row.versus_llama, metric, scale, _without_llama(row))
    return (
        Cell(label, label, group=label),
        Cell(str(quality.n), quality.n) if quality else Cell(MISSING),
        *llama,
        *_versus_best(row, cohort.budget_of(row.group), metric, scale),
    )


def _without_llama(row: Row) -> str:
    return "is the baseline" if row.group is row.baseline else "no Llama to compare with"


def _versus_best(row: Row, budget: Budget | None, metric: Metric, scale: float) -> tuple[Cell, ...]:
    if budget is None:
        return (Cell(MISSING), Cell(MISSING), *_comparison_cells(None, metric, scale, MISSING))
    best = budget.best.group
    without = "is the best" if best is row.group else MISSING
    return (
        Cell(f"≤ {show_fraction(budget.fraction)}", budget.fraction),
        Cell(best.label, best.label, group=best.label),
        *_comparison_cells(budget.versus_best.get(row.group.label), metric, scale, without),
    )


def _comparison_cells(test: Comparison | None, metric: Metric, scale: float, without: str) -> tuple[Cell, ...]:
    if test is None:
        return (Cell(MISSING), Cell(without, without), Cell(MISSING), Cell(MISSING))
    difference = Cell(metric.show_difference(test.difference, scale), test.difference)
    return (difference, Cell(test.test, test.test), _p(test.p), _p(test.adjusted_p))


def _p(p: float | None) -> Cell:
    return Cell(show_p(p).removeprefix("p = ").removeprefix("p "), p)


def evaluation_table(report: Report) -> Table | None:
    """The scalar figures of evaluations, a row each and a column for every group; `None` without any."""
    metrics = evaluation_metrics(report.finished)
    groups = report.groups
    rows = [
        (
            Cell(metric.label, metric.label),
            *(quality_cell(summarize(group.values(metric).values()), metric) for group in groups),
        )
        for metric in metrics.values()
    ]
    columns = ("figure", *(group.label for group in groups))
    return Table("evaluations", "Evaluations", columns, tuple(rows)) if rows else None


def trouble_table(report: Report) -> Table | None:
    """The runs that no figure is taken from, with the reason; `None` if all are well."""
    rows = tuple(
        (
            Cell(trouble.run.name, trouble.run.name),
            Cell(trouble.run.family or MISSING, trouble.run.family, code=trouble.run.layer_types or ""),
            Cell(trouble.state, trouble.state),
            Cell(trouble.reason, trouble.reason),
        )
        for trouble in report.troubles
    )
    title = "Failed and unfinished runs"
    return Table("troubles", title, ("run", "pattern", "state", "reason"), rows, frozenset(range(4))) if rows else None


def set_table(report: Report) -> Table | None:
    """In what the sets of runs differ that cannot be compared; `None` if all can."""
    if len(report.cohorts) < 2:
        return None
    provenances = [cohort.rows[0].group.provenance for cohort in report.cohorts]
    names = [name for name in provenances[0] if len({each[name] for each in provenances}) > 1]
    rows = []
    for cohort, provenance in zip(report.cohorts, provenances, strict=True):
        labels = ", ".join(row.group.label for row in cohort.rows)
        values = (provenance[name].strip('"')[:16] for name in names)
        rows.append((Cell(cohort.name, cohort.name), Cell(labels, labels), *(Cell(value, value) for value in values)))
    columns = ("set", "patterns", *names)
    return Table("sets", "Sets of comparable runs", columns, tuple(rows), frozenset(range(len(columns))))


def pattern_cell(row: Row) -> Cell:
    """The name of a group and its pattern."""
    label, layer_types = row.group.label, row.group.layer_types or ""
    return Cell(label, label, code="" if layer_types == label else layer_types, group=label)


def quality_cell(summary: Summary | None, metric: Metric) -> Cell:
    """Mean and standard deviation."""
    if summary is None:
        return Cell(MISSING)
    return Cell(metric.show_summary(summary), summary.mean)


def _count(value: float | None) -> Cell:
    return Cell(MISSING) if value is None else Cell(f"{value:,.0f}", value)


def _percent(value: float | None) -> Cell:
    return Cell(MISSING) if value is None else Cell(f"{100 * value:.3g}%", value)


def _ratio(value: float | None) -> Cell:
    return Cell(MISSING) if value is None else Cell(f"{value:.2f}", value)


def _scientific(value: float | None) -> Cell:
    return Cell(MISSING) if value is None else Cell(f"{value:.3g}".replace("e+", "e"), value)
