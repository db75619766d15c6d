"""Measures contenders, models with a cache each: bytes on one generation that is not timed, then times.

They take turns, so that other load on the machine falls on all of them.
"""

from __future__ import annotations

import gc
import inspect
import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from lckv.benchmarking.results import BatchMeasurements, Measurements
from lckv.benchmarking.settings import Workload
from lckv.benchmarking.traffic import RecordsTraffic, peak_bytes, record_reads
from lckv.cache import CACHES, KVCache, PagedKVCache, build_cache
from lckv.config.keys import once
from lckv.errors import UserError, is_out_of_memory
from lckv.generation.prefill import PrefillReport, prefill
from lckv.models import LCKVLlamaForCausalLM
from lckv.sharing.costs import ModelSizes, count_flops, count_kv_bytes
from lckv.sharing.iteration import CONVERGE, Iteration
from lckv.utils.console import track
from lckv.utils.logits import check_logits

logger = logging.getLogger(__name__)

FAILURES = (UserError, RuntimeError, ValueError, NotImplementedError, ImportError, MemoryError)
"""What a model, a cache or the memory may refuse; anything else is a fault of the program and ends it."""


@dataclass(frozen=True)
class CacheChoice:
    """A cache by name, with the options that it gets."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name and options, such as `quantized bits=4`."""
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.options.items())])


@dataclass
class Contender:
    """A model with a cache.

    Attributes:
        label: what the table and the plot call it; unique.
        model: in evaluation mode, on its device; contenders that differ in the cache share one.
        cache: which cache it uses.
    """

    label: str
    model: LCKVLlamaForCausalLM
    cache: CacheChoice

    def new_cache(self, max_length: int, base: type[KVCache] | None = None) -> KVCache:
        """Makes an empty cache.

        Args:
            max_length: of a cache that is made for a fixed length, unless its options say otherwise.
            base: a class to mix in, such as one that counts.

        Raises:
            UserError: if the model or the options are not fit for the cache.
        """
        options = dict(self.cache.options)
        if "max_length" in _option_names(self.cache.name):
            options.setdefault("max_length", max_length)
        if base is None:
            return build_cache(self.cache.name, self.model.config, **options)
        cache_class = CACHES[self.cache.name].class_for(options)
        mixed = type(f"{base.__name__}{cache_class.__name__}", (base, cache_class), {})
        return mixed(self.model.config, **options)


def choose_caches(given: Sequence[Any], common: dict[str, Any]) -> list[CacheChoice]:
    """The caches to compare.

    Args:
        given: names, or mappings with `name` and options.
        common: options for every cache that has them and does not say otherwise.

    Raises:
        UserError: for an unknown cache, and one that is given twice.
    """
    choices = []
    for entry in given:
        own = {"name": entry} if isinstance(entry, str) else dict(entry)
        name = own.pop("name")
        known = _option_names(name)
        choices.append(CacheChoice(name, {key: value for key, value in common.items() if key in known} | own))
    once("caches", [choice.label for choice in choices])
    return choices


def _option_names(cache_name: str) -> set[str]:
    return set(inspect.signature(CACHES[cache_name]).parameters) - {"config"}


def combine(models: dict[str, LCKVLlamaForCausalLM], caches: Sequence[CacheChoice]) -> list[Contender]:
    """Every model with every cache; labels name the cache where there are several."""
    return [
        Contender(label if len(caches) == 1 else f"{label}, {cache.label}", model, cache)
        for label, model in models.items()
        for cache in caches
    ]


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
        config, passes = self.model.config, workload.prefill_passes
        plan, sizes = config.sharing_plan, ModelSizes.from_config(config)
        iteration = replace(Iteration.from_config(config), forward_passes=CONVERGE if passes is None else passes)
        prompt = count_flops(plan, sizes, workload.prompt_length, iteration)  # on the average of its tokens
        self.result = Measurements(
            label=contender.label,
            layer_types=plan.layer_types,
            cache=contender.cache.name,
            cache_options=contender.cache.options,
            kv_bytes=count_kv_bytes(plan, sizes, workload.length, str(self.dtype).removeprefix("torch.")),
            flops=replace(prompt, decode=count_flops(plan, sizes, workload.length).decode),
            weight_bytes=sum(parameter.nbytes for parameter in self.model.parameters()),
        )

    def planned_bytes(self, length: int, batch_size: int) -> int:
        """What the cache will hold for `batch_size` sequences of `length` tokens, by arithmetic."""
        return self.new_cache().planned_bytes(length, batch_size, self.dtype)

    def new_cache(self, base: type[KVCache] | None = None) -> KVCache:
        """An empty cache."""
        return self.contender.new_cache(self.workload.length, base)

    def check_budget(self) -> None:
        """Refuses a budget that does not hold one token of one sequence.

        Raises:
            UserError: naming both numbers.
        """
        budget = self.workload.kv_budget
        try:
            needed = 0 if budget is None else self.planned_bytes(1, 1)
        except FAILURES:  # the cache cannot be made, which it will say itself
            return
        if budget is not None and needed > budget:
            raise UserError(
                f"kv_budget={budget}: one token of one sequence needs {needed} bytes of KV in {self.result.label}; "
                "allowed is that or more"
            )

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
        length, planner, limit = self.workload.length, self.new_cache(), self.workload.max_batch_size
        if isinstance(planner, PagedKVCache):  # what fits into pools of fixed size does not show in their bytes
            num_fitting = planner.max_sequences(length)
            limit = limit if num_fitting is None else min(limit, num_fitting)

        def planned(batch_size: int) -> int:
            return planner.planned_bytes(length, batch_size, self.dtype)

        batch_size = bisect_right(range(1, limit + 1), self.workload.kv_budget, key=planned)  # how many of them fit
        batch = BatchMeasurements(batch_size, True, planned(max(1, batch_size)))
        if batch_size == 0:
            batch.error = (
                f"one sequence of {length:,} tokens needs {batch.planned_kv_bytes:,} bytes of KV, "
                f"and the budget is {self.workload.kv_budget:,}"
            )
        yield batch

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
        return torch.randint(self.contender.model.config.vocab_size, size, generator=generator).to(self.device)

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


def measure(contenders: Sequence[Contender], workload: Workload) -> tuple[list[Measurements], int]:
    """Measures all contenders: bytes first, one after the other, then times in rounds.

    A contender that fails keeps its reason in `error`, and the others go on.

    Returns:
        What is known of each, and how many rounds all of them have ended: Ctrl-C may leave fewer than there should be,
        but passes as it is before the end of the first.

    Raises:
        UserError: if not one token of one sequence fits into the budget, and if every contender has failed.
    """
    benches = [Bench(contender, workload) for contender in contenders]
    for bench in benches:
        bench.check_budget()
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
        if num_done < 2 * len(benches):  # the first time round, bytes are counted
            raise
    results, num_rounds = [bench.result for bench in benches], num_done // len(benches) - 1
    if all(result.error is not None for result in results):
        raise UserError("; ".join(f"{result.label}: {result.error}" for result in results))
    for result in results:
        times = [result.prefill_seconds, result.first_token_seconds, *(batch.seconds for batch in result.batches)]
        for seconds in times:  # without those of a round that not all have ended
            del seconds[num_rounds:]
    return results, num_rounds
