"""The picture of where in a text a needle is found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lckv.storage import new_file

# Even in brightness, and told apart by colour-blind readers too.
_COLORS = "cividis"
_DARK_BELOW = 0.55


def draw_needle(figures: Mapping[str, Any], path: Path, title: str) -> None:
    """Writes the picture that [`needle_figure`] makes, as PNG, SVG or PDF by the ending of `path`."""
    with new_file(path) as file:
        needle_figure(figures, title).savefig(file)


def needle_figure(figures: Mapping[str, Any], title: str) -> Figure:
    """Draws both accuracies over the length of the prompt and the depth of the needle, in colours from 0 to 1.

    Args:
        figures: those of the evaluation "needle".
        title: what was evaluated.
    """
    panels = {
        "accuracy": "greedy decoding says the word",
        "choice_accuracy": f"likeliest of {1 / figures['chance']:.0f} words (chance: {figures['chance']:.2g})",
    }
    width = 1.6 + 0.62 * max(4, len(figures["lengths"]))
    height = 1.5 + 0.42 * max(4, len(figures["depths"]))
    figure = Figure(figsize=(2 * width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves a notebook's own figures alone
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for axes, (name, subtitle) in zip(all_axes, panels.items(), strict=True):
        image = _draw_cells(axes, np.array(figures[name]))
        axes.set_title(subtitle, loc="left", fontsize=10)
        axes.set_xticks(range(len(figures["lengths"])), [f"{length:,}" for length in figures["lengths"]])
        axes.set_yticks(range(len(figures["depths"])), [f"{depth:.0%}" for depth in figures["depths"]])
        axes.set_xlabel("prompt (tokens)")
    all_axes[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=all_axes, label=f"part of {figures['num_samples']} prompts")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _draw_cells(axes: Axes, values: np.ndarray) -> AxesImage:
    """Cells with their numbers, `(num_depths, num_lengths)`; the first row, the beginning of the text, on top."""
    image = axes.imshow(values, cmap=_COLORS, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value < _DARK_BELOW else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return image
