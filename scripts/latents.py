"""Perplexity against what a cache keeps of a token, untrained: sharing, latents, both, and fewer bits on top.

    python scripts/latents.py MODEL CALIBRATION.jsonl HELDOUT.jsonl --output FIGURES.json

makes the tables of docs/mla.md and, beside the figures, the picture. Both texts have a `text` in every line; what is
used are the beginnings of the first ones that are long enough. A cache of few bits is the quantised one itself: the
text goes through it in chunks, whose queries read all earlier groups of tokens from codes. Bytes are those of one more
token of a long text, in bfloat16 or in codes with their scales and zero points.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from matplotlib.lines import Line2D
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lckv.cache import build_cache
from lckv.config.model import LatentConfig
from lckv.config.names import NO_LATENT
from lckv.conversion.calibration import collect_moments
from lckv.conversion.latent_models import budget_of, measure, to_latents
from lckv.conversion.latent_search import MAX_DISTANCE, LatentConverter, LatentSearch, groups_within
from lckv.conversion.methods import needed_pairs
from lckv.conversion.pattern_search import SearchTrace
from lckv.conversion.scoring import Converter, Scorer
from lckv.conversion.sensitivity import Sensitivity, measure_sensitivity
from lckv.conversion.target import converted_config
from lckv.evaluation.sliding import Window, score_windows
from lckv.loading.models import load_model
from lckv.models import LCKVLlamaForCausalLM
from lckv.reporting.pictures.base import PALETTE
from lckv.sharing.patterns import build_layer_types, parse_layer_types
from lckv.utils.charts import new_chart, save_chart, tidy
from lckv.utils.storage import write_json

RIDGE = 1e-2
NUM_SCORED = 2
"""Texts that groups are tried on, behind those of the calibration."""

CACHES: dict[int, dict[str, Any]] = {16: {"name": "dynamic"}} | {
    bits: {"name": "quantized", "bits": bits, "residual_length": 0} for bits in (8, 4, 2)
}
"""By bits of a number. No token stays exact but those whose group of 64 is not full yet."""

MARKS: dict[int, tuple[str, Any]] = {
    16: ("o", "-"),
    8: ("s", (0, (5, 1.6))),
    4: ("^", (0, (1.6, 1.2))),
    2: ("v", (0, (0.8, 2))),
}
TICKS = (1, 1.1, 1.25, 1.5, 2, 3, 4, 6, 8)
"""Of the picture: how often the original's perplexity; what is beyond is out of the frame."""


@dataclass(frozen=True)
class Road:
    """A way to keep fewer numbers.

    Attributes:
        label: in the picture.
        kind: of latents; "none" for keys and values.
        group_size: so many layers share an owner; 0: as many as there are to be fewer numbers; `None`: after
            `--layer-types`.
    """

    label: str
    kind: str = NO_LATENT
    group_size: int | None = 1


ROADS = {
    "sharing": Road("sharing, CLA", group_size=0),
    "pattern": Road("sharing, searched", group_size=None),
    "joint": Road("latents", "joint"),
    "separate": Road("latents, separate", "separate"),
    "decoupled_rope": Road("latents, decoupled", "decoupled_rope"),
    "pairs": Road("latents of pairs of layers", "joint", group_size=2),
    "groups": Road("latents of searched groups", "joint"),
    "pattern_joint": Road("latents of the searched owners", "joint", group_size=None),
}


def beginnings(path: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[torch.Tensor]:
    """The first tokens of the first texts of a file that have as many, `(length,)` each."""
    with open(path, encoding="utf-8") as lines:
        ids = (tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids for line in lines)
        found = list(itertools.islice((each[:length] for each in ids if len(each) >= length), count))
    if len(found) < count:
        raise SystemExit(f"{path}: holds {len(found)} texts of {length} tokens or more; {count} are needed")
    return [torch.tensor(each) for each in found]


class Maker:
    """Makes the models of roads; the text, `(length,)` each, goes through the given model once for every pattern."""

    def __init__(self, model: LCKVLlamaForCausalLM, text: list[torch.Tensor], layer_types: str | None) -> None:
        self.model, self.layer_types, self.own = model, layer_types, model.config.sharing_plan
        self.batches = [{"input_ids": ids[None], "position_ids": torch.arange(len(ids))[None]} for ids in text]
        self.sensitivity = cache(self._sensitivity)

    def make(self, road: Road, ratio: float) -> LCKVLlamaForCausalLM:
        """A model that keeps `ratio` times fewer numbers, or as many as the pattern says."""
        layer_types = self._layer_types(road, ratio)
        plan = parse_layer_types(layer_types, len(self.own.layers))
        if road.kind == NO_LATENT:
            moments = collect_moments(self.model, self.batches, needed_pairs(plan, self.own))
            return Converter(self.model, "subspace", moments, RIDGE).build(plan)
        of_latents = ratio * len(plan.kv_owners) / len(self.own.kv_owners)
        known = self.sensitivity(layer_types)
        return to_latents(self.model, known, road.kind, ratio=of_latents, layer_types=layer_types, ridge=RIDGE)

    def search(self, ratios: list[float], text: list[torch.Tensor]) -> Iterator[LCKVLlamaForCausalLM]:
        """Models whose groups of layers share latents as `lckv.search` finds best, tried on a text of its own."""
        groups = groups_within(self.own, MAX_DISTANCE)
        sensitivity = measure_sensitivity(self.model, self.batches, groups, weighs_alike=True)
        converter = LatentConverter(self.model, "joint", sensitivity, RIDGE, {})
        ids = torch.stack(text)
        scorer = Scorer(self.model, {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)})
        totals = [int(converter.full_size / ratio) for ratio in ratios]
        for best in LatentSearch(scorer, converter, MAX_DISTANCE, totals).run(SearchTrace(), lambda: None):
            print(f"groups: {best.layer_types}", file=sys.stderr)
            assert best.latent_size is not None
            yield converter.build(parse_layer_types(best.layer_types), best.latent_size)

    def _layer_types(self, road: Road, ratio: float) -> str:
        if road.group_size is None and self.layer_types is not None:
            return self.layer_types
        return build_layer_types("cla", len(self.own.layers), group_size=road.group_size or int(ratio))

    def _sensitivity(self, layer_types: str) -> Sensitivity:
        target = converted_config(self.model.config, parse_layer_types(layer_types))
        return measure(self.model, budget_of(LatentConfig("joint"), target), self.batches)


def measured(model: PreTrainedModel, windows: list[Window], bits: int, chunk: int) -> dict[str, float]:
    """Perplexity of the windows without their first tokens, and bytes of a token."""
    new_cache = partial(build_cache, config=model.config, **CACHES[bits])
    through = None if bits == 16 else new_cache  # keeping numbers as they are changes nothing
    loss = score_windows(model, windows, batch_size=6 if through else 2, new_cache=through, cache_chunk=chunk)
    short, long = (new_cache().planned_bytes(length, 1, torch.bfloat16) for length in (1024, 2048))
    return {
        "numbers": sum(store.size for store in model.config.kv_layout.stores),
        "bits": bits,
        "bytes": (long - short) / 1024,
        "perplexity": math.exp(loss / sum(window.num_scored for window in windows)),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws a line for each road and cache, and behind them, in grey, the models that no other beats in both."""
    figure, (axes,) = new_chart((9, 5.6))
    original = rows[0]
    best = [row for row in rows if not any(_beats(other, row) for other in rows)]
    x, y = _line(sorted(best, key=itemgetter("bytes")))
    axes.step(x, y, where="post", color="0.87", linewidth=9, solid_capstyle="round", solid_joinstyle="round", zorder=1)
    axes.axhline(original["perplexity"], color="0.4", linewidth=0.8, linestyle=":", zorder=1)
    colors = dict(zip(("original", *ROADS), ("#1a1a1b", *(color for color, _ in PALETTE)), strict=False))
    for (road, bits), line in itertools.groupby(sorted(rows, key=_road), _road):
        marker, dashes = MARKS[bits]
        axes.plot(*_line(line), color=colors[road], marker=marker, linestyle=dashes, linewidth=1.3, markersize=5)
    axes.set(xscale="log", yscale="log", ylim=(0.94 * original["perplexity"], TICKS[-1] * original["perplexity"]))
    axes.set_xlabel("bytes of a token (log scale; bfloat16, or codes with scales and zero points)")
    axes.set_ylabel("perplexity beside the original's, {:.2f} (log scale)".format(original["perplexity"]))
    halved = {original["bytes"] / 2**power: f"1/{2**power}" if power else "all" for power in range(7)}
    axes.set_xticks(list(halved), [f"{size:,.0f}\n{part}" for size, part in halved.items()])
    axes.set_xlim(0.85 * min(row["bytes"] for row in rows), 1.1 * original["bytes"])
    axes.set_yticks([factor * original["perplexity"] for factor in TICKS], [f"{factor:g}×" for factor in TICKS])
    axes.minorticks_off()
    tidy(axes)
    axes.legend(handles=_legend(rows, colors), fontsize=8, edgecolor="none", framealpha=0.9)
    save_chart(figure, path)


def _legend(rows: list[dict[str, Any]], colors: dict[str, str]) -> list[Line2D]:
    labels = {"original": "fewer bits alone"} | {name: road.label for name, road in ROADS.items()}
    roads = dict.fromkeys(row["road"] for row in rows)
    caches = {row["bits"]: MARKS[row["bits"]] for row in rows}
    return [
        *(Line2D([], [], color=colors[road], linewidth=3, label=labels[road]) for road in roads),
        *(
            Line2D([], [], color="0.3", marker=marker, linestyle=dashes, markersize=5, label=f"{bits} bits")
            for bits, (marker, dashes) in caches.items()
        ),
        Line2D([], [], color="0.87", linewidth=8, label="best for its bytes"),
    ]


def _road(row: dict[str, Any]) -> tuple[str, int]:
    return row["road"], row["bits"]


def _beats(other: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether another model is at least as good in both, and better in one."""
    differences = [other[name] - row[name] for name in ("bytes", "perplexity")]
    return max(differences) <= 0 and min(differences) < 0


def _line(rows: Iterable[dict[str, Any]]) -> tuple[list[float], list[float]]:
    points = [(row["bytes"], row["perplexity"]) for row in rows]
    return [x for x, _ in points], [y for _, y in points]


def models(
    given: argparse.Namespace, model: LCKVLlamaForCausalLM, text: list[torch.Tensor]
) -> Iterator[tuple[str, LCKVLlamaForCausalLM]]:
    """The original, and every point of the roads with the road's name."""
    yield "original", model
    maker = Maker(model, text[: given.num_calibration], given.layer_types)
    for name in given.roads:
        if name == "groups":
            yield from ((name, made) for made in maker.search(given.ratios, text[given.num_calibration :]))
            continue
        keeps_what_it_keeps = name == "pattern"  # whatever the ratio
        for ratio in given.ratios[:1] if keeps_what_it_keeps else given.ratios:
            yield name, maker.make(ROADS[name], ratio)


def main() -> None:
    """Converts, measures and prints, one line for each model and cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("heldout")
    parser.add_argument("--roads", nargs="+", default=["sharing", "joint", "groups"], choices=ROADS)
    parser.add_argument("--layer-types", help="the pattern of the roads pattern and pattern_joint")
    parser.add_argument("--ratios", nargs="+", type=float, default=[2, 4, 8], help="how many times fewer numbers")
    parser.add_argument("--bits", nargs="+", type=int, default=[16, 8, 4], choices=CACHES, help="of a number kept")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text")
    parser.add_argument("--num-calibration", type=int, default=12, help="texts to calibrate on")
    parser.add_argument("--num-heldout", type=int, default=6, help="texts to measure on")
    parser.add_argument("--chunk", type=int, default=32, help="tokens that go into a quantised cache at once")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures; the picture goes beside it")
    parser.add_argument("--keep", type=Path, help="a folder for the models")
    given = parser.parse_args()
    if any(ROADS[road].group_size is None for road in given.roads) != (given.layer_types is not None):
        parser.error("--layer-types goes with the roads pattern and pattern_joint, and they with it")
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(given.model, dtype="float32", device="cpu")
    text = beginnings(given.calibration, tokenizer, given.num_calibration + NUM_SCORED, given.length)
    heldout = beginnings(given.heldout, tokenizer, given.num_heldout, given.length)
    windows = [Window(ids.numpy(), given.length - 1) for ids in heldout]
    rows: list[dict[str, Any]] = []
    print("| road | numbers | bits | bytes | perplexity | to the original |\n|---|---|---|---|---|---|")
    for road, made in models(given, model, text):
        for bits in given.bits:
            row = {"road": road} | measured(made, windows, bits, given.chunk)
            rows.append(row)
            relative = row["perplexity"] / rows[0]["perplexity"]
            shown = f"{row['bytes']:,.0f} | {row['perplexity']:.2f} | {relative:.2f}"
            print(f"| {road} | {row['numbers']:,} | {bits} | {shown} |", flush=True)
        if given.output is not None:  # after each model, as it takes long until the last
            write_json(given.output, rows)
        if given.keep is not None:
            for part in (made, tokenizer):
                part.save_pretrained(given.keep / f"{road}_{row['numbers']}")
    if given.output is not None:
        draw(rows, given.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
