"""What the jobs of a sweep tell the process that started it, wherever they run."""

from __future__ import annotations

from typing import ClassVar

EXTRAS = {
    "hydra/launcher": {"joblib": "sweep", "submitit_local": "sweep", "submitit_slurm": "sweep", "ray": "ray"},
    "hydra/sweeper": {"optuna": "sweep"},
}
"""The extra of this package that brings an option of Hydra's own plugins."""


def missing_extra(group: str, option: str) -> str | None:
    """What to install for an option of one of Hydra's groups that is not there, if it is a plugin's."""
    extra = EXTRAS.get(group, {}).get(option)
    return extra and f"{group}={option}: is not installed; pip install 'lckv[{extra}]'"


class FailedJob:
    """What a failed job returns in place of a result, so that the launcher and the sweeper go on with the others.

    Hydra drops what jobs return. So in a process that gets this object from another one, as with joblib, submitit and
    Ray, it leaves its reason in `received` when it arrives.
    """

    received: ClassVar[list[str]] = []

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __repr__(self) -> str:
        return self.reason

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _receive, (self.reason,)


def _receive(reason: str) -> FailedJob:
    FailedJob.received.append(reason)
    return FailedJob(reason)
