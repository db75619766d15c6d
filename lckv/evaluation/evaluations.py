"""What every evaluation gets and gives, where each one is, and how they are run."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from lckv.config import DataConfig, EvaluationConfig
from lckv.config.evaluation import default_context_length
from lckv.errors import UserError, is_out_of_memory
from lckv.evaluation.perplexity import in_eval_mode
from lckv.utils.logits import check_logits


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

    @torch.no_grad()
    def last_log_probabilities(self, input_ids: Tensor, *, num_kept: int, num_cached: int) -> Tensor:
        """What the model expects behind each of the last tokens.

        Args:
            input_ids: `(batch, q_len)`, without padding.
            num_kept: for how many of the last tokens; logits of no others are computed.
            num_cached: with a cache, how many of the first tokens are written to it before the others are scored.

        Returns:
            `(batch, num_kept, vocab_size)` in float32, on the CPU.

        Raises:
            UserError: if the logits are not finite.
        """
        input_ids = input_ids.to(self.model.device)
        options: dict[str, Any] = {"use_cache": False}
        if self.new_cache is not None:
            options = {"past_key_values": self.new_cache(), "use_cache": True}
            self.model(input_ids[:, :num_cached], **options, logits_to_keep=1)
            input_ids = input_ids[:, num_cached:]
        outputs = self.model(input_ids, **options, logits_to_keep=num_kept)
        check_logits(outputs.logits.flatten(0, 1), "the model's logits")
        return outputs.logits.float().log_softmax(dim=-1).cpu()


Evaluation = Callable[[Subject, EvaluationConfig], dict[str, Any]]
"""Gives figures that JSON can hold, and shows a progress bar of its own; the model is in evaluation mode."""

Outcome = dict[str, Any] | UserError
"""The figures of an evaluation, or why there are none."""

FUNCTIONS = {
    "perplexity": "lckv.evaluation.sliding:evaluate_sliding",
    "harness": "lckv.evaluation.harness:harness",
    "needle": "lckv.evaluation.needle:needle",
    "recall": "lckv.evaluation.recall:recall",
    "speed": "lckv.benchmarking.speed:evaluate_speed",
}
"""The evaluations, by the names of the settings; as text, because one of them needs what lies above this package."""


def find_evaluation(name: str) -> Evaluation:
    """The evaluation of this name, imported now."""
    return pkgutil.resolve_name(FUNCTIONS[name])


def run_evaluations(
    subject: Subject, config: EvaluationConfig, settings: Mapping[str, Any]
) -> Iterator[tuple[str, Outcome]]:
    """Yields the name and the outcome of each evaluation as soon as it is done.

    Args:
        subject: what is evaluated; its model's mode and the random state stay as they are.
        config: which evaluations, and their settings.
        settings: further settings on which the figures depend, noted with them.
    """
    common = {
        "batch_size": config.batch_size,
        "forward_passes": config.forward_passes,
        "seed": subject.seed,
        "data": asdict(subject.data),
        **settings,
    }
    if subject.folder is not None:
        subject.folder.mkdir(parents=True, exist_ok=True)
    for name in config.evals:
        try:
            with in_eval_mode(subject.model, config.forward_passes):
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
