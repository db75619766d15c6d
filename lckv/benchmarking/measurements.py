"""What was measured, and how one contender compares with the first."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lckv.costs import FlopsPerToken, KVBytes


@dataclass(frozen=True)
class Workload:
    """What every contender has to do.

    Attributes:
        prompt_length: tokens of the prompt.
        new_tokens: decoding steps behind it, one token each.
        batch_sizes: how many sequences decode side by side, one measurement each.
        kv_budget: bytes; the largest batch whose keys and values (KV) fit is measured, too. `None`: no such batch.
        max_batch_size: the largest batch that the budget may lead to.
        rounds: how often everything is timed.
        prefill_chunk: tokens of the prompt that run at once; `None` for all.
        prefill_passes: passes over layers that read upward, or "converge"; `None` for the model's own.
        prefill_tolerance: with "converge", when to stop; `None` for the model's own.
        seed: of the prompts.
    """

    prompt_length: int
    new_tokens: int
    batch_sizes: tuple[int, ...] = (1,)
    kv_budget: int | None = None
    max_batch_size: int = 4096
    rounds: int = 5
    prefill_chunk: int | None = None
    prefill_passes: int | str | None = None
    prefill_tolerance: float | None = None
    seed: int = 0

    @property
    def length(self) -> int:
        """Tokens of a sequence at its end."""
        return self.prompt_length + self.new_tokens


@dataclass
class BatchMeasurements:
    """Decoding with one batch size.

    Attributes:
        batch_size: number of sequences.
        fills_budget: whether it is the largest batch that fits the budget.
        planned_kv_bytes: of the cache behind the last step, by arithmetic.
        kv_bytes: the same, measured.
        peak_bytes: memory beyond weights and inputs, the cache included, of the last step.
        seconds: of all steps, for each round.
        error: why there are no (more) figures.
    """

    batch_size: int
    fills_budget: bool
    planned_kv_bytes: int
    kv_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass
class Measurements:
    """Everything that is known about one contender; what could not be measured is `None` or empty.

    Attributes:
        label: what it is called.
        layer_types: its sharing pattern.
        cache: name of the cache.
        cache_options: and its options.
        kv_bytes: by arithmetic, for one sequence behind the last step in a cache that keeps the model's own numbers.
        flops: by arithmetic, for the prompt (run at once) and for the last step.
        weight_bytes: bytes of the parameters.
        error: why there are no (more) figures.
        resident_bytes: live tensors of the cache of one sequence, behind the last step.
        written_bytes: states that the cache was given in the last step, and what a token takes once it is encoded, if
            it is: codes, scales and zero points.
        read_bytes: keys and values that attention was given in the last step, over all layers; of a cache that
            quantises, what it decoded in that step, as it is stored, and the tokens that it keeps as they are.
        prefill_peak_bytes: memory beyond weights and inputs, the cache included, of the prefill of one sequence.
        prefill_passes: over the layers that read upward, for each chunk of the prompt.
        prefill_residual: how far KV moved in the last pass, relative to its size.
        prefill_seconds: of one sequence, for each round.
        first_token_seconds: from an empty hand to the first token: cache, prefill and choice; for each round.
        batches: decoding.
    """

    label: str
    layer_types: str
    cache: str
    cache_options: dict[str, Any]
    kv_bytes: KVBytes
    flops: FlopsPerToken
    weight_bytes: int
    error: str | None = None
    resident_bytes: int | None = None
    written_bytes: int | None = None
    read_bytes: int | None = None
    prefill_peak_bytes: int | None = None
    prefill_passes: list[int] = field(default_factory=list)
    prefill_residual: float | None = None
    prefill_seconds: list[float] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    batches: list[BatchMeasurements] = field(default_factory=list)

    def batch(self, batch_size: int) -> BatchMeasurements | None:
        """The measurement with this batch size, the budget's apart."""
        return next(
            (batch for batch in self.batches if batch.batch_size == batch_size and not batch.fills_budget), None
        )

    @property
    def budget_batch(self) -> BatchMeasurements | None:
        """The measurement with the largest batch that fits the budget."""
        return next((batch for batch in self.batches if batch.fills_budget), None)


def median(values: Sequence[float]) -> float | None:
    """The median, if there is anything."""
    return statistics.median(values) if values else None


def ratio(mine: Sequence[float], other: Sequence[float]) -> float | None:
    """The median over the rounds of the ratio within a round."""
    return median([own / base for own, base in zip(mine, other, strict=False)])


def tokens_per_second(batch: BatchMeasurements | None, new_tokens: int) -> list[float]:
    """Of all sequences together, for each round."""
    return [] if batch is None else [batch.batch_size * new_tokens / seconds for seconds in batch.seconds]
