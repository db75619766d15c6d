"""What every evaluation gets and gives; an evaluation is one function, registered under the name that `evals` lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from lckv.config import DataConfig, EvaluationConfig
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
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    new_cache: Callable[[], Cache] | None = None
    seed: int = 0


Evaluation = Callable[[Subject, EvaluationConfig], dict[str, Any]]
"""Gives figures that JSON can hold; shows a progress bar of its own, and leaves model and random state as they were."""

EVALUATIONS: Registry[Evaluation] = Registry("evaluation")
