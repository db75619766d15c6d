"""All figures that a report shows, for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lckv
from lckv.reporting.analysis import Budget, Cohort, Report, Row
from lckv.reporting.curves import Point, curves_of
from lckv.reporting.metrics import evaluation_metrics
from lckv.reporting.pictures.needles import needle_maps
from lckv.reporting.sentences import answers, status
from lckv.reporting.statistics import Comparison, Summary, summarize

MADE_BY = "lckv.report"


def to_figures(report: Report) -> dict[str, Any]:
    """JSON-able data; what is not known is null."""
    return {
        "made_by": MADE_BY,
        "lckv_version": lckv.__version__,
        "title": report.title,
        "metric": report.metric.name,
        "status": status(report),
        "answers": [str(answer) for answer in answers(report)],
        "warnings": list(report.warnings),
        "notes": list(report.notes),
        "sets": [_cohort(cohort, report) for cohort in report.cohorts],
        "curves": {
            each.group.label: {"training": _points(each.training), "validation": _points(each.validation)}
            for each in curves_of(report.groups)
        },
        "needle": [asdict(each) for each in needle_maps(report.groups)],
        "troubles": [
            {
                "run": trouble.run.name,
                "layer_types": trouble.run.layer_types,
                "state": trouble.state,
                "reason": trouble.reason,
            }
            for trouble in report.troubles
        ],
    }


def _cohort(cohort: Cohort, report: Report) -> dict[str, Any]:
    provenance = cohort.rows[0].group.provenance
    return {
        "name": cohort.name,
        "provenance": {name: value.strip('"') for name, value in provenance.items()},
        "groups": [_row(row, report) for row in cohort.rows],
        "pareto_front": [candidate.group.label for candidate in cohort.front],
        "budgets": [_budget(budget) for budget in cohort.budgets],
    }


def _row(row: Row, report: Report) -> dict[str, Any]:
    group = row.group
    evaluations = evaluation_metrics(report.finished).values()
    kv_bytes = {name: group.figure("kv_bytes", name) for name in ("written", "resident", "read")}
    return {
        "label": group.label,
        "family": group.runs[0].family,
        "layer_types": group.layer_types,
        "runs": [{"name": run.name, "seed": run.seed, "quality": report.metric.of(run)} for run in group.runs],
        "kv_bytes": kv_bytes,
        "kv_fraction": group.fraction,
        "num_parameters": group.figure("num_parameters"),
        "quality": _summary(row.quality),
        "bits_per_byte": _summary(row.bits),
        "perplexity": _summary(row.perplexity),
        "evaluations": {metric.name: _summary(summarize(group.values(metric).values())) for metric in evaluations},
        "train_flops_ratio": row.flops_ratio,
        "train_time_ratio": row.time_ratio,
        "tokens_per_second": row.speed,
        "train_flops": row.train_flops,
        "baseline": row.baseline.label if row.baseline else None,
        "versus_llama": _comparison(row.versus_llama),
    }


def _budget(budget: Budget) -> dict[str, Any]:
    return {
        "fraction": budget.fraction,
        "best": budget.best.group.label,
        "ranking": [candidate.group.label for candidate in budget.candidates],
        "versus_best": {label: _comparison(test) for label, test in budget.versus_best.items()},
    }


def _summary(summary: Summary | None) -> Mapping[str, Any] | None:
    return None if summary is None else asdict(summary)


def _comparison(test: Comparison | None) -> Mapping[str, Any] | None:
    return None if test is None else asdict(test)


def _points(points: tuple[Point, ...]) -> list[Mapping[str, Any]]:
    return [asdict(point) for point in points]
