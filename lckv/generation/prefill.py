"""Fills a cache with a prompt, in chunks, iterating each chunk until its keys and values (KV) are final."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from lckv.config.keys import passes
from lckv.errors import UserError, check_positive, check_whole_number
from lckv.models.parts.sharing_cache import SharingCache
from lckv.sharing.iteration import exact_unless
from lckv.utils.padding import positions


@dataclass(frozen=True)
class PrefillOptions:
    """How a prompt goes through the model; the attributes are those of [`prefill`]."""

    chunk_size: int | None = None
    forward_passes: int | str | None = None
    tolerance: float | None = None

    @property
    def iteration(self) -> dict[str, Any]:
        """The arguments of the model's `forward` that say how often a cycle runs."""
        return exact_unless(self.forward_passes, self.tolerance)


@dataclass
class PrefillReport:
    """What a prefill came to.

    Attributes:
        logits: of the token after the prompt, `(batch, vocab_size)`.
        num_passes: for each chunk, how often the layers of a cycle ran; 1 where no layer reads upward.
        residuals: for each chunk that took several passes, how far KV still moved in the last one, relative to its
            size.
        seconds: wall time.
    """

    logits: torch.Tensor
    num_passes: list[int] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def residual(self) -> float | None:
        """The largest residual of all chunks, if there is any."""
        return max(self.residuals, default=None)


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    past_key_values: Cache,
    *,
    attention_mask: torch.Tensor | None = None,
    chunk_size: int | None = None,
    forward_passes: int | str | None = None,
    tolerance: float | None = None,
    on_chunk: Callable[[int], Any] | None = None,
) -> PrefillReport:
    """Writes the prompt's KV to the cache.

    The layers above the highest one that computes KV run for one position of a chunk only. Where layers read upward,
    a chunk is iterated before the next begins, so that the chunks behind it read KV that is final up to `tolerance`.
    Memory grows with `chunk_size` times the length of the prompt, not with the length's square. What does not fit into
    a cache that then takes single tokens is a chunk of its own, which the model runs token by token.

    Args:
        model: the model, in evaluation mode.
        input_ids: `(batch, q_len)`, the tokens that are not in the cache yet.
        past_key_values: the cache to fill, empty or not.
        attention_mask: `(batch, past + q_len or more)`, zero at padding.
        chunk_size: how many tokens to run at once; all by default.
        forward_passes: passes before the model's `backward_passes` last ones, or `"converge"`, which adds but one and
            is the default.
        tolerance: with `"converge"`, the relative change of KV that ends the iteration; by default one that changes no
            greedy text.
        on_chunk: called after each chunk with the number of its tokens, for a progress bar.

    Raises:
        UserError: if the prompt is empty, or the chunk size below 1.
    """
    if input_ids.shape[1] < 1:
        raise UserError("the prompt is empty: give at least one token")
    if chunk_size is not None:
        check_whole_number("prefill chunk", chunk_size)
    if forward_passes is not None:
        passes("prefill passes", forward_passes)
    if tolerance is not None:
        check_positive("prefill tolerance", tolerance)
    num_past = int(past_key_values.get_seq_length())
    position_ids = None if attention_mask is None else positions(attention_mask)
    report = PrefillReport(logits=input_ids.new_empty(0))
    start_time = time.perf_counter()
    for chunk in _chunks(input_ids, past_key_values, chunk_size or input_ids.shape[1]):
        stop = num_past + chunk.shape[1]
        outputs = model(
            chunk,
            attention_mask=None if attention_mask is None else attention_mask[:, :stop],
            position_ids=None if position_ids is None else position_ids[:, num_past:stop],
            past_key_values=past_key_values,
            use_cache=True,
            logits_to_keep=1,
            **exact_unless(forward_passes, tolerance),
            output_kv_residual=True,
        )
        num_past = stop
        report.logits = outputs.logits[:, -1]
        report.num_passes.append(outputs.num_passes)
        # After as many passes as tokens nothing is left to change, however much the last pass still did.
        if outputs.kv_residual is not None and outputs.num_passes < chunk.shape[1]:
            report.residuals.append(float(outputs.kv_residual))
        if on_chunk is not None:
            on_chunk(chunk.shape[1])
    if input_ids.is_cuda:
        torch.cuda.synchronize(input_ids.device)
    report.seconds = time.perf_counter() - start_time
    return report


def num_at_once(past_key_values: Cache, num_tokens: int) -> int:
    """How many of the next `num_tokens` tokens, at least one, the cache takes in one parallel call."""
    if not isinstance(past_key_values, SharingCache):
        return num_tokens
    return 1 + bisect_left(range(2, num_tokens + 1), True, key=past_key_values.needs_single_tokens)


def _chunks(input_ids: torch.Tensor, past_key_values: Cache, chunk_size: int) -> Iterator[torch.Tensor]:
    """Pieces of at most `chunk_size` tokens, each cut where the cache, as it then is, begins to take single tokens."""
    for chunk in input_ids.split(chunk_size, dim=1):
        num_parallel = num_at_once(past_key_values, chunk.shape[1])
        if 1 < num_parallel < chunk.shape[1]:
            yield chunk[:, :num_parallel]
            chunk = chunk[:, num_parallel:]
        yield chunk
