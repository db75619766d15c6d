"""Evaluations during training, beside the loss on the validation blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from lckv.config import TrainConfig
from lckv.errors import UserError
from lckv.evaluation.evaluations import Outcome, Subject, run_evaluations, scalar_figures
from lckv.training.callbacks import is_due
from lckv.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

Evaluate = Callable[[], Iterable[tuple[str, Outcome]]]
"""Evaluates the model that is trained, and yields each evaluation's name and outcome."""


def build_evaluate(
    cfg: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: RunFolder
) -> Evaluate | None:
    """What evaluates the model during training, if anything is to.

    Raises:
        UserError: for texts that are longer than the model allows, and for tasks that cannot be had.
    """
    if not cfg.evaluation.evals:
        return None
    cfg.evaluation.check_lengths(model.config.max_position_embeddings, cfg.data.block_size, "evaluation.")
    if "harness" in cfg.evaluation.evals:
        from lckv.evaluation.harness import check_installed
        from lckv.evaluation.harness_tasks import check_tasks

        check_installed()
        check_tasks(cfg.evaluation.harness, "evaluation.harness.")
    subject = Subject(
        model,
        tokenizer,
        cfg.data,
        seed=cfg.seed,
        trained_length=cfg.data.block_size,
        folder=folder.path / "evaluation",
        key_prefix="evaluation.",
    )
    return partial(run_evaluations, subject, cfg.evaluation, {"cache": {"name": "none"}})


@dataclass(eq=False)
class EvaluationsCallback(TrainerCallback):
    """Adds the numbers among the figures of evaluations, every so many steps and at the end.

    One process evaluates, and the others wait. An evaluation that cannot be done says why, and the training goes on.

    Attributes:
        evaluate: runs the evaluations.
        every: how often; `None`: at the end.
        wait: makes the processes wait for each other.
        pause: takes the training's own bar away meanwhile.
        figures: what the last evaluations came to, by their names; `None`: there were none yet.
    """

    evaluate: Evaluate
    every: int | None
    wait: Callable[[], None]
    pause: Callable[[], AbstractContextManager[None]]
    figures: dict[str, dict[str, Any]] | None = None

    def on_log(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the numbers to the training metrics of the steps that are due, as `perplexity/word_perplexity`."""
        logs = kwargs["logs"]
        if "loss" not in logs or not is_due(state, self.every):
            return
        if state.is_world_process_zero:
            logs.update(scalar_figures(self.run()))
        self.wait()

    def run(self) -> Mapping[str, dict[str, Any]]:
        """Runs the evaluations and keeps their figures."""
        self.figures = {}
        # A compiled layer would be compiled again for every length.
        with self.pause(), torch.compiler.set_stance("force_eager"):
            for name, outcome in self.evaluate():
                if isinstance(outcome, UserError):
                    logger.warning("%s: %s", name, outcome)
                    self.figures[name] = {"error": str(outcome)}
                else:
                    self.figures[name] = outcome
                    for part, line in outcome.get("errors", {}).items():
                        logger.warning("%s: %s: %s", name, part, line)
        return self.figures
