"""Runs evaluations one after the other; one that cannot be done does not keep the others from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from lckv.config import EvaluationConfig
from lckv.errors import UserError, is_out_of_memory
from lckv.evaluation.evaluations import Subject, find_evaluation
from lckv.evaluation.perplexity import in_eval_mode

Outcome = dict[str, Any] | UserError
"""The figures of an evaluation, or why there are none."""


def run_evaluations(
    subject: Subject, config: EvaluationConfig, settings: Mapping[str, Any]
) -> Iterator[tuple[str, Outcome]]:
    """Yields the name and the outcome of each evaluation as soon as it is done.

    Args:
        subject: what is evaluated; its model's mode and the random state stay as they are.
        config: which evaluations, and their settings.
        settings: further settings on which the figures depend, noted with them.
    """
    common = {"batch_size": config.batch_size, "seed": subject.seed, "data": asdict(subject.data), **settings}
    if subject.folder is not None:
        subject.folder.mkdir(parents=True, exist_ok=True)
    for name in config.evals:
        try:
            with in_eval_mode(subject.model):
                figures = find_evaluation(name)(subject, config)
        except UserError as error:
            yield name, error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            yield name, UserError("out of memory; give a smaller batch_size")
        else:
            # Some have a batch size of their own.
            yield name, figures | {"settings": common | asdict(getattr(config, name))}


def scalar_figures(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers among an evaluation's figures, those of nested mappings with their path as the name."""
    for name, value in figures.items():
        if isinstance(value, Mapping) and name != "settings":
            yield from scalar_figures(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
