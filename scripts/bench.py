"""Times training steps against transformers' Llama of the same size: `python scripts/bench.py --help`.

Every step is a forward pass, a backward pass and an AdamW update on the same random tokens. A pattern with upward
entries is also timed under the plain schedule, which runs every layer of a cycle in every pass: once with our
attention, once with upward layers hiding each query's own token by a mask over all pairs, as one would write it for
any other model.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from argparse import Namespace
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lckv.benchmarking.results import ratio
from lckv.benchmarking.ways import milliseconds, read_arguments, show, take_turns
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.models.masks import VisibleKeys
from lckv.models.modeling_lckv import LCKVLlamaModel
from lckv.models.stack import Stack, States
from lckv.patterns import Segment, parse_layer_types

PATTERNS = (
    "0_1_2_3_4_5_6_7",
    "0_0_2_2_4_4_6_6",
    "0s_1s_2s_3s_4_4_4_4",
    "0_1_1_1_1_1_1_1",
    "0_6_6_6_6_6_6_7",
    "0_4_4_4_4_4_4_7",
)
BASELINE = "transformers' Llama"


class PlainStack(Stack):
    """Runs every layer of a cycle whole in every pass; the first pass reads keys and values that are really zero."""

    def _run_draft(self, cycle: Segment, hidden_states: torch.Tensor, states: States) -> States:
        zeros = self._past_states(self._owners_read_upward(cycle), hidden_states)
        draft = dataclasses.replace(self, cache=None)  # nothing is cached before, and nothing of a draft is kept
        return draft._run_layers(cycle, hidden_states, zeros | states)[1]


class MaskedPlainStack(PlainStack):
    """The plain schedule with a mask in upward layers instead of keys shifted against queries."""

    def run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs all layers from the bottom for `hidden_states` `(batch, q_len, hidden_size)`."""
        length = hidden_states.shape[1]
        pairs = torch.ones(length, length, dtype=torch.bool, device=hidden_states.device).tril(-1)
        sees_nothing = ~pairs.any(dim=-1)[None]
        pairs[0, 0] = True
        masked = VisibleKeys(length, mask=pairs[None, None], sees_nothing=sees_nothing)
        given = zip(self.plan.layers, self.visible_keys, strict=True)
        visible_keys = [masked if layer.is_upward else own for layer, own in given]
        return PlainStack.run(dataclasses.replace(self, visible_keys=visible_keys), hidden_states)


class PlainScheduleModel(LCKVLlamaModel):
    """Trains by the plain schedule."""

    stack_class = PlainStack


class MaskedPlainScheduleModel(LCKVLlamaModel):
    """Trains by the plain schedule, with masks."""

    stack_class = MaskedPlainStack


PLAIN = {"plain": PlainScheduleModel, "plain, masked": MaskedPlainScheduleModel}


def build_models(arguments: Namespace) -> dict[str, torch.nn.Module]:
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
    models: dict[str, Any] = {BASELINE: LlamaForCausalLM(LlamaConfig(num_hidden_layers=num_layers, **sizes))}
    passes = dict(zip(("forward_passes", "backward_passes"), arguments.passes, strict=True))
    for layer_types in arguments.patterns:
        window = max(1, arguments.length // 4)
        config = LCKVLlamaConfig(layer_types=layer_types, sliding_window=window, **passes, **sizes)
        models[layer_types] = LCKVLlamaForCausalLM(copy.deepcopy(config))
        for suffix, schedule in PLAIN.items() if parse_layer_types(layer_types).has_cycles else ():
            plain = models[f"{layer_types}, {suffix}"] = LCKVLlamaForCausalLM(copy.deepcopy(config))
            plain.model.__class__ = schedule
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
    run = {"rounds": 15, "passes": (7, 2), "attn_implementation": "sdpa", "device": "cpu", "dtype": "float32"}
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
    rows = milliseconds(seconds, BASELINE)
    for name, suffix in ((name, suffix) for name in models for suffix in PLAIN if f"{name}, {suffix}" in models):
        rows[name][f"to {suffix}"] = ratio(seconds[name], seconds[f"{name}, {suffix}"])
    show(rows, output=arguments.output)


if __name__ == "__main__":
    main()
