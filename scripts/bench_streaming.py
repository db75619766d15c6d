"""Endless streaming with attention sinks, its memory and time: `python scripts/bench_streaming.py --help`.

Streams tokens from a small random model and takes down, as they come, the bytes of the cache, the memory of the
process and the CPU time of every token. Other load on the machine comes and goes meanwhile, so the last tokens take
turns with those of a second stream that has only just filled its cache.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from ways import draw, read_arguments, show

from lckv.cache import SinkKVCache
from lckv.generation.streaming import Sampling, stream
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.utils.console import track


def seconds_of(tokens: Iterator[int]) -> float:
    """CPU time for the next token."""
    start = time.process_time()
    next(tokens)
    return time.process_time() - start


def thin(values: Any, num_points: int = 200) -> list[float]:
    """Medians of about `num_points` stretches."""
    size = max(1, len(values) // num_points)
    return [statistics.median(values[start : start + size]) for start in range(0, len(values) - size + 1, size)]


def main() -> None:
    """Streams, prints a table and draws a picture beside `output`."""
    size = {"tokens": 20_000, "layer_types": "0_2_2_3", "hidden_size": 128, "sinks": 4, "window": 252}
    arguments = read_arguments(__doc__, output="runs/streaming/memory.json", **size)
    config = LCKVLlamaConfig(
        layer_types=arguments.layer_types,
        vocab_size=1024,
        hidden_size=arguments.hidden_size,
        intermediate_size=3 * arguments.hidden_size,
        num_attention_heads=8,
        num_key_value_heads=4,
        sliding_window=arguments.window,
    )
    model, process, num_tokens = LCKVLlamaForCausalLM(config).eval(), psutil.Process(), arguments.tokens
    caches = [SinkKVCache(config, num_sinks=arguments.sinks, window=arguments.window) for _ in range(2)]
    old, young = (stream(model, torch.tensor([[1]]), cache, sampling=Sampling(seed=0)) for cache in caches)
    full = arguments.sinks + arguments.window + 200
    num_turns = max(1, min(2000, (num_tokens - full) // 2))
    seconds, num_bytes, memory = (array(kind, [0]) * num_tokens for kind in "dqq")  # so that they do not grow
    turns = array("d")
    for step in track(range(num_tokens), "streaming", num_tokens):
        seconds[step] = seconds_of(old)
        num_bytes[step], memory[step] = caches[0].num_bytes(), process.memory_info().rss
        if step >= num_tokens - num_turns:
            for _ in islice(young, 0 if turns else full):  # fills its cache once
                pass
            turns.append(seconds_of(young))
    first, last, beside = (
        1000 * statistics.median(each) for each in (seconds[full : full + num_turns], seconds[-num_turns:], turns)
    )
    rows = {
        "CPU ms per token": {"first": first, "last": last, "ratio": last / first},
        "CPU ms per token, taking turns": {"first": beside, "last": last, "ratio": last / beside},
        "memory of the process": {"first": memory[full], "last": memory[-num_turns - 1]},
        "bytes of the cache": {"first": min(num_bytes[full:]), "last": max(num_bytes[full:])},
        "planned bytes": {"last": caches[0].planned_bytes(num_tokens, 1, torch.float32)},
    }
    show(rows, output=arguments.output)
    curves = {"CPU time per token (s)": seconds, "cache (bytes)": num_bytes, "memory of the process (bytes)": memory}
    panels = {label: thin(values) for label, values in curves.items()}
    draw(
        {label: {"": ([num_tokens * i / len(y) for i in range(len(y))], y)} for label, y in panels.items()},
        xlabel="tokens streamed",
        path=Path(arguments.output).with_suffix(".png"),
    )


if __name__ == "__main__":
    main()
