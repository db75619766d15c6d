"""Times training steps against transformers' Llama of the same size: `python scripts/bench.py --help`.

Every step is a forward pass, a backward pass and an AdamW update on the same random tokens. The models take turns, so
that other load on the machine falls on all of them; a ratio is the median of the ratios within a round. On a CPU the
clock is the process's CPU time, which other processes disturb less. A pattern with upward entries is also timed under
the plain schedule, which runs every layer of a cycle in every pass: once with our attention, once with upward layers
hiding each query's own token by a mask over all pairs, as one would write it for any other model.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.models.masks import VisibleKeys
from lckv.models.modeling_lckv import LCKVLlamaModel
from lckv.patterns import parse_layer_types

PATTERNS = (
    "0_1_2_3_4_5_6_7",
    "0_0_2_2_4_4_6_6",
    "0s_1s_2s_3s_4_4_4_4",
    "0_1_1_1_1_1_1_1",
    "0_6_6_6_6_6_6_7",
    "0_4_4_4_4_4_4_7",
)
BASELINE = "transformers' Llama"


class PlainScheduleModel(LCKVLlamaModel):
    """Runs every layer of a cycle whole in every pass; the first pass reads keys and values that are really zero."""

    def _run_layers(
        self, call: Any, segment: Any, hidden_states: Any, key_values: Any, past_key_values: Any, is_last: bool
    ) -> Any:
        upward = {
            layer.kv_source
            for layer in self.config.sharing_plan.layers[segment.start : segment.stop]
            if layer.is_upward
        }
        zeros = self._zero_states(hidden_states)
        key_values = {owner: (zeros, zeros) for owner in upward} | key_values
        return super()._run_layers(call, segment, hidden_states, key_values, past_key_values, True)


class MaskedPlainScheduleModel(PlainScheduleModel):
    """The plain schedule with a mask in upward layers instead of keys shifted against queries."""

    def _run_layers(self, call: Any, segment: Any, hidden_states: Any, *arguments: Any) -> Any:
        length = hidden_states.shape[1]
        pairs = torch.ones(length, length, dtype=torch.bool, device=hidden_states.device).tril(-1)
        sees_nothing = ~pairs.any(dim=-1)[None]
        pairs[0, 0] = True
        masked = VisibleKeys(mask=pairs[None, None], sees_nothing=sees_nothing)
        visible_keys = [
            masked if layer.is_upward else given
            for layer, given in zip(self.sharing_plan.layers, call.visible_keys, strict=True)
        ]
        call = dataclasses.replace(call, visible_keys=visible_keys)
        return super()._run_layers(call, segment, hidden_states, *arguments)


PLAIN = {"plain": PlainScheduleModel, "plain, masked": MaskedPlainScheduleModel}


def build_models(arguments: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """The baseline, then each pattern, with the plain schedule beside those that iterate."""
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
    models: dict[str, torch.nn.Module] = {
        BASELINE: LlamaForCausalLM(LlamaConfig(num_hidden_layers=num_layers, **sizes))
    }
    for layer_types in arguments.patterns:
        config = LCKVLlamaConfig(
            layer_types=layer_types,
            forward_passes=arguments.passes[0],
            backward_passes=arguments.passes[1],
            sliding_window=max(1, arguments.length // 4),
            **sizes,
        )
        models[layer_types] = LCKVLlamaForCausalLM(copy.deepcopy(config))
        if parse_layer_types(layer_types).has_cycles:
            for suffix, schedule in PLAIN.items():
                plain = LCKVLlamaForCausalLM(copy.deepcopy(config))
                plain.model.__class__ = schedule
                models[f"{layer_types}, {suffix}"] = plain
    return {
        name: model.to(arguments.device, getattr(torch, arguments.dtype)).train() for name, model in models.items()
    }


def time_steps(models: dict[str, torch.nn.Module], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per training step of every model, one per round, after two rounds to warm up."""
    input_ids = torch.randint(arguments.vocab_size, (arguments.batch_size, arguments.length), device=arguments.device)
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_idx in track(range(-2, arguments.rounds), description="rounds", console=Console(stderr=True)):
        for name, model in models.items():
            start = _now(arguments.device)
            model(input_ids=input_ids, labels=input_ids).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if round_idx >= 0:
                seconds[name].append(_now(arguments.device) - start)
    return seconds


def _now(device: str) -> float:
    if not device.startswith("cuda"):
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def ratio(seconds: dict[str, list[float]], name: str, baseline: str) -> str:
    """The median over the rounds of one model's time over another's."""
    pairs = zip(seconds[name], seconds[baseline], strict=True)
    return f"{statistics.median(mine / other for mine, other in pairs):.3f}"


def main() -> None:
    """Times all models and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=PATTERNS, help="layer_types strings of one length")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--passes", type=int, nargs=2, default=(7, 2), help="forward_passes and backward_passes")
    parser.add_argument("--attn-implementation", default="sdpa")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    seconds = time_steps(build_models(arguments), arguments)
    table = Table("model", "ms per step", "to Llama", *(f"to {suffix}" for suffix in PLAIN))
    for name, values in seconds.items():
        baselines = [f"{name}, {suffix}" for suffix in PLAIN]
        to_plain = [ratio(seconds, name, baseline) if baseline in seconds else "" for baseline in baselines]
        table.add_row(name, f"{statistics.median(values) * 1000:.0f}", ratio(seconds, name, BASELINE), *to_plain)
    Console().print(table)


if __name__ == "__main__":
    main()
