"""Measures contenders: bytes on one generation that is not timed, then prefill and decoding, timed.

They take turns, so that other load on the machine falls on all of them.
"""

from __future__ import annotations

import gc
import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

import torch

from lckv.benchmarking.contenders import Contender
from lckv.benchmarking.measurements import BatchMeasurements, Measurements, Workload
from lckv.benchmarking.memory import peak_bytes
from lckv.benchmarking.recording import RecordsTraffic, record_reads
from lckv.cache import KVCache, PagedKVCache
from lckv.console import track
from lckv.costs import FlopsPerToken, ModelSizes, count_flops, count_kv_bytes
from lckv.errors import UserError, is_out_of_memory
from lckv.generation.prefill import PrefillReport, prefill
from lckv.iteration import Iteration
from lckv.logits import check_logits

logger = logging.getLogger(__name__)

FAILURES = (UserError, RuntimeError, ValueError, NotImplementedError, ImportError, MemoryError)
"""What a model, a cache or the memory may refuse; anything else is a fault of the program and ends it."""


class Bench:
    """One contender at work.

    Args:
        contender: what is measured.
        workload: what it has to do.
    """

    def __init__(self, contender: Contender, workload: Workload) -> None:
        self.contender, self.workload = contender, workload
        self.model, self.device, self.dtype = contender.model, contender.model.device, contender.model.dtype
        self.repeats_are_copies = True
        self._plan = contender.config.sharing_plan
        self._sizes = ModelSizes.from_config(contender.config)
        self.result = Measurements(
            label=contender.label,
            layer_types=self._plan.layer_types,
            cache=contender.cache.name,
            cache_options=contender.cache.options,
            kv_bytes=count_kv_bytes(self._plan, self._sizes, workload.length, str(self.dtype).removeprefix("torch.")),
            flops=self._count_flops(),
            weight_bytes=sum(parameter.nbytes for parameter in self.model.parameters()),
        )

    def _count_flops(self) -> FlopsPerToken:
        """Decoding as the last token, prefill on the average of the prompt's tokens."""
        config, passes = self.contender.config, self.workload.prefill_passes
        iteration = Iteration(config.forward_passes if passes is None else passes, config.backward_passes)
        prompt = count_flops(self._plan, self._sizes, self.workload.prompt_length, iteration)
        return replace(prompt, decode=count_flops(self._plan, self._sizes, self.workload.length).decode)

    def planned_bytes(self, length: int, batch_size: int) -> int:
        """What the cache will hold for `batch_size` sequences of `length` tokens, by arithmetic."""
        return self.new_cache().planned_bytes(length, batch_size, self.dtype)

    def new_cache(self, base: type[KVCache] | None = None) -> KVCache:
        """An empty cache."""
        return self.contender.new_cache(self.workload.length, base)

    @torch.inference_mode()
    def inspect(self) -> None:
        """Counts bytes; also what warms everything up."""
        self._measure_bytes()
        self.result.prefill_peak_bytes = peak_bytes(lambda _: self._prefilled(), self.device)
        base, report = self._prefilled()
        self.repeats_are_copies = self._check_copies(base)
        for batch in self._plan_batches():
            self.result.batches.append(batch)
            if batch.error is None:
                attempt(partial(self._inspect_batch, batch, base, report), batch, self.device)

    @torch.inference_mode()
    def run_round(self) -> None:
        """Times a prefill, and decoding with every batch size that works."""
        self._synchronize()
        start = time.perf_counter()
        base, report = self._prefilled()
        report.logits.argmax(dim=-1).tolist()  # waits for the device: a GPU has only been told what to do so far
        self.result.first_token_seconds.append(time.perf_counter() - start)
        self.result.prefill_seconds.append(report.seconds)
        for batch in self.result.batches:
            if batch.error is None:
                attempt(partial(self._time_batch, batch, base, report), batch, self.device)

    def _measure_bytes(self) -> None:
        cache = self.new_cache(RecordsTraffic)
        assert isinstance(cache, RecordsTraffic)
        cache.record_codecs()
        report = self._prefill(cache)
        check_logits(report.logits, "the logits behind the prompt")
        token = self._decode(cache, report.logits, self.workload.new_tokens - 1)
        cache.start_step()
        with record_reads(self.model) as reads:  # of the last step alone, in which the cache is as full as it gets
            self._step(cache, token)
        self.result.resident_bytes, self.result.written_bytes = cache.num_bytes(), cache.written_bytes
        self.result.read_bytes = cache.stored_bytes_read if cache.quantises else reads.total()
        self.result.prefill_passes, self.result.prefill_residual = report.num_passes, report.residual

    def _plan_batches(self) -> Iterator[BatchMeasurements]:
        for batch_size in self.workload.batch_sizes:
            yield BatchMeasurements(batch_size, False, self.planned_bytes(self.workload.length, batch_size))
        if self.workload.kv_budget is None:
            return
        length, planner = self.workload.length, self.new_cache()

        def planned(batch_size: int) -> int:
            return planner.planned_bytes(length, batch_size, self.dtype)

        batch_sizes = range(1, self._batch_limit(planner) + 1)
        batch_size = bisect_right(batch_sizes, self.workload.kv_budget, key=planned)  # how many of them fit
        batch = BatchMeasurements(batch_size, True, planned(max(1, batch_size)))
        if batch_size == 0:
            batch.error = (
                f"one sequence of {length:,} tokens needs {batch.planned_kv_bytes:,} bytes of KV, "
                f"and the budget is {self.workload.kv_budget:,}"
            )
        yield batch

    def _batch_limit(self, planner: KVCache) -> int:
        """The largest batch to look at: what fits into pools of fixed size does not show in their bytes."""
        limit = self.workload.max_batch_size
        num_fitting = planner.max_sequences(self.workload.length) if isinstance(planner, PagedKVCache) else None
        return limit if num_fitting is None else min(limit, num_fitting)

    def _inspect_batch(self, batch: BatchMeasurements, base: KVCache, report: PrefillReport) -> None:
        """The peak of the last decoding step, and the size of the cache behind it."""

        def before_last_step() -> tuple[KVCache, torch.Tensor]:
            cache, logits = self._fill(batch.batch_size, base, report)
            return cache, self._decode(cache, logits, self.workload.new_tokens - 1)

        def last_step(filled: tuple[KVCache, torch.Tensor]) -> None:
            cache, token = filled
            self._step(cache, token)
            batch.kv_bytes = cache.num_bytes()

        prepare = before_last_step
        if self.device.type == "cpu":  # a copy is quicker to record, and a CPU has the memory for it
            prepare = partial(_copy, *before_last_step())
        batch.peak_bytes = peak_bytes(last_step, self.device, prepare)
        budget = self.workload.kv_budget
        assert batch.kv_bytes is not None
        if batch.fills_budget and budget is not None and batch.kv_bytes > budget:
            raise UserError(
                f"{batch.batch_size} sequences were planned to need {batch.planned_kv_bytes:,} bytes of KV and hold "
                f"{batch.kv_bytes:,}, more than the budget of {budget:,}"
            )

    def _time_batch(self, batch: BatchMeasurements, base: KVCache, report: PrefillReport) -> None:
        cache, logits = self._fill(batch.batch_size, base, report)
        self._synchronize()
        start = time.perf_counter()
        self._decode(cache, logits, self.workload.new_tokens)
        self._synchronize()
        batch.seconds.append(time.perf_counter() - start)

    def _fill(self, batch_size: int, base: KVCache, report: PrefillReport) -> tuple[KVCache, torch.Tensor]:
        """A cache with as many prompts, each with memory of its own, and the logits behind them.

        What the prompts say changes no time, so they are copies of one, unless the cache keeps equal ones only once.
        """
        if not self.repeats_are_copies and batch_size > 1:
            cache = self.new_cache()
            return cache, self._prefill(cache, batch_size).logits
        cache = base.fork()
        if batch_size > 1:
            cache.batch_repeat_interleave(batch_size)
        return cache, report.logits.repeat(batch_size, 1)

    def _check_copies(self, base: KVCache) -> bool:
        """Whether repeating a sequence takes the memory of as many different ones.

        Not of two, for which a cache that grows in steps may have room anyway.
        """
        repeated = base.fork()
        repeated.batch_repeat_interleave(4)
        if isinstance(base, PagedKVCache) and isinstance(repeated, PagedKVCache):  # whose pools may be of fixed size
            return repeated.num_used_bytes() >= 4 * base.num_used_bytes()
        return repeated.num_bytes() >= self.planned_bytes(self.workload.prompt_length, 4)

    def _prefilled(self) -> tuple[KVCache, PrefillReport]:
        cache = self.new_cache()
        return cache, self._prefill(cache)

    def _prefill(self, cache: KVCache, batch_size: int = 1) -> PrefillReport:
        return prefill(
            self.model,
            self._prompts(batch_size),
            cache,
            chunk_size=self.workload.prefill_chunk,
            forward_passes=self.workload.prefill_passes,
            tolerance=self.workload.prefill_tolerance,
        )

    def _prompts(self, batch_size: int) -> torch.Tensor:
        """Random tokens, `(batch, prompt_length)`: equal for all contenders with the same vocabulary."""
        generator = torch.Generator().manual_seed(self.workload.seed)
        size = (batch_size, self.workload.prompt_length)
        return torch.randint(self.contender.config.vocab_size, size, generator=generator).to(self.device)

    def _decode(self, cache: KVCache, logits: torch.Tensor, num_steps: int) -> torch.Tensor:
        """Decodes greedily; `logits` `(batch, vocab_size)` and the returned last token `(batch, 1)`."""
        token = logits.argmax(dim=-1, keepdim=True)
        for _ in range(num_steps):
            token = self._step(cache, token)
        return token

    def _step(self, cache: KVCache, token: torch.Tensor) -> torch.Tensor:
        outputs = self.model(token, past_key_values=cache, use_cache=True)
        return outputs.logits[:, -1].argmax(dim=-1, keepdim=True)  # (batch, 1)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _copy(cache: KVCache, token: torch.Tensor) -> tuple[KVCache, torch.Tensor]:
    return cache.fork(), token


def attempt(work: Callable[[], None], result: Measurements | BatchMeasurements, device: torch.device) -> None:
    """Does it, or notes in the `result` why it could not be done, and gives back the memory that it held."""
    try:
        work()
    except FAILURES as error:
        result.error = describe(error)
        logger.debug("%s", result.error, exc_info=error)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def describe(error: BaseException) -> str:
    """The reason in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"out of memory: {text}" if is_out_of_memory(error) else text


class InterruptedMeasurement(KeyboardInterrupt):
    """Ctrl-C when at least one round was over.

    Args:
        results: of the rounds that all contenders have ended.
        num_rounds: how many these are.
    """

    def __init__(self, results: list[Measurements], num_rounds: int) -> None:
        super().__init__()
        self.results, self.num_rounds = results, num_rounds


def measure(contenders: Sequence[Contender], workload: Workload) -> list[Measurements]:
    """Measures all contenders: bytes first, one after the other, then times in rounds.

    A contender that fails keeps its reason in `error`, and the others go on.

    Raises:
        UserError: if not one token of one sequence fits into the budget, and if every contender has failed.
        InterruptedMeasurement: for Ctrl-C after a round; before that, it passes as it is.
    """
    benches = [Bench(contender, workload) for contender in contenders]
    check_budget(benches, workload.kv_budget)
    inspections = [(bench, bench.inspect) for bench in benches]
    schedule = inspections + [(bench, bench.run_round) for bench in benches] * workload.rounds
    num_done = 0
    try:
        with closing(track(schedule, "measuring", len(schedule))) as turns:  # takes the bar away
            for bench, work in turns:
                if bench.result.error is None:
                    attempt(work, bench.result, bench.device)
                    if bench.result.error is not None:
                        logger.warning("%s: %s", bench.result.label, bench.result.error)
                num_done += 1
    except KeyboardInterrupt:
        num_rounds = num_done // len(benches) - 1  # the first time round, bytes were counted
        if num_rounds < 1:
            raise
        raise InterruptedMeasurement(_results(benches, num_rounds), num_rounds) from None
    return _results(benches, workload.rounds)


def _results(benches: Sequence[Bench], num_rounds: int) -> list[Measurements]:
    """What is known after this many rounds."""
    results = [bench.result for bench in benches]
    if all(result.error is not None for result in results):
        raise UserError("; ".join(f"{result.label}: {result.error}" for result in results))
    for result in results:
        times = [result.prefill_seconds, result.first_token_seconds, *(batch.seconds for batch in result.batches)]
        for seconds in times:  # without those of a round that not all have ended
            del seconds[num_rounds:]
    return results


def check_budget(benches: Sequence[Bench], budget: int | None) -> None:
    """Refuses a budget that does not hold one token of one sequence of every contender.

    Raises:
        UserError: naming both numbers.
    """
    if budget is None:
        return
    for bench in benches:
        try:
            needed = bench.planned_bytes(1, 1)
        except FAILURES:  # its cache cannot be made, which it will say itself
            continue
        if needed > budget:
            raise UserError(
                f"kv_budget={budget}: one token of one sequence needs {needed} bytes of KV in {bench.result.label}; "
                "allowed is that or more"
            )
