"""The picture of where in a text a needle is found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lckv.charts import draw_cells, new_chart


def draw_needle(figures: Mapping[str, Any]) -> Figure:
    """Draws both accuracies over the length of the prompt and the depth of the needle, in colours from 0 to 1.

    Args:
        figures: those of the evaluation "needle".
    """
    panels = {
        "accuracy": "greedy decoding says the word",
        "choice_accuracy": f"likeliest of {1 / figures['chance']:.0f} words (chance: {figures['chance']:.2g})",
    }
    lengths, depths = [f"{length:,}" for length in figures["lengths"]], [f"{depth:.0%}" for depth in figures["depths"]]
    size = 2 * (1.6 + 0.62 * max(4, len(lengths))), 1.5 + 0.42 * max(4, len(depths))
    figure, all_axes = new_chart(size, num_columns=len(panels), sharey=True)
    for axes, (name, subtitle) in zip(all_axes, panels.items(), strict=True):
        cells = draw_cells(axes, np.array(figures[name]), lengths, depths)
        axes.set_title(subtitle, loc="left", fontsize=10)
        axes.set_xlabel("prompt (tokens)")
    all_axes[0].set_ylabel("depth of the needle")
    figure.colorbar(cells, ax=all_axes, label=f"part of {figures['num_samples']} prompts")
    figure.suptitle("needle in a haystack", x=0.01, ha="left", fontsize=11)
    return figure
