"""Times training steps against transformers' Llama of the same size: `python scripts/bench.py --help`.

Every step is a forward pass, a backward pass and an AdamW update on the same random tokens. Patterns that read upward
are timed under each schedule: "7+2" for seven passes over a cycle without gradient and two with, all tokens at once;
"1+1x4" where tokens take turns in four groups.
"""

from __future__ import annotations

import time
from argparse import Namespace
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from ways import milliseconds, read_arguments, show, take_turns

from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.sharing.patterns import parse_layer_types

PATTERNS = (
    "0_1_2_3_4_5_6_7",
    "0_0_2_2_4_4_6_6",
    "0s_1s_2s_3s_4_4_4_4",
    "0_1_1_1_1_1_1_1",
    "0_6_6_6_6_6_6_7",
    "0_4_4_4_4_4_4_7",
)
SCHEDULES = ("7+2", "1+1x4", "1+1x8")
BASELINE = "transformers' Llama"


def passes(schedule: str) -> dict[str, Any]:
    """Settings of the model, from how a schedule is written."""
    counts, _, groups = schedule.partition("x")
    ungraded, graded = map(int, counts.split("+"))
    return {"forward_passes": ungraded, "backward_passes": graded, "cyclic_groups": int(groups or 1)}


def build_models(arguments: Namespace) -> dict[str, torch.nn.Module]:
    """The baseline, then each pattern, under each schedule if it iterates."""
    sizes = dict(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 11 // 4,
        num_attention_heads=arguments.hidden_size // 64,
        num_key_value_heads=arguments.hidden_size // 64,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation=arguments.attn_implementation,
    )
    num_layers = parse_layer_types(arguments.patterns[0]).num_hidden_layers
    models: dict[str, Any] = {BASELINE: LlamaForCausalLM(LlamaConfig(num_hidden_layers=num_layers, **sizes))}
    window = max(1, arguments.length // 4)
    for layer_types in arguments.patterns:
        iterates = parse_layer_types(layer_types).has_cycles
        for schedule in arguments.schedules if iterates else arguments.schedules[:1]:
            config = LCKVLlamaConfig(layer_types=layer_types, sliding_window=window, **passes(schedule), **sizes)
            name = f"{layer_types} {schedule}" if iterates else layer_types
            models[name] = LCKVLlamaForCausalLM(config)
    return {name: model.to(arguments.device, getattr(torch, arguments.dtype)) for name, model in models.items()}


def step(model: Any, optimizer: torch.optim.Optimizer, input_ids: torch.Tensor) -> None:
    """One training step."""
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if input_ids.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """Times all models and prints a table."""
    sizes = {"batch_size": 4, "length": 256, "hidden_size": 256, "vocab_size": 4096}
    run = {"rounds": 15, "schedules": SCHEDULES, "attn_implementation": "sdpa", "device": "cpu", "dtype": "float32"}
    arguments = read_arguments(__doc__, patterns=PATTERNS, **sizes, **run)
    size = (arguments.batch_size, arguments.length)
    models = {name: model.train() for name, model in build_models(arguments).items()}
    input_ids = torch.randint(arguments.vocab_size, size, device=arguments.device)
    ways = {
        name: partial(step, model, torch.optim.AdamW(model.parameters(), fused=True), input_ids)
        for name, model in models.items()
    }
    clock = time.perf_counter if input_ids.is_cuda else time.process_time
    seconds = take_turns(ways, arguments.rounds, clock, warm_up=2)
    show(milliseconds(seconds, BASELINE), output=arguments.output)


if __name__ == "__main__":
    main()
