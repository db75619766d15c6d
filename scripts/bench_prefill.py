"""Compares ways to prefill a model whose layers read upward: `python scripts/bench_prefill.py MODEL --help`.

Exact is one token after the other. In parallel, the keys and values (KV) of a cycle are iterated: with a fixed number
of passes, until they change by less than a tolerance, or the same chunk by chunk, so that each chunk reads final KV of
the chunks before it. Errors are relative to the size of all exact KV; times are the process's CPU time.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lckv.benchmarking.ways import milliseconds, read_arguments, show, take_turns
from lckv.cache import KVCache, build_cache
from lckv.generation.prefill import PrefillReport, prefill
from lckv.loading import load_model


def run(model: Any, input_ids: torch.Tensor, *way: Any) -> tuple[PrefillReport, KVCache]:
    """Prefills a new cache; `way` is chunk size, passes and tolerance."""
    cache = build_cache("dynamic", model.config)
    options: dict[str, Any] = dict(zip(("chunk_size", "forward_passes", "tolerance"), way, strict=True))
    return prefill(model, input_ids, cache, **options), cache


def figures(mine: tuple[PrefillReport, KVCache], exact: tuple[PrefillReport, KVCache]) -> dict[str, float | None]:
    """How many passes it took, and how far from exact it ends."""
    tensors, expected = (cache.state()[0] for _, cache in (mine, exact))
    distances = [float((tensors[name].double() - expected[name].double()).square().sum()) for name in tensors]
    return {
        "passes": statistics.mean(mine[0].num_passes),
        "residual": mine[0].residual,
        "KV error": (sum(distances) / sum(float(each.double().square().sum()) for each in expected.values())) ** 0.5,
        "logits error": float((mine[0].logits.double() - exact[0].logits.double()).abs().max()),
    }


def main() -> None:
    """Times the ways in turn, and prints a table."""
    ways_of = {"chunk_sizes": (64, 256), "tolerances": (1e-2, 1e-3), "forward_passes": 7}
    arguments = read_arguments(__doc__, "model", text="", length=1024, **ways_of)
    model, tokenizer = load_model(arguments.model)
    input_ids = torch.randint(model.config.vocab_size, (1, arguments.length))
    if arguments.text:
        text = Path(arguments.text).read_text(encoding="utf-8")
        input_ids = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.length]
    iterations = [(arguments.forward_passes, None), *(("converge", each) for each in arguments.tolerances)]
    ways = {
        f"{passes} {tolerance or '+ 2 passes'}, chunks of {size or 'all'}": partial(
            run, model, input_ids, size, passes, tolerance
        )
        for size in (None, *arguments.chunk_sizes)
        for passes, tolerance in iterations
    }
    exact = run(model, input_ids, 1, 0, None)
    rows = milliseconds(take_turns(ways, arguments.rounds), baseline=next(iter(ways)))
    show({name: rows[name] | figures(way(), exact) for name, way in ways.items()}, output=arguments.output)


if __name__ == "__main__":
    main()
