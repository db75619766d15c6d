"""Loss curves of groups: means over seeds at the steps that all seeds have logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lckv.reporting.collecting import Run, number
from lckv.reporting.grouping import Group


@dataclass(frozen=True)
class Point:
    """One place of a curve.

    Attributes:
        tokens: seen so far.
        loss: in nats per token.
        seconds: since the start; `None` if it was not logged.
        flops: spent on training so far; `None` if their number is not known.
    """

    tokens: float
    loss: float
    seconds: float | None
    flops: float | None


@dataclass(frozen=True)
class Curves:
    """The mean curves of a group.

    Attributes:
        group: the runs.
        training: the loss with the text, as logged.
        validation: the loss on held-out text.
    """

    group: Group
    training: tuple[Point, ...]
    validation: tuple[Point, ...]


def curves_of(groups: Iterable[Group]) -> list[Curves]:
    """The curves of the groups that have any."""
    curves = [Curves(group, _mean_curve(group, _training), _mean_curve(group, _validation)) for group in groups]
    return [each for each in curves if each.training or each.validation]


def _training(run: Run) -> dict[float, Mapping[str, Any]]:
    return {
        line["step"]: {**line, "loss": line.get("loss_labels", line["loss"])}
        for line in run.lines
        if number(line.get("loss")) is not None and number(line.get("step")) is not None
    }


def _validation(run: Run) -> dict[float, Mapping[str, Any]]:
    """Evaluations do not log the time; training does, in the same step."""
    seconds = {step: line.get("seconds") for step, line in _training(run).items()}
    return {
        line["step"]: {**line, "loss": line["eval_loss"], "seconds": seconds.get(line["step"])}
        for line in run.lines
        if number(line.get("eval_loss")) is not None and number(line.get("step")) is not None
    }


def _mean_curve(group: Group, read: Any) -> tuple[Point, ...]:
    lines = [read(run) for run in group.runs]
    steps = sorted(set.intersection(*(set(each) for each in lines)))
    flops_per_token = group.figure("train_flops_per_token")
    points = []
    for step in steps:
        tokens, loss, seconds = (
            _mean([each[step].get(key) for each in lines]) for key in ("tokens", "loss", "seconds")
        )
        if tokens is not None and loss is not None:
            points.append(Point(tokens, loss, seconds, flops_per_token and flops_per_token * tokens))
    return tuple(points)


def _mean(values: Sequence[Any]) -> float | None:
    known = [figure for value in values if (figure := number(value)) is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
