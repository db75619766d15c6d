"""Perplexity of held-out documents by a sliding window: every token is scored once, with as much context as there is.

The windows are those of transformers' recipe for models of fixed length; unlike there, every token counts the same,
and the documents stay apart. Each begins as in training, with bos if the tokenizer has one, and ends with eos.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from lckv.config import EvaluationConfig
from lckv.data.packing import IGNORE_INDEX
from lckv.data.tokenizer import DocumentEncoder, check_tokenizer
from lckv.evaluation.evaluations import Subject
from lckv.evaluation.perplexity import Perplexity
from lckv.evaluation.text import validation_documents
from lckv.utils.console import track
from lckv.utils.logits import check_logits
from lckv.utils.padding import positions

DEFAULT_CACHE_CHUNK = 32


@dataclass(frozen=True)
class Window:
    """A piece of a document.

    Attributes:
        tokens: `(num_tokens,)`; the model sees all but the last one.
        num_scored: how many of the last ones are scored.
    """

    tokens: np.ndarray
    num_scored: int


def evaluate_sliding(subject: Subject, config: EvaluationConfig) -> dict[str, Any]:
    """Perplexity of the validation documents per token, word and byte, and bits per byte.

    Raises:
        UserError: if there is no validation document, the window does not fit the model, the tokenizer is none for
            documents, or the model's logits are not finite.
    """
    settings, prefix = config.perplexity, f"{subject.key_prefix}perplexity."
    limit = subject.model.config.max_position_embeddings
    context_length, stride = settings.window_sizes(limit, subject.trained_length, prefix)
    windows, counts = _cut_documents(subject, settings.max_documents, context_length, stride)
    total = score_windows(
        subject.model,
        windows,
        batch_size=config.batch_size,
        new_cache=subject.new_cache,
        cache_chunk=settings.cache_chunk or DEFAULT_CACHE_CHUNK,
    )
    # The negative log-likelihood, in nats, per token, word and byte.
    per_token, per_word, per_byte = (
        Perplexity(total / counts[unit], counts[unit]) for unit in ("num_tokens", "num_words", "num_bytes")
    )
    return {
        "loss": per_token.loss,
        "perplexity": per_token.perplexity,
        "word_perplexity": per_word.perplexity,
        "byte_perplexity": per_byte.perplexity,
        "bits_per_byte": per_byte.loss / math.log(2),
        **counts,
        "context_length": context_length,
        "stride": stride,
    }


def _cut_documents(
    subject: Subject, max_documents: int | None, context_length: int, stride: int
) -> tuple[list[Window], dict[str, int]]:
    """The windows of all documents, and how much text they score; the bytes are those of the scored tokens."""
    encoder = DocumentEncoder(check_tokenizer(subject.tokenizer, "the tokenizer"))
    windows: list[Window] = []
    counts = {"num_tokens": 0, "num_words": 0, "num_bytes": 0, "num_documents": 0}
    for document in track(validation_documents(subject.data, max_documents), "tokenising"):
        tokens = encoder.encode([document], with_bytes=True)
        windows += cut_windows(tokens["id"].astype(np.int64), context_length, stride)
        counts["num_words"] += len(document.split())
        counts["num_bytes"] += int(tokens["num_bytes"][1:].sum())
        counts["num_documents"] += 1
    counts["num_tokens"] = sum(window.num_scored for window in windows)
    return windows, counts


def cut_windows(tokens: np.ndarray, context_length: int, stride: int) -> Iterator[Window]:
    """Cuts a document, `(num_tokens,)`, into windows; every token but the first is scored in one of them.

    A window begins every `stride` tokens and reaches over `context_length`; of its tokens, those are scored that no
    earlier one has reached. Where that is all of them, one more token stands before them, so that each has context.
    """
    num_done = 1
    for start in range(0, len(tokens), stride):
        stop = min(start + context_length, len(tokens))
        if stop > num_done:
            yield Window(tokens[min(start, num_done - 1) : stop], stop - num_done)
            num_done = stop
        if stop == len(tokens):
            return


@torch.no_grad()
def score_windows(
    model: nn.Module,
    windows: Sequence[Window],
    *,
    batch_size: int,
    new_cache: Callable[[], Cache] | None = None,
    cache_chunk: int = DEFAULT_CACHE_CHUNK,
) -> float:
    """Negative log-likelihood, in nats, of all scored tokens together.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        windows: what to score.
        batch_size: windows per forward pass.
        new_cache: makes an empty cache, which gets the unscored tokens first and then the others in chunks; without,
            everything goes through the model at once.
        cache_chunk: tokens of such a chunk.

    Raises:
        UserError: if the logits are not finite.
    """
    # The longest first: what does not fit into memory is known at once, and alike lengths need little padding.
    ordered = sorted(windows, key=lambda window: len(window.tokens), reverse=True)
    starts = range(0, len(ordered), batch_size)
    device = next(model.parameters()).device
    total = 0.0
    for start in track(starts, "perplexity", len(starts)):
        batch = collate_windows(ordered[start : start + batch_size], device)
        cache = None if new_cache is None else new_cache()
        for logits, targets in _run(model, *batch, cache, cache_chunk):
            losses = F.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
            )
            check_logits(-losses[None], "the model's logits")
            total += math.fsum(losses.tolist())  # on the CPU: not every device has float64
    return total


def collate_windows(windows: Sequence[Window], device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """Puts windows of different lengths into one batch.

    They are filled up on the left, so that the scored tokens, which are last, share columns: in all the others no
    logits are computed.

    Returns:
        Tokens, attention mask (`None` where there is no padding) and targets, `(batch, q_len)` each; a target is the
        token behind the position, or `IGNORE_INDEX` where that is not scored.
    """
    width = max(len(window.tokens) for window in windows) - 1
    input_ids, is_token = np.zeros((2, len(windows), width), np.int64)
    targets = np.full_like(input_ids, IGNORE_INDEX)
    for row, window in enumerate(windows):
        start = width - len(window.tokens) + 1
        input_ids[row, start:] = window.tokens[:-1]
        is_token[row, start:] = 1
        targets[row, -window.num_scored :] = window.tokens[-window.num_scored :]
    ids, mask, labels = (torch.from_numpy(array).to(device) for array in (input_ids, is_token, targets))
    return ids, None if is_token.all() else mask, labels


def _run(
    model: nn.Module, input_ids: Tensor, mask: Tensor | None, targets: Tensor, cache: Cache | None, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields logits `(batch, num_columns, vocab_size)` of the scored columns, and their targets."""
    width = input_ids.shape[1]
    first = int((targets != IGNORE_INDEX).any(dim=0).nonzero()[0])  # column in which some row is scored
    # Into a cache, the unscored columns go first, in one piece; what is scored then reads it, as decoding does.
    edges = [0, width] if cache is None else [*([0] if first else []), *range(first, width, chunk), width]
    for start, stop in pairwise(edges):
        outputs = model(
            input_ids[:, start:stop],
            attention_mask=None if mask is None else mask[:, :stop],
            position_ids=None if mask is None else positions(mask)[:, start:stop],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=max(1, stop - max(start, first)),  # 0 would mean all
        )
        if stop > first:
            yield outputs.logits, targets[:, max(start, first) : stop]
