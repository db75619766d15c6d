"""Everything that a report says, as figures: groups, their qualities and costs, tests, budgets, what went wrong."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lckv.reporting.budgets import Candidate, budget_of, budgets_of, candidates_of, ranked, within
from lckv.reporting.collecting import Run
from lckv.reporting.grouping import Group, baseline_of, group_runs
from lckv.reporting.metrics import Metric, choose_metric, result_metric
from lckv.reporting.pareto import pareto_front
from lckv.reporting.provenance import warnings_of
from lckv.reporting.relative import flops_ratio, speed, time_ratio, train_flops
from lckv.reporting.statistics import Comparison, Summary, adjust, compare, summarize
from lckv.reporting.troubles import Trouble, trouble_of, troubles_of


@dataclass(frozen=True)
class Row:
    """A group with its figures; `None` stands for what is not known.

    Attributes:
        group: the runs.
        baseline: the Llama that it is compared with.
        quality: the chosen metric.
        bits: bits per byte.
        perplexity: of the held-out text.
        flops_ratio: training FLOPs per token, relative to Llama.
        time_ratio: measured training time per token, relative to Llama.
        speed: training tokens per second.
        train_flops: of the whole training.
        versus_llama: the test against the baseline.
    """

    group: Group
    baseline: Group | None
    quality: Summary | None
    bits: Summary | None
    perplexity: Summary | None
    flops_ratio: float | None
    time_ratio: float | None
    speed: float | None
    train_flops: float | None
    versus_llama: Comparison | None = None


@dataclass(frozen=True)
class Budget:
    """Who is best within so many KV bytes.

    Attributes:
        fraction: of Llama's bytes.
        candidates: all that keep to it, the best first.
        versus_best: the test of each but the best against the best, by label.
        own: labels of those that keep to no smaller budget.
    """

    fraction: float
    candidates: tuple[Candidate, ...]
    versus_best: dict[str, Comparison]
    own: frozenset[str]

    @property
    def best(self) -> Candidate:
        """The best one."""
        return self.candidates[0]


@dataclass(frozen=True)
class Cohort:
    """Groups that can be compared with each other.

    Attributes:
        name: "A", "B", ...; empty if there is only one.
        rows: its groups.
        budgets: from large to small.
        front: of memory against quality, from few bytes to many.
    """

    name: str
    rows: tuple[Row, ...]
    budgets: tuple[Budget, ...]
    front: tuple[Candidate, ...]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The groups that have both bytes and quality."""
        return self.budgets[0].candidates if self.budgets else ()

    def budget_of(self, group: Group) -> Budget | None:
        """The smallest budget that the group keeps to; `None` if its bytes or quality are not known."""
        return next((budget for budget in self.budgets if group.label in budget.own), None)


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    Attributes:
        title: the name of the folder.
        metric: the quality.
        runs: all of them.
        cohorts: groups of comparable runs.
        troubles: runs without a result.
        warnings: in what runs cannot be compared.
        notes: what else must be known.
    """

    title: str
    metric: Metric
    runs: tuple[Run, ...]
    cohorts: tuple[Cohort, ...]
    troubles: tuple[Trouble, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def rows(self) -> list[Row]:
        """The groups of all cohorts."""
        return [row for cohort in self.cohorts for row in cohort.rows]

    @property
    def groups(self) -> list[Group]:
        """The same without their figures."""
        return [row.group for row in self.rows]

    @property
    def finished(self) -> list[Run]:
        """The runs that figures are taken from."""
        return [run for group in self.groups for run in group.runs]


def analyse(runs: Sequence[Run], folder: Path, metric_name: str | None = None) -> Report:
    """Works out everything about these runs.

    Args:
        runs: all of them, in whatever state.
        folder: where they were found.
        metric_name: the quality; see `lckv.reporting.metrics.choose_metric`.

    Raises:
        UserError: if no run has the metric.
    """
    finished = [run for run in runs if trouble_of(run) is None]
    metric = choose_metric(metric_name, finished)
    groups, repeated = group_runs(finished)
    problems = [f"{run.name}: {problem}" for run in finished for problem in run.problems]
    return Report(
        title=folder.resolve().name,
        metric=metric,
        runs=tuple(runs),
        cohorts=tuple(_cohorts(groups, metric)),
        troubles=tuple(troubles_of(runs)),
        warnings=tuple(warnings_of(finished)),
        notes=(*repeated, *problems),
    )


def _cohorts(groups: Sequence[Group], metric: Metric) -> list[Cohort]:
    by_key: dict[tuple[tuple[str, str], ...], list[Group]] = {}
    for group in groups:
        by_key.setdefault(group.cohort, []).append(group)
    names = [_letters(number) if len(by_key) > 1 else "" for number in range(len(by_key))]
    return [_cohort(name, members, metric) for name, members in zip(names, by_key.values(), strict=True)]


def _letters(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    rest, last = divmod(number, 26)
    return (_letters(rest - 1) if rest else "") + string.ascii_uppercase[last]


def _cohort(name: str, groups: Sequence[Group], metric: Metric) -> Cohort:
    candidates = candidates_of(groups, metric)
    budgets = budgets_of(candidates)
    return Cohort(
        name=name,
        rows=tuple(_rows(groups, metric)),
        budgets=tuple(_budget(fraction, candidates, budgets, metric) for fraction in budgets),
        front=tuple(pareto_front(candidates, metric)),
    )


def _rows(groups: Sequence[Group], metric: Metric) -> list[Row]:
    baselines = [baseline_of(group, groups, metric) for group in groups]
    tests = [_versus(group, baseline, metric) for group, baseline in zip(groups, baselines, strict=True)]
    return [
        _row(group, baseline, metric, test)
        for group, baseline, test in zip(groups, baselines, adjust(tests), strict=True)
    ]


def _versus(group: Group, other: Group | None, metric: Metric) -> Comparison | None:
    if other is None or other is group:
        return None
    own, theirs = group.values(metric), other.values(metric)
    return compare(own, theirs) if own and theirs else None


def _row(group: Group, baseline: Group | None, metric: Metric, versus_llama: Comparison | None) -> Row:
    quality, bits, perplexity = (
        summarize(group.values(each).values())
        for each in (metric, result_metric("bits_per_byte"), result_metric("perplexity"))
    )
    return Row(
        group=group,
        baseline=baseline,
        quality=quality,
        bits=bits,
        perplexity=perplexity,
        flops_ratio=flops_ratio(group, baseline),
        time_ratio=time_ratio(group, baseline),
        speed=speed(group),
        train_flops=train_flops(group),
        versus_llama=versus_llama,
    )


def _budget(fraction: float, candidates: Sequence[Candidate], budgets: Sequence[float], metric: Metric) -> Budget:
    best, *others = ranked(within(candidates, fraction), metric)
    tests = adjust([compare(other.group.values(metric), best.group.values(metric)) for other in others])
    return Budget(
        fraction=fraction,
        candidates=(best, *others),
        versus_best={other.group.label: test for other, test in zip(others, tests, strict=True) if test is not None},
        own=frozenset(each.group.label for each in (best, *others) if budget_of(each, budgets) == fraction),
    )
