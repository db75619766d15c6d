"""Runs without a result: which they are, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lckv.reporting.collecting import Run, number


@dataclass(frozen=True)
class Trouble:
    """A run that no figure is taken from.

    Attributes:
        run: it.
        state: "failed", "diverged", "unreadable" or "unfinished".
        reason: what went wrong, or how far it has come.
    """

    run: Run
    state: str
    reason: str


def trouble_of(run: Run) -> Trouble | None:
    """What keeps a run's figures out of the report; `None` where nothing does."""
    if run.results:
        value = run.results.get("eval_loss")
        is_finite = value is None or number(value) is not None
        return None if is_finite else Trouble(run, "diverged", f"the validation loss is {value}")
    if run.failure:
        return Trouble(run, "failed", _reason(run.failure))
    if run.problems:
        return Trouble(run, "unreadable", "; ".join(run.problems))
    return Trouble(run, "unfinished", _progress(run))


def troubles_of(runs: Iterable[Run]) -> list[Trouble]:
    """Those of all runs, failures first."""
    found = [trouble for run in runs if (trouble := trouble_of(run)) is not None]
    return sorted(found, key=lambda trouble: trouble.state == "unfinished")


def _reason(failure: Any) -> str:
    error = " ".join(str(failure.get("error") or "no reason is given").split())
    kind = str(failure.get("type") or "")
    return error if not kind or error.startswith(kind) else f"{kind}: {error}"


def _progress(run: Run) -> str:
    steps = [step for line in run.lines if (step := number(line.get("step"))) is not None]
    max_steps = number(run.config.get("trainer.max_steps"))
    total = "" if max_steps is None else f" of {max_steps:,}"
    return f"step {max(steps):,.0f}{total}" if steps else f"no step{total} is logged yet"
