"""What every evaluation gets and gives; each is one function, registered under the name that `evals` lists."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from lckv.config import DataConfig, EvaluationConfig
from lckv.config.evaluation import default_context_length
from lckv.evaluation import MODULES
from lckv.registry import Registry


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        model: a causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        data: the text; its validation split counts.
        new_cache: makes an empty cache; `None`: sequences are scored in one forward pass, without a cache.
        seed: of whatever is drawn.
        trained_length: tokens of the sequences that it was trained on, where that is known: positions behind those
            are new to it.
        folder: where files beside `results.json` go, such as pictures; `None`: nowhere.
        key_prefix: what stands before the names of settings in error messages, such as `evaluation.`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    new_cache: Callable[[], Cache] | None = None
    seed: int = 0
    trained_length: int | None = None
    folder: Path | None = None
    key_prefix: str = ""

    @property
    def default_context_length(self) -> int:
        """Tokens that the model sees at once where nothing else is asked for."""
        return default_context_length(self.model.config.max_position_embeddings, self.trained_length)


Evaluation = Callable[[Subject, EvaluationConfig], dict[str, Any]]
"""Gives figures that JSON can hold, shows a progress bar of its own, and leaves model and random state alone."""

EVALUATIONS: Registry[Evaluation] = Registry("evaluation")


def find_evaluation(name: str) -> Evaluation:
    """The evaluation of this name, imported now."""
    importlib.import_module(MODULES[name])
    return EVALUATIONS[name]
