"""What shared keys and values are worth in vLLM: `.venv-vllm/bin/python scripts/bench_serving.py --help`.

Engines of one size have the same memory for their caches, and get the same requests, all at once. vLLM runs as many of
them together as fit, and lets the others wait. It runs in the environment that `scripts/serve_vllm.sh` makes, with
matplotlib and hydra-core beside what is there. Prompts and answers have 32 tokens or more, few of them many.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ways import read_arguments, show, take_turns

from lckv import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.benchmarking.results import median, ratio
from lckv.sharing.patterns import build_layer_types
from lckv.utils.charts import new_chart, save_chart, tidy

PATTERNS = {
    "Llama": build_layer_types("llama", 12),
    "CLA": build_layer_types("cla", 12),
    "YOCO": build_layer_types("yoco", 12),
    "LCKV": build_layer_types("lckv", 12),
}
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "sliding_window": 64,
}
MIB, SHORTEST = 2**20, 32
AT_ONCE, SPEED = "requests at once", "tokens per second"
Requests = list[tuple[list[int], int]]


def make_requests(count: int, longest_prompt: int, longest_answer: int) -> Requests:
    """Prompts, and how many tokens follow each."""
    draw = random.Random(0)

    def length(longest: int) -> int:
        return int(SHORTEST * (longest / SHORTEST) ** draw.random())

    return [
        ([draw.randrange(3, SIZES["vocab_size"]) for _ in range(length(longest_prompt))], length(longest_answer))
        for _ in range(count)
    ]


@dataclass
class Engine:
    """One engine, in this process.

    Attributes:
        llm: vLLM's.
        running: how many requests got a token in each step in which one did, in the last run.
    """

    llm: Any
    running: list[int] = field(default_factory=list)

    @property
    def kv_tokens(self) -> int:
        """How many tokens fit into the cache, as vLLM reports it."""
        return int(self.llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)

    def run(self, requests: Requests) -> None:
        """Answers all requests, in the order in which vLLM finds room for them."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        for index, (prompt, count) in enumerate(requests):
            sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
        self.running = []
        while engine.has_unfinished_requests():
            self.running.append(len(engine.step()))
        self.running = [count for count in self.running if count]


def start(layer_types: str, kv_bytes: int) -> Engine:
    """An engine for a random model of a pattern."""
    from vllm import LLM

    model = LCKVLlamaForCausalLM(LCKVLlamaConfig(layer_types=layer_types, **SIZES))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        llm = LLM(
            folder,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,  # else a second run would find the first one's prompts
            max_model_len=512,
            max_num_batched_tokens=256,
            max_num_seqs=64,
            block_size=32,
            kv_cache_memory_bytes=kv_bytes,
            hf_overrides={"experimental": True} if model.config.sharing_plan.has_cycles else {},
        )
    return Engine(llm)


def main() -> None:
    """Measures engines with several sizes of the cache, and prints, writes and draws the figures."""
    arguments = read_arguments(
        __doc__,
        rounds=3,
        requests=24,
        longest_prompt=256,
        longest_answer=256,
        mib=(16, 32, 64, 128),
        patterns=tuple(PATTERNS),
        picture="",
        wall_clock=False,
    )
    os.environ.update(
        OMP_NUM_THREADS=str(arguments.threads),
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # which would come before the engines' own sizes
    requests = make_requests(arguments.requests, arguments.longest_prompt, arguments.longest_answer)
    num_tokens = sum(count for _, count in requests)
    engines = {
        (mib, label): start(PATTERNS[label], mib * MIB) for mib in arguments.mib for label in arguments.patterns
    }
    ways: dict[tuple[int, str], Callable[[], None]] = {
        key: partial(engine.run, requests) for key, engine in engines.items()
    }
    clock = time.perf_counter if arguments.wall_clock else time.process_time
    seconds = take_turns(ways, arguments.rounds, clock)
    rows = {}
    for (mib, label), engine in engines.items():
        baseline = mib, arguments.patterns[0]
        rows[f"{mib} MiB, {label}"] = {
            "tokens that fit": engine.kv_tokens,
            "times": engine.kv_tokens / engines[baseline].kv_tokens,
            AT_ONCE: sum(engine.running) / len(engine.running),
            "most": max(engine.running),
            SPEED: num_tokens / (median(seconds[mib, label]) or 1),
            "times as fast": ratio(seconds[baseline], seconds[mib, label]),
        }
    show(rows, output=arguments.output)
    if arguments.picture:
        draw_rows(rows, Path(arguments.picture))


def draw_rows(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws how many requests ran at once, and how fast they were answered, over the memory of the cache."""
    figure, panels = new_chart((9, 3.8), num_columns=2)
    labels = list(dict.fromkeys(key.partition(", ")[2] for key in rows))
    sizes = list(dict.fromkeys(int(key.partition(" ")[0]) for key in rows))
    for axes, name in zip(panels, (AT_ONCE, SPEED), strict=True):
        for label in labels:
            axes.plot(sizes, [rows[f"{mib} MiB, {label}"][name] for mib in sizes], label=label, marker="o", alpha=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, map(str, sizes))
        axes.set(xlabel="memory of the cache (MiB)", ylabel=name, ylim=(0, None))
        tidy(axes)
    panels[0].legend(loc="lower right", frameon=False)
    save_chart(figure, path)


if __name__ == "__main__":
    main()
