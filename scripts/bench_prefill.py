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
from transformers import LlamaConfig, LlamaForCausalLM
from ways import milliseconds, read_arguments, show, take_turns

from lckv.cache import KVCache, build_cache
from lckv.generation.prefill import PrefillReport, prefill
from lckv.loading.models import load_model

BASELINE = "transformers' Llama"
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "tie_word_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)


def run(model: Any, input_ids: torch.Tensor, groups: int, *way: Any) -> tuple[PrefillReport, KVCache]:
    """Prefills a new cache, tokens taking turns in so many groups; `way` is chunk size, passes and tolerance."""
    model.config.cyclic_groups = groups
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


def build_llama(model: Any) -> LlamaForCausalLM:
    """A model of transformers' own of the same sizes, with random weights."""
    sizes = {name: getattr(model.config, name) for name in SIZES}
    return LlamaForCausalLM(LlamaConfig(**sizes)).to(model.device, model.dtype).eval()


@torch.inference_mode()
def read(llama: LlamaForCausalLM, input_ids: torch.Tensor) -> None:
    """Fills a new cache of transformers' own."""
    llama(input_ids, use_cache=True, logits_to_keep=1)


def main() -> None:
    """Times the ways in turn, and prints a table."""
    ways_of = {"chunk_sizes": (64, 256), "tolerances": (1e-2, 1e-3), "forward_passes": 7, "groups": (1, 4)}
    arguments = read_arguments(__doc__, "model", text="", length=1024, **ways_of)
    model, tokenizer = load_model(arguments.model)
    last = model.config.backward_passes
    input_ids = torch.randint(model.config.vocab_size, (1, arguments.length))
    if arguments.text:
        text = Path(arguments.text).read_text(encoding="utf-8")
        input_ids = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.length]
    iterations = [(arguments.forward_passes, None), *(("converge", each) for each in arguments.tolerances)]
    ways: dict[str, Any] = {
        f"{passes} {tolerance or f'+ {last} passes'}, {groups} groups, chunks of {size or 'all'}": partial(
            run, model, input_ids, groups, size, passes, tolerance
        )
        for groups in arguments.groups
        for size in (None, *arguments.chunk_sizes)
        for passes, tolerance in iterations
    }
    exact = run(model, input_ids, 1, 1, 0, None)
    of_llama: dict[str, Any] = {BASELINE: partial(read, build_llama(model), input_ids)}
    rows = milliseconds(take_turns(of_llama | ways, arguments.rounds), BASELINE)
    of_ours = {name: figures(way(), exact) for name, way in ways.items()}
    show({name: row | of_ours.get(name, {}) for name, row in rows.items()}, output=arguments.output)


if __name__ == "__main__":
    main()
