"""Continuous batching against static batches of generate(), and the gather of pages against a loop over tokens.

    python scripts/bench_continuous.py [--repeats 3] [--requests 24]

Both sides generate the same tokens for the same requests, greedily, and take turns so that noise hits both. A static
batch takes requests in the order in which they come, pads them to the longest prompt, and runs until its longest
continuation ends.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from lckv import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.cache import DynamicKVCache, PagedKVCache
from lckv.generation.continuous import ContinuousBatcher

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PATTERNS = {"Llama": "0_1_2_3_4_5_6_7", "YOCO": "0s_1s_2s_3s_4_4_4_4", "LCKV": "0_6_6_6_6_6_6_7"}


def build_model(layer_types: str) -> Any:
    """A random model of 8 layers; a random model never ends a text early, so lengths are those asked for."""
    torch.manual_seed(0)
    return LCKVLlamaForCausalLM(
        LCKVLlamaConfig(layer_types=layer_types, sliding_window=64, forward_passes="converge", **SIZES)
    ).eval()


def make_requests(count: int) -> list[tuple[list[int], int]]:
    """Prompts of 8 to 128 tokens and continuations of 8 to 128, few of them long."""
    draw = random.Random(0)
    return [
        ([draw.randrange(3, 2048) for _ in range(int(8 * 16 ** draw.random()))], int(8 * 16 ** draw.random()))
        for _ in range(count)
    ]


def run_static(model: Any, requests: list[tuple[list[int], int]], batch_size: int) -> dict[int, list[int]]:
    """One batch after the other through generate()."""
    texts: dict[int, list[int]] = {}
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        width = max(len(prompt) for prompt, _ in batch)
        input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
        outputs = model.generate(
            input_ids,
            attention_mask=mask,
            past_key_values=DynamicKVCache(model.config),
            max_new_tokens=max(count for _, count in batch),
            do_sample=False,
        )
        for row, (_, count) in enumerate(batch):
            texts[start + row] = outputs[row, width : width + count].tolist()
    return texts


def run_continuous(
    model: Any, requests: list[tuple[list[int], int]], batch_size: int
) -> tuple[Any, dict[int, list[int]]]:
    """All requests at once, as many rows as in a static batch."""
    batcher = ContinuousBatcher(model, PagedKVCache(model.config), max_rows=batch_size, tokens_per_step=256)
    for index, (prompt, count) in enumerate(requests):
        batcher.add_request(prompt, str(index), max_new_tokens=count)
    outputs = batcher.run()
    return batcher.statistics, {int(name): output.generated_tokens for name, output in outputs.items()}


def compare_batching(name: str, repeats: int, num_requests: int, batch_size: int) -> dict[str, Any]:
    """Tokens per second of both ways, in turns, for one pattern."""
    requests = make_requests(num_requests)
    num_tokens = sum(count for _, count in requests)
    model = build_model(PATTERNS[name])
    run_static(model, requests[:2], 2), run_continuous(model, requests[:2], 2)  # warm up
    seconds: dict[str, list[float]] = {"static": [], "continuous": []}
    for _ in range(repeats):
        start = time.perf_counter()
        expected = run_static(model, requests, batch_size)
        seconds["static"].append(time.perf_counter() - start)
        start = time.perf_counter()
        counts, actual = run_continuous(model, requests, batch_size)
        seconds["continuous"].append(time.perf_counter() - start)
    rates = {way: num_tokens / statistics.median(times) for way, times in seconds.items()}
    return {
        "pattern": name,
        "layer_types": PATTERNS[name],
        "static_tokens_per_second": round(rates["static"], 1),
        "continuous_tokens_per_second": round(rates["continuous"], 1),
        "ratio": round(rates["continuous"] / rates["static"], 2),
        "equal_texts": sum(actual[index] == expected[index] for index in expected),
        "requests": num_requests,
        "rows": batch_size,
        "tokens": num_tokens,
        "peak_used_kv_bytes": counts.peak_used_bytes,
    }


def time_of(function: Callable[[], Any], repeats: int) -> float:
    """Median seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare_gather(repeats: int) -> dict[str, Any]:
    """Reading 8 sequences x 1024 tokens x 4 heads x 64 through the block table: vectorised, and token by token."""
    num_rows, length, num_heads, head_dim, page_size = 8, 1024, 4, 64, 16
    config = LCKVLlamaConfig(
        layer_types="0", hidden_size=num_heads * head_dim, num_attention_heads=num_heads, num_key_value_heads=num_heads
    )
    cache = PagedKVCache(config, page_size=page_size)
    states = torch.randn(num_rows, num_heads, length, head_dim)
    cache.update(states, states, 0)
    layer, rows = cache.owners()[0], cache.book.rows
    new = torch.randn(num_rows, num_heads, 1, head_dim)

    def vectorised() -> torch.Tensor:
        cache.begin_forward(config, None, 1)  # so that slots are worked out anew, as in every step
        return layer.peek((new, new))[0]

    def token_by_token(with_heads: bool) -> torch.Tensor:
        keys = torch.empty(num_rows, num_heads, length + 1, head_dim)
        values = torch.empty_like(keys)
        for row, sequence in enumerate(rows):
            for position in range(length):
                page, place = sequence.tables[0].pages[position // page_size], position % page_size
                for head in range(num_heads) if with_heads else [slice(None)]:
                    keys[row, head, position] = layer.streams[0][page, head, place]
                    values[row, head, position] = layer.streams[1][page, head, place]
        keys[:, :, length:], values[:, :, length:] = new, new
        return keys

    assert torch.equal(vectorised(), token_by_token(False)) and torch.equal(vectorised(), token_by_token(True))
    ways = [vectorised, lambda: token_by_token(False), lambda: token_by_token(True)]
    times = [[time_of(way, 10 if way is vectorised else 1) for way in ways] for _ in range(repeats)]  # in turns
    gather, loop, head_loop = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "read": "keys and values of 8 sequences x 1024 tokens x 4 heads x 64, fp32, pages of 16",
        "gather_ms": round(gather * 1e3, 2),
        "loop_over_tokens_ms": round(loop * 1e3, 1),
        "loop_over_tokens_and_heads_ms": round(head_loop * 1e3, 1),
        "ratio_tokens": round(loop / gather, 1),
        "ratio_tokens_and_heads": round(head_loop / gather, 1),
    }


def main() -> None:
    """Measures and prints JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=24, help="0 measures the gather only")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        print(json.dumps(compare_gather(arguments.repeats)), flush=True)
        for name in PATTERNS if arguments.requests else ():
            result = compare_batching(name, arguments.repeats, arguments.requests, arguments.rows)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
