"""What sharing hints do to the perplexity of a model that was not trained for them, as it is and after `subspace`.

    python scripts/hints.py MODEL CALIBRATION.jsonl HELDOUT.jsonl --output FIGURES.json

makes the table of docs/hints.md. Both texts have a `text` in every line; what is used are the beginnings of the
first ones that are long enough. Where layers read upward, the perplexity is the exact one: text goes token by token
through a cache. Beside it stands how many passes over all tokens at once come to the same, on the first text.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from latents import RIDGE, beginnings
from torch.nn import functional as F

from lckv.cache import build_cache
from lckv.config.hints import DIRECTIONS, LOWER, UPPER, GroupConfig
from lckv.conversion.calibration import collect_moments
from lckv.conversion.methods import needed_pairs
from lckv.conversion.scoring import Converter
from lckv.loading.models import load_model
from lckv.models import LCKVLlamaForCausalLM
from lckv.serving.hints import share_groups
from lckv.sharing.iteration import CONVERGE
from lckv.utils.storage import write_json

METHODS = ("inherit", "subspace")
"""The plain checkpoint, whose owners keep their projections, and the conversion that is best without training."""

TOLERANCE = 1e-3
"""The relative change of keys and values at which passes stop."""


@torch.no_grad()
def perplexity(model: LCKVLlamaForCausalLM, entering: torch.Tensor, ids: torch.Tensor) -> float:
    """Of all tokens but the first ones, exactly.

    Args:
        model: its layers from some layer on.
        entering: what enters the lowest of these, `(batch, q_len, hidden_size)`.
        ids: the tokens, `(batch, q_len)`.
    """
    cache, targets = build_cache("dynamic", model.config), ids[:, 1:]
    at_once = 1 if model.config.sharing_plan.has_cycles else targets.shape[1]
    total = 0.0
    for start in range(0, targets.shape[1], at_once):
        piece = slice(start, start + at_once)
        logits = model(inputs_embeds=entering[:, :-1][:, piece], past_key_values=cache).logits
        total += float(F.cross_entropy(logits.flatten(0, 1), targets[:, piece].flatten(), reduction="sum"))
    return math.exp(total / targets.numel())


@torch.no_grad()
def num_passes(model: LCKVLlamaForCausalLM, entering: torch.Tensor) -> int:
    """How many passes it takes until the keys and values of the first text stop changing."""
    passes: int = model(inputs_embeds=entering[:1], use_cache=False, logits_to_keep=1).num_passes
    return passes


def groups(given: argparse.Namespace) -> Iterator[GroupConfig]:
    """Everything that is tried."""
    for direction, size, min_layer in itertools.product(given.directions, given.group_sizes, given.min_layers):
        yield GroupConfig(group_size=size, direction=direction, min_layer=min_layer)


def main() -> None:
    """Converts in memory, measures, and prints one line for each hint and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("heldout")
    parser.add_argument("--directions", nargs="+", default=[LOWER, UPPER], choices=DIRECTIONS)
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--min-layers", nargs="+", type=int, default=[0, 4, 15, 22])
    parser.add_argument("--length", type=int, default=512, help="tokens of a text")
    parser.add_argument("--num-calibration", type=int, default=12, help="texts to calibrate on")
    parser.add_argument("--num-heldout", type=int, default=6, help="texts to measure on")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file for the figures")
    given = parser.parse_args()
    model, tokenizer = load_model(given.model, dtype="float32", device="cpu")
    text = beginnings(given.calibration, tokenizer, given.num_calibration, given.length)
    ids = torch.stack(beginnings(given.heldout, tokenizer, given.num_heldout, given.length))
    with torch.no_grad():  # what layers below those that share make of the text is always the same
        entering = model.model(ids, use_cache=False, output_hidden_states=True).hidden_states
    own = model.config.sharing_plan
    plans = [(group, share_groups(own, group)) for group in groups(given)]
    pairs = sorted({pair for _, plan in plans for pair in needed_pairs(plan, own)})
    batches = [{"input_ids": ids[None], "position_ids": torch.arange(len(ids))[None]} for ids in text]
    moments = collect_moments(model, batches, pairs)
    settings = {"forward_passes": CONVERGE, "converge_tolerance": TOLERANCE}
    rows: list[dict[str, Any]] = []
    print(f"original: {perplexity(model, entering[0], ids):.2f}", flush=True)
    print("| direction | group size | from layer | owners | method | perplexity | passes |")
    print("|---|---|---|---|---|---|---|")
    for (group, plan), method in itertools.product(plans, METHODS):
        made = Converter(model, method, moments, RIDGE, settings).build(plan, start=group.min_layer)
        row = {
            "direction": group.direction,
            "group_size": group.group_size,
            "min_layer": group.min_layer,
            "owners": len(plan.kv_owners),
            "method": method,
            "perplexity": perplexity(made, entering[group.min_layer], ids),
            "passes": num_passes(made, entering[group.min_layer]) if group.direction == UPPER else 1,
        }
        rows.append(row)
        shown = [f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values()]
        print(f"| {' | '.join(shown)} |", flush=True)
        write_json(given.output, rows)  # after each model, as it takes long until the last


if __name__ == "__main__":
    main()
