"""What all pictures of figures have in common: how they are made, framed and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from lckv.utils.storage import new_file

_LIGHT, _DARK = "#fdfdfc", "#10100f"


def new_chart(
    size: tuple[float, float] = (8, 5), num_rows: int = 1, num_columns: int = 1, dpi: int = 150, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A picture of `size` inches, and its axes row by row; `options` are those of `Figure.subplots`."""
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves a notebook's own figures alone
    return figure, list(figure.subplots(num_rows, num_columns, squeeze=False, **options).flat)


def tidy(axes: Axes, grid: str = "both", color: str = "0.9") -> None:
    """Takes away what carries no information, and puts a grid behind the rest."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=color, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def draw_cells(
    axes: Axes, values: np.ndarray, columns: Sequence[str], rows: Sequence[str], edge: str = "white"
) -> QuadMesh:
    """Draws a map of numbers from 0 to 1.

    Args:
        axes: to draw into.
        values: `(num_rows, num_columns)`, the first row on top; NaN is an empty cell.
        columns: what stands below them.
        rows: what stands beside them.
        edge: the colour between cells.
    """
    # Rectangles instead of an image, which an SVG would hold as a blurred bitmap. The colours are even in brightness,
    # and told apart by colour-blind readers too.
    cells = axes.pcolormesh(values, cmap="cividis", vmin=0, vmax=1, edgecolors=edge, linewidth=0.6)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = _LIGHT if value < 0.5 else _DARK
            axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.set_ylim(len(rows), 0)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return cells


def save_chart(figure: Figure, path: Path) -> None:
    """Writes it whole or not at all, as PNG, SVG or PDF by the ending of `path`."""
    with new_file(path) as file:
        figure.savefig(file)
