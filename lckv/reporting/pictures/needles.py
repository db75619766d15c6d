"""Where in a long text a needle is found again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes

from lckv.reporting.analysis import Report
from lckv.reporting.grouping import Row
from lckv.reporting.metrics import number
from lckv.reporting.pictures.base import HitTexts, Panel, Picture, add_hits
from lckv.reporting.pictures.style import PAPER, Style

_MAP = colormaps["cividis"]
_DARK = "#10100f"
_LIGHT = "#fdfdfc"


class NeedleMap(NamedTuple):
    """The accuracy of a group, the mean over seeds.

    Attributes:
        label: the group's.
        lengths: tokens of the prompt.
        depths: where the needle lies, 0 to 1.
        accuracy: a row for each depth, a value for each length; `None` where there is none.
    """

    label: str
    lengths: list[float]
    depths: list[float]
    accuracy: list[list[float | None]]


def needle_maps(groups: Sequence[Row]) -> list[NeedleMap]:
    """The maps of the groups that have one."""
    return [found for row in groups if (found := _needle_map(row)) is not None]


def _needle_map(row: Row) -> NeedleMap | None:
    """Runs that were tried at other lengths or depths than the first one are left out."""
    maps = [each for each in map(_of_run, row.runs["evaluations"]) if each is not None]
    if not maps:
        return None
    lengths, depths, _ = maps[0]
    alike = [rows for *place, rows in maps if place == [lengths, depths]]
    cells = [list(zip(*same_depth, strict=True)) for same_depth in zip(*alike, strict=True)]
    return NeedleMap(row.label, lengths, depths, [[_mean(values) for values in line] for line in cells])


def _of_run(evaluations: Mapping[str, Any]) -> tuple[list[float], list[float], list[list[Any]]] | None:
    needle = evaluations.get("needle")
    if not isinstance(needle, Mapping):
        return None
    lengths, depths, rows = (needle.get(name) for name in ("lengths", "depths", "accuracy"))
    if not (isinstance(lengths, list) and isinstance(depths, list) and isinstance(rows, list)):
        return None
    is_whole = len(rows) == len(depths) > 0 and all(isinstance(row, list) and len(row) == len(lengths) for row in rows)
    is_whole = is_whole and all(number(each) is not None for each in (*lengths, *depths))
    return (lengths, depths, rows) if is_whole and lengths else None


def _mean(values: Iterable[Any]) -> float | None:
    known = [figure for value in values if (figure := number(value)) is not None]
    return sum(known) / len(known) if known else None


def draw_needles(report: Report, styles: Mapping[str, Style]) -> Picture | None:
    """One heat map for each group; `None` without any."""
    maps = needle_maps(report.rows)
    if not maps:
        return None
    size = (0.75 + 0.42 * max(len(each.lengths) for each in maps), 0.8 + 0.27 * max(len(each.depths) for each in maps))
    size = (max(size[0], 2.3), max(size[1], 1.7))
    panels = [Panel(each.label, size, partial(_draw, needle=each)) for each in maps]
    caption = (
        "Accuracy of finding a needle by length of the text and depth of the needle (0%: first), mean over seeds; "
    )
    caption += "dark blue is 0, yellow is 1, in all maps."
    return Picture("needle", "Needle in a haystack", caption, panels, {})


def _draw(axes: Axes, needle: NeedleMap) -> HitTexts:
    cells = [[float("nan") if value is None else value for value in row] for row in needle.accuracy]
    # Rectangles instead of an image, which an SVG would hold as a blurred bitmap.
    axes.pcolormesh(cells, cmap=_MAP, vmin=0, vmax=1, edgecolors=PAPER, linewidth=0.6)
    points, texts = [], []
    for row, values in enumerate(needle.accuracy):
        for column, value in enumerate(values):
            points.append((column + 0.5, row + 0.5))
            texts.append(_text(needle, row, column, value))
            if value is not None:
                color = _LIGHT if value < 0.5 else _DARK
                axes.text(*points[-1], f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks([place + 0.5 for place in range(len(needle.lengths))], [_short(each) for each in needle.lengths])
    axes.set_yticks([place + 0.5 for place in range(len(needle.depths))], [f"{each:.0%}" for each in needle.depths])
    axes.invert_yaxis()
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    add_hits(axes, "hits-needle", points, size=16)
    return {"hits-needle": texts}


def _text(needle: NeedleMap, row: int, column: int, value: float | None) -> str:
    shown = "–" if value is None else f"{value:.3f}"
    return f"{needle.label}\n{needle.lengths[column]:,} tokens, depth {needle.depths[row]:.0%}\naccuracy: {shown}"


def _short(length: float) -> str:
    return f"{length / 1024:g}k" if length >= 1024 and length % 512 == 0 else f"{length:g}"
