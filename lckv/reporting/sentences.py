"""What a report says in words: the answers, which claim no more than the seeds allow, and how far to trust figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import groupby
from typing import NamedTuple

from lckv.config import EvaluationConfig
from lckv.config.evaluation import EVALUATIONS
from lckv.config.names import NO_CACHE
from lckv.reporting.analysis import Budget, Cohort, Report, show_fraction
from lckv.reporting.grouping import list_names
from lckv.reporting.metrics import SIGNIFICANT, Comparison, Metric
from lckv.sharing.iteration import CONVERGE
from lckv.training.run_folder import flatten

_CHANGES_NO_FIGURE = {
    "seed",
    "batch_size",
    "num_threads",
    "data.cache_dir",
    "log_samples",
    "output_path",
    "bootstrap_iters",
}
"""Settings of evaluations; of `speed`, which counts time, `seed` alone."""


class Answer(NamedTuple):
    """A sentence in three parts, so that the name of the pattern can stand out."""

    question: str
    best: str
    reason: str

    def __str__(self) -> str:
        return " ".join(self)


def answers(report: Report) -> list[Answer]:
    """One sentence for each set of comparable runs, and for the budgets in which the same pattern is best."""
    return [answer for cohort in report.cohorts for answer in _of_cohort(cohort, report.metric)]


def status(report: Report) -> str:
    """How many runs there are, and what became of them, in one sentence."""
    states = [run.state for run in report.troubles]
    counts = {"finished": len(report.finished)} | {state: states.count(state) for state in states}
    counts["repeated"] = len(report.runs) - sum(counts.values())
    parts = ", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "finished")
    total, nothing = len(report.runs), ""
    if not report.cohorts:
        nothing = " No run has finished, so there is no figure to show."
    elif all(len(cohort.candidates) < 2 for cohort in report.cohorts):
        nothing = " No two patterns can be compared."
    return f"{total} run{'s' * (total != 1)}: {parts}.{nothing}"


def _of_cohort(cohort: Cohort, metric: Metric) -> Iterator[Answer]:
    if len(cohort.candidates) < 2:
        return
    prefix = f"Set {cohort.name}. " if cohort.name else ""
    for _, budgets in groupby(cohort.budgets, key=lambda budget: budget.best.label):
        largest, *others = budgets
        question = _question(largest, others[-1] if others else largest)
        yield Answer(prefix + question, largest.best.label, _reason(largest, metric))


def _question(largest: Budget, smallest: Budget) -> str:
    """The budgets from the largest to the smallest that have the same best pattern."""
    llama_bytes = largest.best.written / largest.best.fraction
    high, low = (f"{budget.fraction * llama_bytes:,.0f}" for budget in (largest, smallest))
    part = "all" if largest.fraction >= 1 else show_fraction(largest.fraction)
    if smallest is not largest:
        return (
            f"From {part} of Llama's KV bytes down to {show_fraction(smallest.fraction)} ({high} to {low} per token):"
        )
    return f"{'With' if part == 'all' else 'Up to'} {part} of Llama's KV bytes ({high} per token):"


def _reason(budget: Budget, metric: Metric) -> str:
    best, *others = budget.ranking
    needs = f" (it needs {show_fraction(best.fraction)})" if best.fraction < budget.fraction - 1e-9 else ""
    seeds = f"{best.quality.n} seed{'s' * (best.quality.n != 1)}"
    reached = f"{metric.show_summary(best.quality)} {metric.label} over {seeds}"
    if not others:
        return f"is the only one, with {reached}."
    rival = f"{others[0].label} ({metric.show_summary(others[0].quality)})"
    return f"is best{needs}, with {reached}; {_lead(budget.versus_best[others[0].label], rival)}."


def _lead(test: Comparison, rival: str) -> str:
    if test.difference == 0:
        return f"level with {rival}"
    if test.p is None:
        return f"the next is {rival}; {test.test}"
    certainty = "more than" if test.is_significant else "within"
    return f"its lead over the next, {rival}, is {certainty} the noise of the seeds ({show_p(test.adjusted_p)})"


def show_p(p: float | None) -> str:
    """A p-value, as papers write it."""
    if p is None:
        return "–"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def method_notes(report: Report) -> list[str]:
    """What the columns mean, and how far the figures can be trusted."""
    contexts = {run.context_length for run in report.finished} - {None}
    lengths = ", ".join(f"{each:,.0f}" for each in sorted(filter(None, contexts)))
    context = f" in a context of {lengths or 'the trained length in'} tokens"
    return [
        "KV written: bytes of keys and values that each new token adds, in 16 bits. KV resident: bytes held per "
        f"token. KV read: bytes loaded to decode one token. The last two{context}.",
        f"{_seeds(report)} Figures are means, with the sample standard deviation (n − 1) behind ±. Runs are averaged "
        "if they differ in no more than the seed and in settings that change no result.",
        "Tests: a t-test paired by seed where two groups have the same seeds, else Welch's; two-sided. p (Holm) is "
        f"adjusted for the number of tests against Llama, and within each budget; the level is {SIGNIFICANT}. The "
        "best of a budget was chosen on the same figures, which makes these p-values a little too small; two or "
        "three seeds detect nothing but large differences.",
        "Training FLOPs are counted, iterations included. Training time is measured, and compared only where "
        "hardware, number of threads and way of training are the same, as far as runs note them; what else the "
        "machine did falls into it. "
        f"{_hardware(report)}",
        *_passes(report),
        *(note for evaluation in EVALUATIONS for note in _settings(report, evaluation)),
        _versions(report),
    ]


def _seeds(report: Report) -> str:
    counts = sorted({len(row.runs) for row in report.rows})
    if counts in ([], [1]):
        return "One seed for each pattern: no spread, no test."
    return f"{counts[0] if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'} seeds for each pattern."


def _hardware(report: Report) -> str:
    found = set()
    for run in report.finished:
        machine = run.results.get("hardware")
        if isinstance(machine, Mapping):
            used = f"{machine.get('num_cores')} cores, {machine.get('num_threads')} threads used"
            found.add(f"{machine.get('device')} ({used})")
        else:
            found.add("not noted")
    return f"Hardware: {'; '.join(sorted(found)) or 'unknown'}."


def _passes(report: Report) -> Iterator[str]:
    """By how many passes over cycles the losses of patterns with cycles were measured."""
    iterating = [run for run in report.finished if run.plan is not None and run.plan.has_cycles]
    # Earlier versions evaluated as they trained, and said nothing.
    exact = [run.results.get("eval_forward_passes") == CONVERGE for run in iterating]
    if not iterating:
        return
    if all(exact):
        yield (
            "Where layers read upward, the validation losses of training are exact: of as many passes as decoding "
            "token by token is worth."
        )
        return
    names = ", ".join(run.name for run, is_exact in zip(iterating, exact, strict=True) if not is_exact)
    yield (
        f"Where layers read upward, the validation losses of training are exact, but for those of {names}, which are "
        "of the training's own passes: decoding may do better or worse."
    )


def _settings(report: Report, evaluation: str) -> Iterator[str]:
    """With which settings an evaluation was made, where they are not the default ones, or not the same for all."""
    config = EvaluationConfig()
    defaults = {"cache.name": NO_CACHE, "forward_passes": config.forward_passes, **asdict(getattr(config, evaluation))}
    ignored = {"seed"} if evaluation == "speed" else _CHANGES_NO_FIGURE
    holders: dict[str, dict[str, list[str]]] = {}
    unusual = set()
    for run in report.finished:
        figures = run.evaluations.get(evaluation)
        settings = figures.get("settings") if isinstance(figures, Mapping) else None
        for key, value in flatten(settings if isinstance(settings, Mapping) else {}):
            holders.setdefault(key, {}).setdefault(text := json.dumps(value).strip('"'), []).append(run.name)
            # The text is by default the one that the run was trained on.
            if value != defaults.get(key, run.config.get(key, value)):
                unusual.add((key, text))
    told = [
        f"{key}={value} in {list_names(names)}"
        for key, values in holders.items()
        for value, names in values.items()
        if key not in ignored and (len(values) > 1 or (key, value) in unusual)
    ]
    if told:
        yield f"Settings of {evaluation}, where not the default ones or not the same for all: {'; '.join(told)}."


def _versions(report: Report) -> str:
    known: dict[str, set[str]] = {}
    for run in report.finished:
        for name, version in run.versions.items():
            known.setdefault(name, set()).add(str(version))
    parts = [f"{name} {', '.join(sorted(versions))}" for name, versions in known.items()]
    return f"Versions: {'; '.join(parts) or 'unknown'}."
