"""Puts finished runs side by side: `python scripts/compare.py RUN_FOLDER RUN_FOLDER ... [--picture compare.png]`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter
from rich.table import Table

from lckv.utils.charts import new_chart, save_chart, tidy
from lckv.utils.console import new_console, python

ROWS = {
    "layer_types": "{layer_types}",
    "validation perplexity": "{eval_perplexity:,.2f}",
    "  of a unigram model": "{unigram_perplexity:,.2f}",
    "bits per byte": "{bits_per_byte}",
    "KV bytes written per token": "{kv_bytes[written]:,}",
    "KV bytes resident per token": "{kv_bytes[resident]:,.0f}",
    "KV bytes read to decode a token": "{kv_bytes[read]:,}",
    "parameters": "{num_parameters:,}",
    "training tokens": "{tokens:,}",
    "training time": "{seconds:,.0f} s",
    "tokens per second": "{tokens_per_second:,.0f}",
    "peak memory": "{peak_memory:,.0f} MiB",
}


def read_run(folder: Path) -> dict[str, Any]:
    """Reads the results of a finished run, and its metrics under `lines`."""
    try:
        run = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        sys.exit(f"compare.py: error: {error.filename}: no such file; give the folders of finished runs")
    bits = run["eval_bits_per_byte"]
    run["bits_per_byte"] = "unknown" if bits is None else f"{bits:.4f}"
    return {**run, "peak_memory": run["peak_memory_bytes"] / 2**20, "lines": [json.loads(line) for line in lines]}


def draw(runs: list[dict[str, Any]], picture: Path) -> None:
    """Draws the runs' validation losses over the training tokens."""
    figure, (axes,) = new_chart()
    axes.axhline(runs[0]["unigram_loss"], color="0.45", linestyle="--", linewidth=1.2, label="unigram model")
    for run in runs:
        points = [(line["tokens"], line["eval_loss"]) for line in run["lines"] if "eval_loss" in line]
        label = "{run_name}: {eval_loss:.3f}, {kv_bytes[written]:,} KV bytes per token".format_map(run)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.8, label=label)
    axes.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    tidy(axes)
    axes.legend(frameon=False)
    save_chart(figure, picture)


def main() -> None:
    """Prints the table, draws the picture and says where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_folders", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path, default=Path("runs/compare.png"))
    arguments = parser.parse_args()
    runs = [read_run(folder) for folder in arguments.run_folders]
    draw(runs, arguments.picture)
    table = Table("", *(run["run_name"] for run in runs), title_justify="left")
    for name, cell in ROWS.items():
        table.add_row(name, *(cell.format_map(run) for run in runs))
    console, context = new_console(is_wide=True), runs[0]["kv_bytes_context_length"]
    console.print(table)
    console.print(f"KV bytes are counted in 16 bits; resident and read, in a context of {context:,} tokens.")
    console.print(f"\npicture: {arguments.picture}")
    console.print(f"next: {python()} {sys.argv[0]} RUN_FOLDER ... compares any other runs")


if __name__ == "__main__":
    main()
