"""Prefill and decoding speed of one model, as an evaluation among others."""

from __future__ import annotations

from typing import Any

import torch

from lckv.benchmarking.measuring import FAILURES, Bench, CacheChoice, Contender, describe
from lckv.benchmarking.results import median, tokens_per_second
from lckv.benchmarking.settings import Workload
from lckv.cache import KVCache
from lckv.config import EvaluationConfig
from lckv.errors import UserError
from lckv.evaluation.evaluations import Subject
from lckv.models import LCKVLlamaForCausalLM
from lckv.utils.console import track


def evaluate_speed(subject: Subject, config: EvaluationConfig) -> dict[str, Any]:
    """Tokens per second of the prefill of one sequence and of decoding a batch, and the bytes that went through.

    Raises:
        UserError: if the sequences are longer than the model allows, and for whatever model, cache or memory refuse.
    """
    settings, model = config.speed, subject.model
    assert isinstance(model, LCKVLlamaForCausalLM)
    settings.check_length(model.config.max_position_embeddings, f"{subject.key_prefix}speed.")
    workload = Workload(
        prompt_length=settings.prompt_length,
        new_tokens=settings.new_tokens,
        batch_sizes=(settings.batch_size,),
        rounds=settings.rounds,
        seed=subject.seed,
    )
    choice = CacheChoice("dynamic")
    if subject.new_cache is not None:
        cache = subject.new_cache()
        assert isinstance(cache, KVCache)
        choice = CacheChoice(cache.name, cache.options())
    try:
        bench = Bench(Contender(choice.label, model, choice), workload)
        turns = [bench.inspect, *[bench.run_round] * workload.rounds]
        for turn in track(turns, "speed", len(turns)):
            turn()
    except FAILURES as error:
        raise UserError(describe(error)) from error
    result, batch = bench.result, bench.result.batches[0]
    if batch.error is not None:
        raise UserError(batch.error)
    prefill_speeds = [workload.prompt_length / seconds for seconds in result.prefill_seconds]
    return {
        "prefill_tokens_per_second": median(prefill_speeds),
        "decode_tokens_per_second": median(tokens_per_second(batch, workload.new_tokens)),
        "first_token_seconds": median(result.first_token_seconds),
        "kv_bytes_resident": result.resident_bytes,
        "kv_bytes_written": result.written_bytes,
        "kv_bytes_read": result.read_bytes,
        "prefill_peak_bytes": result.prefill_peak_bytes,
        "decode_peak_bytes": batch.peak_bytes,
        "cache": choice.label,
        "device": str(bench.device),
        "num_threads": torch.get_num_threads(),
    }
