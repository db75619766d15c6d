"""The model as lm-eval sees it: its own `hf` model, but through the caches of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers import Cache, PreTrainedModel

from lckv.cache import KVCache, build_cache
from lckv.config import HarnessConfig
from lckv.errors import UserError
from lckv.evaluation.evaluations import Subject

_FLOATS_PER_LOGIT = 3
"""Logits, their logarithms, and what comes and goes in between."""


def make_language_model(subject: Subject, options: HarnessConfig) -> Any:
    """The `lm_eval.api.model.LM` for a subject; its class is made here, because lm-eval is optional."""
    from lm_eval.models.huggingface import HFLM

    class SubjectLM(HFLM):
        """Scores and continues by the subject's model and cache; all else is lm-eval's own."""

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            longest = max((len(answer) for _, _, answer in requests), default=0)
            if longest > self.max_length:
                raise UserError(
                    f"an answer of {longest} tokens does not fit the {self.max_length} that the model sees at once"
                )
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(
            self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
        ) -> torch.Tensor:
            # Without the mask: padding is on the right, where no token that counts can see it.
            return score(self.model, inps, subject.new_cache)

        def _model_generate(
            self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
        ) -> torch.Tensor:
            past = build_cache("dynamic", self.model.config) if subject.new_cache is None else subject.new_cache()
            # transformers would compile the steps of a static cache by itself.
            own = {"past_key_values": past, "disable_compile": True}
            return super()._model_generate(context, max_length, stop, **own, **generation_kwargs)

        def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
            if self.device.type != "cpu":
                return super()._detect_batch_size(requests, pos)
            # lm-eval tries until memory runs out, which on a CPU ends the process.
            num_tokens = self.max_length if requests is None else len(requests[pos][1] + requests[pos][2])
            return num_rows_that_fit(self.model, min(num_tokens, self.max_length), self.max_batch_size)

    return SubjectLM(
        subject.model,
        tokenizer=copy.deepcopy(subject.tokenizer),  # lm-eval gives padding to one that has none
        backend="causal",
        max_length=options.max_length,
        batch_size=options.batch_size,
    )


@torch.no_grad()
def score(model: PreTrainedModel, input_ids: torch.Tensor, new_cache: Callable[[], Cache] | None) -> torch.Tensor:
    """Logits `(batch, q_len, vocab_size)` of tokens `(batch, q_len)` that may be padded on the right.

    Through a cache, all tokens go at once, unless it rounds those of earlier calls only: then so few at a time that
    hardly more of them are exact than when text is decoded.
    """
    if new_cache is None:
        return model(input_ids, use_cache=False).logits
    past = new_cache()
    # How many of the last tokens a cache that rounds keeps as they are; `None` if it keeps all.
    num_exact = past.options().get("residual_length") if isinstance(past, KVCache) else None
    pieces = input_ids.split(input_ids.shape[1] if num_exact is None else max(1, num_exact), dim=1)
    return torch.cat([model(piece, past_key_values=past, use_cache=True).logits for piece in pieces], dim=1)


def num_rows_that_fit(model: PreTrainedModel, num_tokens: int, max_rows: int) -> int:
    """How many sequences' logits fit into half of the memory that is free, at least 1 and at most `max_rows`."""
    row_bytes = num_tokens * model.config.vocab_size * torch.float32.itemsize * _FLOATS_PER_LOGIT
    return max(1, min(max_rows, psutil.virtual_memory().available // 2 // row_bytes))
