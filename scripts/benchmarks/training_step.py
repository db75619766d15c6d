"""Times one training step (forward, backward, optimiser) of sharing patterns, interleaved in one process.

Two comparisons: patterns without cycles against transformers' `LlamaForCausalLM` of the same size, and patterns with
cycles against a schedule that runs every layer of the cycle, whole, in every pass.

    python scripts/benchmarks/training_step.py --rounds 15
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from lckv import LCKVLlamaConfig, LCKVLlamaForCausalLM, LCKVLlamaModel
from lckv.models.iteration import KeyValues
from lckv.patterns import Segment

ACYCLIC = {"llama": "0_1_2_3_4_5_6_7", "cla": "0_0_2_2_4_4_6_6", "yoco": "0s_1s_2s_3s_4_4_4_4"}
CYCLIC = {"lckv": "0_6_6_6_6_6_6_7", "sandwich_middle": "0_4_4_4_4_4_4_7"}


class PlainScheduleModel(LCKVLlamaModel):
    """Runs every layer of a cycle in every pass, and attends to the all-zero keys and values of the first."""

    def _run_layers(
        self,
        call: Any,
        segment: Segment,
        hidden_states: torch.Tensor,
        key_values: KeyValues,
        past_key_values: Any,
        is_last: bool,
    ) -> tuple[torch.Tensor, KeyValues]:
        zeros = self._zero_states(hidden_states)
        for layer in self.sharing_plan.layers[segment.start : segment.stop]:
            if layer.is_upward:
                key_values = {layer.kv_source: (zeros, zeros)} | key_values
        return super()._run_layers(call, segment, hidden_states, key_values, past_key_values, is_last=True)


def build_model(layer_types: str | None, sizes: dict[str, Any], *, is_plain: bool = False) -> torch.nn.Module:
    """Builds a model with the same sizes: transformers' Llama for `None`."""
    torch.manual_seed(0)
    if layer_types is None:
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, **sizes))
    model = LCKVLlamaForCausalLM(LCKVLlamaConfig(layer_types=layer_types, **sizes))
    if is_plain:
        weights = model.model.state_dict()
        model.model = PlainScheduleModel(model.config)
        model.model.load_state_dict(weights)
    return model


def make_step(model: torch.nn.Module, input_ids: torch.Tensor) -> Callable[[], float]:
    """Returns a function that trains one step and gives its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> float:
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that a clock read afterwards counts all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Runs the benchmark and prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attn-implementation", default="sdpa")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    sizes = dict(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 8 // 3,
        num_attention_heads=arguments.hidden_size // 64,
        num_key_value_heads=max(1, arguments.hidden_size // 128),
        sliding_window=arguments.length // 4,
        attn_implementation=arguments.attn_implementation,
    )
    models = {"transformers Llama": build_model(None, {k: v for k, v in sizes.items() if k != "sliding_window"})}
    models |= {name: build_model(layer_types, sizes) for name, layer_types in (ACYCLIC | CYCLIC).items()}
    models |= {
        f"{name}, plain schedule": build_model(layer_types, sizes, is_plain=True)
        for name, layer_types in CYCLIC.items()
    }
    input_ids = torch.randint(0, arguments.vocab_size, (arguments.batch_size, arguments.length), device=device)
    dtype = getattr(torch, arguments.dtype)
    steps = {name: make_step(model.to(device, dtype), input_ids) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    with Progress() as progress:
        for round_idx in progress.track(range(-1, arguments.rounds), description="steps"):
            for name, step in steps.items():
                synchronize(device)
                start = time.perf_counter()
                losses[name].append(step())
                synchronize(device)
                if round_idx >= 0:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
    report(times, losses, arguments.json)


def report(times: dict[str, list[float]], losses: dict[str, list[float]], path: str | None) -> None:
    """Prints medians and the ratio to each model's baseline, taken round by round."""
    table = Table("model", "ms per step (median)", "baseline", "ratio (median)", "ratio (min .. max)", "last loss")
    figures = {}
    for name, seconds in times.items():
        baseline = f"{name}, plain schedule" if name in CYCLIC else "transformers Llama"
        ratios = [mine / other for mine, other in zip(seconds, times[baseline], strict=True)]
        figures[name] = {
            "median_ms": 1e3 * statistics.median(seconds),
            "baseline": baseline,
            "median_ratio": statistics.median(ratios),
            "last_loss": losses[name][-1],
        }
        table.add_row(
            name,
            f"{1e3 * statistics.median(seconds):.1f}",
            baseline,
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} .. {max(ratios):.3f}",
            f"{losses[name][-1]:.5f}",
        )
    Console().print(table)
    if path is not None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
