"""The answers: the best pattern per budget, one sentence each, that claims no more than the seeds allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from lckv.reporting.analysis import Budget, Cohort, Report
from lckv.reporting.budgets import show_fraction
from lckv.reporting.metrics import Metric
from lckv.reporting.statistics import Comparison


@dataclass(frozen=True)
class Answer:
    """A sentence in three parts, so that the name of the pattern can stand out.

    Attributes:
        question: the budget.
        best: the pattern.
        reason: what it reaches, and how sure that is.
    """

    question: str
    best: str
    reason: str

    def __str__(self) -> str:
        return f"{self.question} {self.best} {self.reason}"


def answers(report: Report) -> list[Answer]:
    """One sentence for each set of comparable runs, and for the budgets in which the same pattern is best."""
    return [answer for cohort in report.cohorts for answer in _of_cohort(cohort, report.metric)]


def status(report: Report) -> str:
    """How many runs there are, and what became of them, in one sentence."""
    counts = [(len(report.finished), "finished")]
    states = [trouble.state for trouble in report.troubles]
    counts += [(states.count(state), state) for state in dict.fromkeys(states)]
    counts.append((len(report.runs) - sum(count for count, _ in counts), "repeated"))
    parts = ", ".join(f"{count} {state}" for count, state in counts if count or state == "finished")
    total = len(report.runs)
    return f"{total} run{'s' * (total != 1)}: {parts}.{_nothing_to_say(report)}"


def _nothing_to_say(report: Report) -> str:
    if not report.finished:
        return " No run has finished, so there is no figure to show."
    is_comparable = any(len(cohort.candidates) > 1 for cohort in report.cohorts)
    return "" if is_comparable else " No two patterns can be compared."


def _of_cohort(cohort: Cohort, metric: Metric) -> Iterator[Answer]:
    if len(cohort.candidates) < 2:
        return
    prefix = f"Set {cohort.name}. " if cohort.name else ""
    for _, budgets in groupby(cohort.budgets, key=lambda budget: budget.best.group.label):
        largest, *others = budgets
        question = _question(largest, others[-1] if others else largest)
        yield Answer(prefix + question, largest.best.group.label, _reason(largest, metric))


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
    best = budget.best
    needs = f" (it needs {show_fraction(best.fraction)})" if best.fraction < budget.fraction - 1e-9 else ""
    reached = f"{metric.show_summary(best.quality)} {metric.label} over {_seeds(best.quality.n)}"
    if len(budget.candidates) == 1:
        return f"is the only one, with {reached}."
    second = budget.candidates[1]
    rival = f"{second.group.label} ({metric.show_summary(second.quality)})"
    return f"is best{needs}, with {reached}; {_lead(budget.versus_best[second.group.label], rival)}."


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


def _seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"
