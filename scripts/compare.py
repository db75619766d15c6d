"""Puts finished runs side by side: `python scripts/compare.py RUN_FOLDER RUN_FOLDER ... [--picture compare.png]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.console import Console
from rich.table import Table

ROWS = {
    "layer_types": lambda run: run["layer_types"],
    "validation perplexity": lambda run: f"{run['eval_perplexity']:,.2f}",
    "  of a unigram model": lambda run: f"{run['unigram_perplexity']:,.2f}",
    "bits per byte": lambda run: (
        "unknown" if run["eval_bits_per_byte"] is None else f"{run['eval_bits_per_byte']:.4f}"
    ),
    "KV bytes written per token": lambda run: f"{run['kv_bytes']['written']:,}",
    "KV bytes resident per token": lambda run: f"{run['kv_bytes']['resident']:,.0f}",
    "KV bytes read to decode a token": lambda run: f"{run['kv_bytes']['read']:,}",
    "parameters": lambda run: f"{run['num_parameters']:,}",
    "training tokens": lambda run: f"{run['tokens']:,}",
    "training time": lambda run: f"{run['seconds']:,.0f} s",
    "tokens per second": lambda run: f"{run['tokens_per_second']:,.0f}",
    "peak memory": lambda run: f"{run['peak_memory_bytes'] / 2**20:,.0f} MiB",
}


def read_run(folder: Path) -> dict[str, Any]:
    """Reads the results of a finished run, and its metrics under `lines`."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        metrics = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        sys.exit(f"compare.py: error: {error.filename}: no such file; give the folders of finished runs")
    return {**results, "lines": [json.loads(line) for line in metrics.splitlines()]}


def build_table(runs: list[dict[str, Any]]) -> Table:
    """One column per run."""
    table = Table("", *(run["run_name"] for run in runs), title_justify="left")
    for name, show in ROWS.items():
        table.add_row(name, *map(show, runs))
    return table


def draw(runs: list[dict[str, Any]], picture: Path) -> None:
    """Draws the runs' validation losses over the training tokens."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(runs[0]["unigram_loss"], color="0.45", linestyle="--", linewidth=1.2, label="unigram model")
    for run in runs:
        points = [(line["tokens"], line["eval_loss"]) for line in run["lines"] if "eval_loss" in line]
        label = f"{run['run_name']}: {run['eval_loss']:.3f}, {run['kv_bytes']['written']:,} KV bytes per token"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.8, label=label)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("validation loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture)


def main() -> None:
    """Prints the table, draws the picture and says where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_folders", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path, default=Path("runs/compare.png"))
    arguments = parser.parse_args()
    runs = [read_run(folder) for folder in arguments.run_folders]
    draw(runs, arguments.picture)
    console = Console()
    context = runs[0]["kv_bytes_context_length"]
    console.print(build_table(runs))
    console.print(f"KV bytes are counted in 16 bits; resident and read, in a context of {context:,} tokens.")
    console.print(f"\npicture: {arguments.picture}", highlight=False, soft_wrap=True)
    console.print(f"next: {sys.executable} {sys.argv[0]} RUN_FOLDER ... compares any other runs", soft_wrap=True)


if __name__ == "__main__":
    main()
