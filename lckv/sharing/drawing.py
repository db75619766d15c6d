"""Pictures of who reads whose KV: for the terminal as text, and as SVG, PNG or PDF.

Layer 0 is at the bottom, as in every picture of a decoder. Lines run from a layer that computes keys and values to its
readers: on the left to layers below it, which read upward, and on the right to layers above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.text import Text

from lckv.errors import UserError, near_miss
from lckv.sharing.patterns import LayerPlan, Segment, SharingPlan
from lckv.utils.storage import check_folder, new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE_TYPES = (".svg", ".png", ".pdf")

_MAX_DRAWN_LAYERS = 32
_MAX_LANES = 8
_HEADER, _FOOTER, _GAP = 0.78, 0.6, 0.25  # inches: text does not shrink with the rows
_TERMINAL_COLORS = ("green", "blue", "yellow", "magenta", "cyan", "red", "bright_blue", "bright_green")
# After Okabe and Ito's palette, which colour-blind readers can tell apart, darkened for white text and for print.
_COLORS = ("#0072B2", "#C44E00", "#00805B", "#A8478A", "#7A6000", "#4B4B9B", "#B0303A", "#2C7F93")


def draw_in_terminal(plan: SharingPlan) -> Text:
    """The plan as lines of text, at most 80 columns wide; large plans come out as a list of groups of layers."""
    left = _lanes(plan, upward=True)
    right = _lanes(plan, upward=False)
    if plan.num_hidden_layers > _MAX_DRAWN_LAYERS or max(_num_lanes(left), _num_lanes(right)) > _MAX_LANES:
        return _list_in_terminal(plan)
    text = Text()
    for layer in reversed(plan.layers):
        _append_lanes(text, plan, left, layer, is_left=True)
        text.append(f" {layer.layer_idx:>2} ")
        if layer.computes_kv:
            text.append(f" {_kept(layer):<3}", style=f"bold reverse {_color(plan, layer.layer_idx, _TERMINAL_COLORS)}")
        else:
            text.append("▕  ▏", style=_color(plan, layer.key_source, _TERMINAL_COLORS))
        _append_lanes(text, plan, right, layer, is_left=False)
        text.append(f"  {describe_layer(layer) + ' ':<24}{_cycle_mark(plan, layer)}".rstrip() + "\n")
    return text


def describe_layer(layer: LayerPlan) -> str:
    """What a layer reads, in a few words."""
    if layer.reads_itself:
        words = "reads itself"
    elif layer.is_split:
        words = f"keys {layer.key_source}, values {layer.value_source}"
    else:
        words = f"reads {layer.key_source} {'above' if layer.is_upward else 'below'}"
    return f"{words}, window" if layer.is_sliding else words


def _kept(layer: LayerPlan) -> str:
    """What a layer computes for its readers: keys, values, or both."""
    return "K" * layer.computes_keys + "V" * layer.computes_values


def _others(layer: LayerPlan) -> list[int]:
    """The other layers that a layer reads, that of its keys first."""
    return [source for source in dict.fromkeys(layer.sources) if source != layer.layer_idx]


def _cycle_mark(plan: SharingPlan, layer: LayerPlan) -> str:
    for segment in plan.segments:
        if segment.is_cycle and segment.start <= layer.layer_idx < segment.stop:
            mark = "╮"[: layer.layer_idx == segment.stop - 1] or "╯"[: layer.layer_idx == segment.start] or "│"
            return f"{mark} cycle" if layer.layer_idx == (segment.start + segment.stop) // 2 else mark
    return ""


class _Lane(NamedTuple):
    """A vertical line from an owner past all its readers on one side."""

    owner: int
    joined: list[int]  # the owner and its readers, in order
    column: int

    def passes(self, layer_idx: int) -> bool:
        return self.joined[0] <= layer_idx <= self.joined[-1]


def _lanes(plan: SharingPlan, *, upward: bool) -> list[_Lane]:
    """The lanes of one side; short ones get the columns next to the layers, and none overlap."""
    joined = {
        owner: sorted({owner, *(each.layer_idx for each in plan.readers(owner) if (owner > each.layer_idx) == upward)})
        for owner in plan.kv_owners
    }
    lanes: list[_Lane] = []
    for owner, layers in sorted(joined.items(), key=lambda item: item[1][-1] - item[1][0]):
        if len(layers) > 1:
            taken = {lane.column for lane in lanes if lane.joined[0] <= layers[-1] and layers[0] <= lane.joined[-1]}
            lanes.append(_Lane(owner, layers, next(column for column in count() if column not in taken)))
    return lanes


def _num_lanes(lanes: list[_Lane]) -> int:
    return max((lane.column + 1 for lane in lanes), default=0)


def _append_lanes(text: Text, plan: SharingPlan, lanes: list[_Lane], layer: LayerPlan, *, is_left: bool) -> None:
    """Appends one layer's row of one side: arrow head, then a cell of two characters per lane, nearest first."""
    here = layer.layer_idx
    joined = [lane for lane in lanes if here in lane.joined]
    reach = max((lane.column for lane in joined), default=-1)
    reader = next((lane for lane in joined if here != lane.owner), None)
    head = " " if not joined else ("▶" if is_left else "◀") if reader else "─"
    color = _color(plan, (reader or joined[0]).owner, _TERMINAL_COLORS) if joined else ""
    cells = [(head, color)]
    for column in range(_num_lanes(lanes)):
        lane = next((lane for lane in lanes if lane.column == column and lane.passes(here)), None)
        line = "─" if column <= reach else " "
        cells.append((line, color))
        if lane is None:
            cells.append((line if column < reach else " ", color))
        else:
            corner = _corner(lane, here, column < reach, is_left)
            cells.append((corner, _color(plan, lane.owner, _TERMINAL_COLORS)))
    for character, style in reversed(cells) if is_left else cells:
        text.append(character, style=style)


def _corner(lane: _Lane, here: int, is_crossed: bool, is_left: bool) -> str:
    """The character where a row meets a lane."""
    place = 0 if here == lane.joined[-1] else 2 if here == lane.joined[0] else 1  # on top, at the bottom, or between
    if not is_crossed and here not in lane.joined:
        return "│"
    return ("┬┼┴" if is_crossed else "╭├╰" if is_left else "╮┤╯")[place]


def _color(plan: SharingPlan, owner: int, colors: Sequence[str]) -> str:
    return colors[plan.kv_owners.index(owner) % len(colors)]


def _list_in_terminal(plan: SharingPlan) -> Text:
    """One line per run of layers that do the same."""
    text = Text()
    for first, *others in reversed([list(run) for _, run in groupby(plan.layers, key=_alike)]):
        name, words = f"{first.layer_idx}", describe_layer(first)
        if others:
            name += f" to {others[-1].layer_idx}"
            words = words.replace("reads", "read", 1).replace("itself", "themselves")
        color = _color(plan, first.key_source, _TERMINAL_COLORS)
        mark = (f" {_kept(first):<3}", f"bold reverse {color}") if first.computes_kv else ("    ", "")
        text.append(f"{name:>12} ").append(*mark)
        text.append(f"  {words}\n", style=color)
    for segment in plan.segments:
        if segment.is_cycle:
            text.append(f"cycle: layers {segment.start} to {segment.stop - 1}\n")
    return text


def _alike(layer: LayerPlan) -> tuple[Any, ...]:
    return _kept(layer), layer.is_sliding, layer.is_upward, "own" if layer.reads_itself else layer.sources


def save_drawing(plan: SharingPlan, file: str | Path) -> None:
    """Draws a plan into an SVG, PNG or PDF file.

    Raises:
        UserError: if the file's ending is another one, or it cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path = Path(file)
    if path.suffix.lower() not in FILE_TYPES:
        raise UserError(
            f"draw={file}: cannot draw a {path.suffix or 'file without ending'}; "
            f"allowed are {', '.join(FILE_TYPES)}{near_miss(path.suffix, FILE_TYPES)}"
        )
    drawing = _Drawing(plan)
    unit = min(0.42, max(0.24, 9 / plan.num_hidden_layers))  # inches per layer
    own_width, own_height = drawing.inches(unit), plan.num_hidden_layers * unit
    width, height = max(5.2, own_width + _GAP + _GAP), own_height + _HEADER + _FOOTER
    with rc_context({"svg.hashsalt": "lckv", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width, height))
        left, bottom = (width - own_width) / 2, height - _HEADER - own_height
        axes = figure.add_axes((left / width, bottom / height, own_width / width, own_height / height))
        drawing.draw(axes, own_width / unit, unit)
        _draw_legend(figure, plan, _FOOTER * 0.42 / height)
        try:
            check_folder(path.parent, f"draw={file}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as written:
                figure.savefig(written, dpi=200, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise UserError(f"draw={file}: the drawing cannot be written there: {error.strerror}") from error


class _Drawing:
    """A plan as a picture. Coordinates are in rows: layer *i* is at height *i*, its box around x = 0."""

    box_width = 3.9
    box_height = 0.74

    def __init__(self, plan: SharingPlan) -> None:
        self.plan = plan
        self.cycles = [segment for segment in plan.segments if segment.is_cycle]
        self.arcs = [(layer, source) for layer in plan.layers for source in _others(layer)]
        left = [_bulge(layer, source) for layer, source in self.arcs if source > layer.layer_idx]
        right = [_bulge(layer, source) for layer, source in self.arcs if source < layer.layer_idx]
        self.left = self.box_width / 2 + max(left, default=0.0) + 0.15
        self.right = self.box_width / 2 + max(right, default=0.0) + 0.15 + (1.0 if self.cycles else 0.0)
        string = plan.layer_types if len(plan.layer_types) <= 48 else f"{plan.layer_types[:44]}…"
        share = 100 * sum(len(_kept(layer)) for layer in plan.layers) / (2 * plan.num_hidden_layers)
        self.title = string, f"{len(plan.kv_owners)} of {plan.num_hidden_layers} layers write KV: {share:.3g} %"

    def inches(self, unit: float) -> float:
        """Width in inches, with the title, if a row is `unit` inches high."""
        return max((self.left + self.right) * unit, *(0.072 * len(line) for line in self.title))

    def draw(self, axes: Axes, width: float, unit: float) -> None:
        """Draws into `axes`, `width` rows wide, each `unit` inches high."""
        middle = (self.right - self.left) / 2
        axes.set_xlim(middle - width / 2, middle + width / 2)
        axes.set_ylim(-0.5, self.plan.num_hidden_layers - 0.5)
        axes.set_axis_off()
        font_size = min(9.5, unit * 72 * 0.36)
        for segment in self.cycles:
            self._draw_cycle(axes, segment, font_size)
        for layer, source in self.arcs:
            self._draw_arc(axes, layer, source)
        for layer in self.plan.layers:
            self._draw_box(axes, layer, font_size)
        styles = ("black", "DejaVu Sans Mono", 21), ("#555555", "DejaVu Sans", 7)
        for line, (color, family, height) in reversed(list(zip(self.title, styles, strict=True))):
            axes.annotate(
                line, (0.5, 1.0), (0, height), xycoords="axes fraction", textcoords="offset points",
                ha="center", va="bottom", fontsize=9, color=color, family=family,
            )  # fmt: skip

    def _draw_box(self, axes: Axes, layer: LayerPlan, font_size: float) -> None:
        from matplotlib.patches import FancyBboxPatch

        edge = _color(self.plan, layer.key_source, _COLORS)
        fill = _color(self.plan, layer.layer_idx, _COLORS) if layer.computes_kv else "white"
        ink = "white" if layer.computes_kv else "#222222"
        reads = "" if layer.reads_itself else "reads " + ":".join(map(str, dict.fromkeys(layer.sources)))
        pad = 0.12
        width, height = self.box_width - 2 * pad, self.box_height - 2 * pad
        axes.add_patch(
            FancyBboxPatch(
                (-width / 2, layer.layer_idx - height / 2), width, height, facecolor=fill, edgecolor=edge,
                boxstyle=f"round,pad={pad},rounding_size=0.16", linewidth=1.4, zorder=3,
                linestyle="--" if layer.is_sliding and not layer.computes_kv else "-",
            )
        )  # fmt: skip
        labels = [
            (-width / 2 + 0.05, "left", str(layer.layer_idx)),
            (-0.75, "center", _kept(layer)),
            (0.25, "center", reads),
            (width / 2 - 0.02, "right", "window" * layer.is_sliding),
        ]
        for x, align, label in labels:
            axes.text(
                x, layer.layer_idx - 0.02, label, ha=align, va="center_baseline", color=ink, zorder=4,
                fontsize=font_size * (1.0 if label in (_kept(layer), str(layer.layer_idx)) else 0.8),
                fontweight="bold" if label == _kept(layer) else "normal",
            )  # fmt: skip

    def _draw_arc(self, axes: Axes, layer: LayerPlan, source: int) -> None:
        """An arrow from the box of the owner to the box of the reader, on the side of its direction."""
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path as Curve

        side = -1 if source > layer.layer_idx else 1
        edge = side * self.box_width / 2
        # A cubic curve gets three quarters of the way to its handles.
        reach = edge + side * _bulge(layer, source) / 0.75
        start, end = self._ends(layer, source)
        curve = Curve(
            [(edge, start), (reach, start), (reach, end), (edge, end)],
            [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4],
        )
        axes.add_patch(
            FancyArrowPatch(
                path=curve, arrowstyle="-|>,head_length=3.6,head_width=2.0", shrinkA=0, shrinkB=0,
                color=_color(self.plan, source, _COLORS), linewidth=1.3,
                linestyle=(0, (3, 1.6)) if layer.is_sliding else "-", zorder=2, clip_on=False,
            )
        )  # fmt: skip

    def _ends(self, layer: LayerPlan, source: int) -> tuple[float, float]:
        """Where the line to a reader starts and ends: off the middle of a box that both reads and is read there."""
        is_upward = source > layer.layer_idx
        shift = 0.18 if is_upward else -0.18
        alike = [(reader.layer_idx, owner) for reader, owner in self.arcs if (owner > reader.layer_idx) == is_upward]
        owner_reads = any(reader == source for reader, _ in alike)
        is_read = any(owner == layer.layer_idx for _, owner in alike)
        return source - shift * owner_reads, layer.layer_idx + shift * is_read

    def _draw_cycle(self, axes: Axes, segment: Segment, font_size: float) -> None:
        bottom, top = segment.start - 0.4, segment.stop - 0.6
        x = self.right - 0.75
        axes.plot(
            [x - 0.22, x, x, x - 0.22], [bottom, bottom, top, top], color="#444444", linewidth=1.1, clip_on=False
        )
        words = "cycle" if segment.stop - segment.start < 4 else "cycle (iterated)"
        axes.text(
            x + 0.18, (bottom + top) / 2, words, rotation=270, ha="left", va="center", fontsize=font_size * 0.95,
            color="#444444",
        )  # fmt: skip


def _bulge(layer: LayerPlan, source: int) -> float:
    """How far the line to a reader leaves the boxes, in rows."""
    return 0.35 + 0.5 * math.pow(abs(source - layer.layer_idx), 0.6)


def _draw_legend(figure: Figure, plan: SharingPlan, y: float) -> None:
    """Names what occurs in the picture, and nothing else."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    layers, grey = plan.layers, "#666666"
    entries: list[tuple[Any, str]] = [(Patch(facecolor=grey, edgecolor=grey), "computes KV")]
    if any(not layer.computes_kv for layer in layers):
        entries.append((Patch(facecolor="white", edgecolor=grey), "computes none"))
    if not all(layer.reads_itself for layer in layers):
        entries.append((Line2D([], [], color=grey, marker=">", markersize=4), "KV to its reader"))
    if any(layer.is_sliding for layer in layers):
        entries.append((Line2D([], [], color=grey, linestyle=(0, (3, 1.6))), "sliding window"))
    figure.legend(
        *zip(*entries, strict=True), loc="center", bbox_to_anchor=(0.5, y), ncols=len(entries), frameon=False,
        fontsize=8, handlelength=1.8, columnspacing=1.4,
    )  # fmt: skip
