"""The picture of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter

from lckv.training.callbacks import text_loss
from lckv.utils.charts import new_chart, save_chart, tidy


def plot_loss(lines: Sequence[dict[str, Any]], path: Path, *, title: str, unigram_loss: float | None) -> None:
    """Draws the losses in the lines of `metrics.jsonl` against tokens, with a line for the unigram model."""
    train = [(line["tokens"], text_loss(line)) for line in lines if "loss" in line]
    validation = [(line["tokens"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure, (axes,) = new_chart()
    if unigram_loss is not None:
        axes.axhline(unigram_loss, color="0.45", linestyle="--", linewidth=1.2, label=f"unigram {unigram_loss:.2f}")
    if train:
        axes.plot(*zip(*train, strict=True), color="#7aa6d8", linewidth=1.4, label="training")
    if validation:
        label = f"validation, at the end {validation[-1][1]:.2f}"
        axes.plot(
            *zip(*validation, strict=True), color="#c0392b", marker="o", markersize=4, linewidth=1.8, label=label
        )
    axes.set(xlabel="training tokens", ylabel="loss (nats per token)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    tidy(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    save_chart(figure, path)
