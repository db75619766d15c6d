"""Continuous batching against static batches, and the gather of pages: `python scripts/bench_continuous.py --help`.

Both sides generate the same tokens for the same requests, greedily. A static batch takes requests in the order in
which they come, pads them to the longest prompt, and runs until its longest continuation ends. A random model never
ends a text early. The gather reads pages through the block table, vectorised and token by token.
"""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import torch
from ways import milliseconds, read_arguments, show, take_turns

from lckv import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.benchmarking.results import median, ratio
from lckv.cache import DynamicKVCache, PagedKVCache
from lckv.engine.continuous import ContinuousBatcher

PATTERNS = {"Llama": "0_1_2_3_4_5_6_7", "YOCO": "0s_1s_2s_3s_4_4_4_4", "LCKV": "0_6_6_6_6_6_6_7"}
SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "eos_token_id": None,
    "pad_token_id": 0,
    "sliding_window": 64,
    "forward_passes": "converge",
}
Requests = list[tuple[list[int], int]]


def make_requests(count: int) -> Requests:
    """Prompts of 8 to 128 tokens and continuations of 8 to 128, few of them long."""
    draw = random.Random(0)
    return [
        ([draw.randrange(3, 2048) for _ in range(int(8 * 16 ** draw.random()))], int(8 * 16 ** draw.random()))
        for _ in range(count)
    ]


def run_static(model: Any, requests: Requests, batch_size: int) -> list[list[int]]:
    """One batch after the other through `generate()`."""
    texts = []
    for start in range(0, len(requests), batch_size):
        prompts, counts = zip(*requests[start : start + batch_size], strict=True)
        width = max(map(len, prompts))
        outputs = model.generate(
            torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
            past_key_values=DynamicKVCache(model.config),
            max_new_tokens=max(counts),
            do_sample=False,
        )
        texts += [outputs[row, width : width + count].tolist() for row, count in enumerate(counts)]
    return texts


def run_continuous(model: Any, requests: Requests, batch_size: int) -> list[list[int]]:
    """All requests at once, as many rows as in a static batch."""
    batcher = ContinuousBatcher(model, PagedKVCache(model.config), max_rows=batch_size, tokens_per_step=256)
    for index, (prompt, count) in enumerate(requests):
        batcher.add_request(prompt, str(index), max_new_tokens=count)
    outputs = batcher.run()
    return [outputs[str(index)].generated_tokens for index in range(len(requests))]


def gather_ways(num_rows: int = 8, length: int = 1024, num_heads: int = 4, head_dim: int = 64) -> dict[str, Any]:
    """Reading keys and values of that size from pages of 16 tokens."""
    config = LCKVLlamaConfig(
        layer_types="0", hidden_size=num_heads * head_dim, num_attention_heads=num_heads, num_key_value_heads=num_heads
    )
    cache = PagedKVCache(config, page_size=16)
    states, new = torch.randn(num_rows, num_heads, length, head_dim), torch.randn(num_rows, num_heads, 1, head_dim)
    cache.update(states, states, 0)
    layer, tables = cache.owners()[0], [sequence.tables[None].pages for sequence in cache.rows]

    def gather() -> torch.Tensor:
        cache.begin_forward(config, None, 1)  # so that slots are worked out anew, as in every step
        return layer.peek((new, new))[0]

    def loop(heads: list[Any]) -> torch.Tensor:
        keys, values = (torch.cat([torch.empty_like(states), new], dim=2) for _ in range(2))
        for row, pages in enumerate(tables):
            for position in range(length):
                for head in heads:
                    keys[row, head, position] = layer.streams[0][pages[position // 16], head, position % 16]
                    values[row, head, position] = layer.streams[1][pages[position // 16], head, position % 16]
        return keys

    ways: dict[str, Any] = {
        "gather": gather,
        "loop over tokens": partial(loop, [slice(None)]),
        "loop over tokens and heads": partial(loop, list(range(num_heads))),
    }
    assert all(torch.equal(way(), gather()) for way in ways.values())
    return ways


@torch.inference_mode()
def main() -> None:
    """Times both, and prints a table."""
    arguments = read_arguments(__doc__, rounds=3, requests=24, rows=8)
    requests = make_requests(arguments.requests)
    num_tokens = sum(count for _, count in requests)
    rows: dict[str, dict[str, Any]] = {}
    for name, layer_types in PATTERNS.items() if requests else ():
        torch.manual_seed(0)
        model = LCKVLlamaForCausalLM(LCKVLlamaConfig(layer_types=layer_types, **SIZES)).eval()
        ways = {way: partial(way, model, requests, arguments.rows) for way in (run_static, run_continuous)}
        equal = sum(mine == other for mine, other in zip(*(way() for way in ways.values()), strict=True))
        seconds = take_turns({way.__name__: run for way, run in ways.items()}, arguments.rounds, time.perf_counter, 0)
        static, continuous = seconds.values()
        rows[name] = {
            "static tokens/s": num_tokens / (median(static) or 1),
            "continuous tokens/s": num_tokens / (median(continuous) or 1),
            "ratio": ratio(static, continuous),
            "equal texts": equal,
        }
    rows |= milliseconds(take_turns(gather_ways(), arguments.rounds, time.perf_counter), "gather")
    show(rows, output=arguments.output)


if __name__ == "__main__":
    main()
