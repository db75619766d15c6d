"""Held-out loss against KV bytes: one model trained for all patterns, beside models trained for one pattern each.

    python scripts/frontier.py --output runs/frontier

trains everything on the embedded text, and goes on from whatever is in the folder already. The patterns are those of
CLA, in which groups of 1, 2, 4 and 8 layers share keys and values. Models are evaluated on all of the validation text
as the pattern says, after the conversion that leaves weights as they are (`method=inherit`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lckv.commands import cli
from lckv.config.names import RANDOM
from lckv.conversion.scoring import Converter
from lckv.data.dataset import build_dataset
from lckv.evaluation.perplexity import evaluate_perplexity
from lckv.loading.building import choose_tokenizer
from lckv.loading.models import load_model
from lckv.reporting.pictures.base import PALETTE
from lckv.sharing.patterns import build_layer_types, parse_layer_types
from lckv.utils.charts import new_chart, save_chart, tidy
from lckv.utils.storage import write_json

NUM_LAYERS = 8
GROUP_SIZES = (1, 2, 4, 8)
SETTINGS = (
    *("experiment=study", f"model.num_hidden_layers={NUM_LAYERS}", "trainer.eval_steps=null"),
    *("trainer.save_steps=100", "evaluation.evals=[]"),
)
OWN, ALL, AFTERWARDS = "own", "random", "llama"
LABELS = {
    OWN: "four models, each trained for its pattern",
    ALL: "one model, sharing=random",
    AFTERWARDS: "one model, trained as Llama, shared afterwards",
}


def train(folder: Path, seed: int, steps: int, *sharing: str) -> Path:
    """The run folder of a training, which is not repeated where it is finished."""
    path = folder / f"{','.join(sharing)}-{steps}-{seed}"
    settings = (*SETTINGS, *sharing, f"seed={seed}", f"trainer.max_steps={steps}", f"run_dir={path}")
    subprocess.run([sys.executable, "-m", "lckv.train", *settings], check=True)
    return path


def runs(folder: Path, seed: int, steps: int) -> Iterator[tuple[str, Path, tuple[int, ...]]]:
    """Trains, and gives the name of each line with a run and the sizes of groups that it is evaluated with."""
    for group_size in GROUP_SIZES:
        sharing = ("sharing=cla", f"sharing.group_size={group_size}") if group_size > 1 else ("sharing=llama",)
        run = train(folder, seed, steps, *sharing)
        yield OWN, run, (group_size,)
        if group_size == 1:
            yield AFTERWARDS, run, GROUP_SIZES
    yield ALL, train(folder, seed, steps, f"sharing={RANDOM}"), GROUP_SIZES


def measure(run: Path, group_sizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The loss of a run's model in nats per held-out token, and its KV bytes per token in 16 bits."""
    model, _ = load_model(str(run), dtype="float32", device="cpu")
    cfg = cli.compose([*SETTINGS])
    blocks = build_dataset(cfg.data, choose_tokenizer(cfg.tokenizer, cfg.data)).validation
    for group_size in group_sizes:
        plan = parse_layer_types(build_layer_types("cla", NUM_LAYERS, group_size=group_size))
        if plan == model.config.sharing_plan:  # as which the training has evaluated it
            made, loss = model, json.loads((run / "results.json").read_text())["eval_loss"]
        else:
            made = Converter(model, "inherit").build(plan)
            loss = evaluate_perplexity(made, blocks, batch_size=8).loss
        num_bytes = 2 * sum(store.size for store in made.config.kv_layout.stores)
        yield {"layer_types": plan.layer_types, "bytes": num_bytes, "loss": loss}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws a line for each way to train, through the means over seeds, with every seed a dot."""
    figure, (axes,) = new_chart((8, 5))
    for (name, label), (color, _) in zip(LABELS.items(), PALETTE, strict=False):
        found = [row for row in rows if row["line"] == name]
        sizes = sorted({row["bytes"] for row in found})
        means = [statistics.fmean(row["loss"] for row in found if row["bytes"] == size) for size in sizes]
        axes.plot(sizes, means, color=color, linewidth=1.6, label=label)
        axes.plot(*zip(*((row["bytes"], row["loss"]) for row in found), strict=True), "o", color=color, markersize=4)
    full = max(row["bytes"] for row in rows)
    kept = {full // size: f"{full // size:,}\n1/{size}" if size > 1 else f"{full:,}\nall" for size in GROUP_SIZES}
    axes.set(xscale="log", xlabel="KV bytes of a token (log scale; 16 bits), and how many layers compute them")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_xticks(list(kept), list(kept.values()))
    axes.minorticks_off()
    tidy(axes)
    axes.legend(frameon=False)
    save_chart(figure, path)


def main() -> None:
    """Trains, measures, prints a table and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/frontier"), help="a folder for runs and figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=300, help="of 4 x 256 tokens, in each training")
    given = parser.parse_args()
    rows = [
        {"line": name, "seed": seed} | row
        for seed in given.seeds
        for name, run, group_sizes in runs(given.output, seed, given.steps)
        for row in measure(run, group_sizes)
    ]
    write_json(given.output / "frontier.json", rows)
    draw(rows, given.output / "frontier.png")
    print("| line | KV bytes | loss by seed |\n|---|---|---|")
    for name in LABELS:
        for size in sorted({row["bytes"] for row in rows}, reverse=True):
            losses = [row["loss"] for row in rows if (row["line"], row["bytes"]) == (name, size)]
            print(f"| {LABELS[name]} | {size:,} | {', '.join(f'{loss:.3f}' for loss in losses)} |")


if __name__ == "__main__":
    main()
