"""Everything that a report says, as tables: groups with their qualities and costs, tests, budgets, what went wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median

from pandas import DataFrame

from lckv.config.model_arguments import DEFAULT_SLIDING_WINDOW
from lckv.reporting.grouping import Group, Row, group_runs, warnings_of
from lckv.reporting.metrics import (
    Comparison,
    Metric,
    Summary,
    adjust,
    choose_metric,
    compare,
    evaluation_names,
    summarize,
)
from lckv.reporting.runs import table
from lckv.sharing.costs import ModelSizes, count_flops, llama_plan
from lckv.sharing.iteration import Iteration

_MAX_BUDGETS = 6
_TOLERANCE = 1e-9
_MAX_DENOMINATOR = 64
_DECIDES_SPEED = (
    *("trainer.num_threads", "trainer.micro_batch_size", "trainer.precision", "trainer.torch_compile"),
    *("trainer.gradient_checkpointing", "trainer.use_liger_kernel", "model.attn_implementation"),
)


@dataclass(frozen=True)
class Budget:
    """Who is best within so many KV bytes.

    Attributes:
        fraction: of Llama's bytes.
        ranking: the groups that keep to it, the best first; of equals, the one that needs less.
        versus_best: the test of each but the best against the best, by label.
    """

    fraction: float
    ranking: list[Row]
    versus_best: dict[str, Comparison]

    @property
    def best(self) -> Row:
        """The best group."""
        return self.ranking[0]


@dataclass(frozen=True)
class Cohort:
    """Groups that can be compared with each other.

    Attributes:
        name: "A", "B", ...; empty if there is only one.
        groups: what `group_runs` says, and of each: `values` (the chosen metric by seed), over seeds its `quality`,
            `bits_per_byte` and `perplexity`, the label of the Llama that is its `baseline` and the test against it,
            `versus_llama`, training on a token relative to it, `flops_ratio` and `time_ratio`, `speed` (tokens per
            second), and `train_flops`; `None` stands for what is not known.
        budgets: from large to small.
        front: labels of groups that are better than all that need as few bytes or fewer, from few bytes to many.
    """

    name: str
    groups: DataFrame
    budgets: list[Budget]
    front: list[str]

    @property
    def candidates(self) -> list[Row]:
        """The groups that have both bytes and quality."""
        return self.budgets[0].ranking if self.budgets else []

    @property
    def provenance(self) -> dict[str, str]:
        """What is equal in all runs: versions, text, length of the training and sizes."""
        return {name: value.strip('"') for name, value in self.groups["provenance"].iloc[0].items()}

    def budget_of(self, label: str) -> Budget | None:
        """The smallest budget that a group keeps to; `None` if its bytes or quality are not known."""
        return next((each for each in reversed(self.budgets) if label in {row.label for row in each.ranking}), None)


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    Attributes:
        title: the name of the folder.
        metric: the quality.
        runs: all of them, see `read_runs`.
        cohorts: groups of comparable runs.
        warnings: in what runs cannot be compared.
        notes: what else must be known.
    """

    title: str
    metric: Metric
    runs: DataFrame
    cohorts: list[Cohort]
    warnings: list[str]
    notes: list[str]

    @cached_property
    def rows(self) -> list[Row]:
        """The groups of all cohorts."""
        return [row for cohort in self.cohorts for row in cohort.groups.itertuples()]

    @cached_property
    def finished(self) -> list[Row]:
        """The runs that figures are taken from."""
        return [run for row in self.rows for run in row.runs.itertuples()]

    @property
    def troubles(self) -> list[Row]:
        """The runs that no figure is taken from, failures first."""
        runs = self.runs[self.runs["state"] != "finished"].itertuples()
        return sorted(runs, key=lambda run: run.state == "unfinished")

    @cached_property
    def evaluations(self) -> DataFrame:
        """Summaries of the figures of evaluations, with a row for each figure and a column for each group."""
        names = evaluation_names([run.metrics for run in self.finished])
        columns = {row.label: [summarize_metric(row.runs, name) for name in names] for row in self.rows}
        return DataFrame(columns, index=names, dtype=object)


def analyse(runs: DataFrame, folder: Path, metric_name: str | None = None) -> Report:
    """Works out everything about these runs.

    Args:
        runs: all of them, in whatever state.
        folder: where they were found.
        metric_name: the quality; see `lckv.reporting.metrics.choose_metric`.

    Raises:
        UserError: if no run has the metric.
    """
    finished = runs[runs["state"] == "finished"]
    metric = choose_metric(metric_name, list(finished["metrics"]))
    groups, repeated = group_runs(finished)
    problems = [f"{run.name}: {problem}" for run in finished.itertuples() for problem in run.problems]
    cohorts = [_cohort(name, list(alike), metric) for name, alike in groupby(groups, key=lambda group: group["set"])]
    return Report(folder.resolve().name, metric, runs, cohorts, warnings_of(finished), [*repeated, *problems])


def _cohort(name: str, groups: Sequence[Group], metric: Metric) -> Cohort:
    measured = [{**group, **_measure(group["runs"], metric)} for group in groups]
    baselines = [_baseline(group, measured, metric) for group in measured]
    tests = adjust([_versus(group, other) for group, other in zip(measured, baselines, strict=True)])
    frame = table(
        {**group, **_relative(group, baseline), "versus_llama": test}
        for group, baseline, test in zip(measured, baselines, tests, strict=True)
    )
    candidates = frame.dropna(subset=["quality", "written", "fraction"])
    candidates = candidates.assign(cost=[metric.cost(quality.mean) for quality in candidates["quality"]])
    budgets = [_budget(fraction, candidates) for fraction in budgets_of(candidates["fraction"])]
    return Cohort(name, frame, budgets, list(pareto_front(candidates)["label"]))


def _measure(runs: DataFrame, metric: Metric) -> Group:
    values = {run.seed: run.metrics[metric.name] for run in runs.itertuples() if metric.name in run.metrics}
    qualities = {name: summarize_metric(runs, name) for name in ("bits_per_byte", "perplexity")}
    speeds = [speed for speed in runs["tokens_per_second"] if speed]
    speed = median(speeds) if speeds else None
    return {"values": values, "quality": summarize(values.values()), **qualities, "speed": speed}


def summarize_metric(runs: DataFrame, name: str) -> Summary | None:
    """Mean and spread of a metric over the seeds that have it."""
    return summarize(metrics.get(name) for metrics in runs["metrics"])


def _baseline(group: Group, groups: Iterable[Group], metric: Metric) -> Group | None:
    """The Llama that a group is compared with: one of the same settings, or else the best one."""
    llamas = [other for other in groups if other["is_llama"]]
    same = [llama for llama in llamas if llama["settings"] == group["settings"]]
    known = [llama for llama in llamas if llama["quality"] is not None]
    if same or not known:
        return next(iter(same or llamas), None)
    return min(known, key=lambda llama: metric.cost(llama["quality"].mean))


def _versus(group: Group, other: Group | None) -> Comparison | None:
    if other is None or other is group or not group["values"] or not other["values"]:
        return None
    return compare(group["values"], other["values"])


def _relative(group: Group, llama: Group | None) -> Group:
    """What training costs; without a Llama, relative to the FLOPs that are counted for one."""
    own, tokens = group["train_flops_per_token"], group["tokens"]
    if llama is None:
        llama = {"label": None, "speed": None, "train_flops_per_token": llama_flops(next(group["runs"].itertuples()))}
    flops = llama["train_flops_per_token"]
    is_timed = group["speed"] and llama["speed"] and _ways_to_run(group["runs"]) == _ways_to_run(llama["runs"])
    return {
        "baseline": llama["label"],
        "flops_ratio": own / flops if own is not None and flops else None,
        "time_ratio": llama["speed"] / group["speed"] if is_timed else None,
        "train_flops": own * tokens if own is not None and tokens is not None else None,
    }


def _ways_to_run(runs: DataFrame) -> set[tuple[str, ...]]:
    """What decides how fast a group trains; runs of earlier versions did not write their hardware down."""
    return {
        (
            *(str(run.config.get(key)) for key in _DECIDES_SPEED),
            *(str(run.results.get(key)) for key in ("num_processes", "hardware")),
        )
        for run in runs.itertuples()
    }


def llama_flops(run: Row) -> float | None:
    """FLOPs of training a Llama of the run's sizes on a token.

    `None` where these sizes do not give the run's own FLOPs either: then its configuration does not hold all of them.
    """
    model = {key.removeprefix("model."): value for key, value in run.config.items() if key.startswith("model.")}
    model["vocab_size"] = model.get("vocab_size") or run.config.get("tokenizer.vocab_size")
    model["sliding_window"] = model.get("sliding_window") or DEFAULT_SLIDING_WINDOW
    plan, own = run.plan, run.train_flops_per_token
    if plan is None or run.context_length is None or own is None:
        return None
    names = ("forward_passes", "backward_passes", "cyclic_groups", "use_sequential")
    iteration, length = Iteration(**{name: model[name] for name in names if name in model}), int(run.context_length)
    try:
        sizes = ModelSizes.from_config(model)
        counted = count_flops(plan, sizes, length, iteration).train
    # An earlier version's, a damaged one, or one that leaves sizes to a pretrained model.
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    if counted is None or not math.isclose(counted, own, rel_tol=1e-6):
        return None
    return count_flops(llama_plan(plan), sizes.of_llama, length, iteration).train


def pareto_front(candidates: DataFrame) -> DataFrame:
    """Those of less `cost` than all that have as little `written` or less, from few bytes to many."""
    ordered = candidates.sort_values(["written", "cost"])
    # Each against the best of those before it, of which none needs more; the first has nothing to beat.
    return ordered[ordered["cost"] < ordered["cost"].cummin().shift(fill_value=math.inf)]


def budgets_of(fractions: Iterable[float]) -> list[float]:
    """Fractions of Llama's bytes, from large to small: those that patterns need, or where these are many, halves."""
    needed = sorted({round(fraction, 9) for fraction in fractions}, reverse=True)
    if len(needed) <= _MAX_BUDGETS:
        return needed
    halves = [needed[0], *(0.5**power for power in range(1, 16) if needed[-1] < 0.5**power < needed[0]), needed[-1]]
    shuts_out = [any(low < fraction <= high for fraction in needed) for high, low in pairwise(halves)]
    return [halves[0], *(budget for budget, is_needed in zip(halves[1:], shuts_out, strict=True) if is_needed)]


def _budget(fraction: float, candidates: DataFrame) -> Budget:
    within = candidates[candidates["fraction"] <= fraction + _TOLERANCE]
    best, *others = within.sort_values(["cost", "written"]).itertuples()
    tests = adjust([compare(other.values, best.values) for other in others])
    return Budget(fraction, [best, *others], {other.label: test for other, test in zip(others, tests, strict=True)})


def show_fraction(fraction: float) -> str:
    """3/8 where it is one, else percent."""
    nearest = Fraction(fraction).limit_denominator(_MAX_DENOMINATOR)
    return str(nearest) if abs(nearest - fraction) < 1e-6 else f"{fraction:.3g}"
