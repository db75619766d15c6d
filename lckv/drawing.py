"""Pictures of who reads whose KV: for the terminal as text, and as SVG, PNG or PDF.

Layer 0 is at the bottom, as in every picture of a decoder. Lines run from a layer that computes keys and values to its
readers: on the left to layers below it, which read upward, and on the right to layers above it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from lckv.errors import UserError, near_miss
from lckv.patterns import LayerPlan, Segment, SharingPlan
from lckv.storage import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE_TYPES = (".svg", ".png", ".pdf")

_MAX_DRAWN_LAYERS = 32
_MAX_LANES = 8
_PANELS_PER_ROW = 3
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
            text.append(" KV ", style=f"bold reverse {_terminal_color(plan, layer.layer_idx)}")
        else:
            text.append("▕  ▏", style=_terminal_color(plan, layer.kv_source))
        _append_lanes(text, plan, right, layer, is_left=False)
        text.append(f"  {describe_layer(layer):<24}{_cycle_mark(plan, layer)}".rstrip() + "\n")
    return text


def describe_layer(layer: LayerPlan) -> str:
    """What a layer reads, in a few words."""
    if layer.kv_source == layer.layer_idx:
        words = "reads itself"
    else:
        words = f"reads {layer.kv_source} {'above' if layer.is_upward else 'below'}"
    return f"{words}, window" if layer.is_sliding else words


def _cycle_mark(plan: SharingPlan, layer: LayerPlan) -> str:
    for segment in plan.segments:
        if segment.is_cycle and segment.start <= layer.layer_idx < segment.stop:
            mark = "╮"[: layer.layer_idx == segment.stop - 1] or "╯"[: layer.layer_idx == segment.start] or "│"
            return f"{mark} cycle" if layer.layer_idx == (segment.start + segment.stop) // 2 else mark
    return ""


@dataclass(frozen=True)
class _Lane:
    """A vertical line from an owner past all its readers on one side."""

    owner: int
    readers: frozenset[int]
    column: int

    @property
    def first(self) -> int:
        return min(self.owner, *self.readers)

    @property
    def last(self) -> int:
        return max(self.owner, *self.readers)


def _lanes(plan: SharingPlan, *, upward: bool) -> list[_Lane]:
    """The lanes of one side; short ones get the columns next to the layers, and none overlap."""
    lanes: list[_Lane] = []
    for owner in plan.kv_owners:
        readers = frozenset(
            layer.layer_idx for layer in plan.readers(owner) if layer.layer_idx != owner and layer.is_upward == upward
        )
        if readers:
            lanes.append(_Lane(owner, readers, -1))
    placed: list[_Lane] = []
    for lane in sorted(lanes, key=lambda lane: lane.last - lane.first):
        taken = {other.column for other in placed if other.first <= lane.last and lane.first <= other.last}
        column = next(column for column in range(len(taken) + 1) if column not in taken)
        placed.append(_Lane(lane.owner, lane.readers, column))
    return placed


def _num_lanes(lanes: list[_Lane]) -> int:
    return max((lane.column + 1 for lane in lanes), default=0)


def _append_lanes(text: Text, plan: SharingPlan, lanes: list[_Lane], layer: LayerPlan, *, is_left: bool) -> None:
    """Appends one layer's row of one side: arrow head, then a cell of two characters per lane, nearest first."""
    here = layer.layer_idx
    joined = [lane for lane in lanes if here == lane.owner or here in lane.readers]
    reach = max((lane.column for lane in joined), default=-1)
    reader = next((lane for lane in joined if here in lane.readers), None)
    head = " " if not joined else ("▶" if is_left else "◀") if reader else "─"
    color = _terminal_color(plan, (reader or joined[0]).owner) if joined else ""
    cells = [(head, color)]
    for column in range(_num_lanes(lanes)):
        lane = next((lane for lane in lanes if lane.column == column and lane.first <= here <= lane.last), None)
        line = "─" if column <= reach else " "
        cells.append((line, color))
        cells.append((_corner(lane, here, column < reach, is_left), _terminal_color(plan, lane.owner))
                     if lane else (line if column < reach else " ", color))  # fmt: skip
    for character, style in reversed(cells) if is_left else cells:
        text.append(character, style=style)


def _corner(lane: _Lane, here: int, is_crossed: bool, is_left: bool) -> str:
    """The character where a row meets a lane."""
    if here != lane.owner and here not in lane.readers:
        return "┼" if is_crossed else "│"
    if lane.first < here < lane.last:
        return "┼" if is_crossed else ("├" if is_left else "┤")
    if here == lane.last:
        return "┬" if is_crossed else ("╭" if is_left else "╮")
    return "┴" if is_crossed else ("╰" if is_left else "╯")


def _terminal_color(plan: SharingPlan, owner: int) -> str:
    return _TERMINAL_COLORS[plan.kv_owners.index(owner) % len(_TERMINAL_COLORS)]


def _list_in_terminal(plan: SharingPlan) -> Text:
    """One line per run of layers that do the same."""
    text = Text()
    lines = []
    for _, run in groupby(plan.layers, key=lambda layer: _alike(layer)):
        layers = list(run)
        first, last = layers[0].layer_idx, layers[-1].layer_idx
        name = f"{first}" if first == last else f"{first} to {last}"
        words = describe_layer(layers[0]) if first == last else describe_layer(layers[0]).replace("reads", "read", 1)
        if first != last and layers[0].kv_source == first:
            words = words.replace("itself", "themselves")
        lines.append((name, layers[0].computes_kv, words, _terminal_color(plan, layers[0].kv_source)))
    for name, computes_kv, words, color in reversed(lines):
        text.append(f"{name:>12} ")
        text.append(" KV " if computes_kv else "    ", style=f"bold reverse {color}" if computes_kv else "")
        text.append(f"  {words}\n", style=color)
    for segment in plan.segments:
        if segment.is_cycle:
            text.append(f"cycle: layers {segment.start} to {segment.stop - 1}\n")
    return text


def _alike(layer: LayerPlan) -> tuple[Any, ...]:
    own = layer.kv_source == layer.layer_idx
    return (layer.computes_kv, layer.is_sliding, layer.is_upward, "own" if own else layer.kv_source)


def save_drawing(plans: SharingPlan | Mapping[str, SharingPlan], file: str | Path) -> None:
    """Draws one plan, or several side by side under their names, into an SVG, PNG or PDF file.

    Raises:
        UserError: if the file's ending is another one, or it cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path = Path(file)
    if path.suffix.lower() not in FILE_TYPES:
        raise UserError(
            f"{path}: cannot draw a {path.suffix or 'file without ending'}; "
            f"allowed are {', '.join(FILE_TYPES)}{near_miss(path.suffix, FILE_TYPES)}"
        )
    if isinstance(plans, SharingPlan):
        plans = {"": plans}
    panels = [_Panel(name, plan) for name, plan in plans.items()]
    rows = [panels[start : start + _PANELS_PER_ROW] for start in range(0, len(panels), _PANELS_PER_ROW)]
    tallest = max(panel.plan.num_hidden_layers for panel in panels)
    unit = min(0.42, max(0.24, 9 / tallest))  # inches per layer
    width = max(5.2, *(sum(panel.inches(unit) + _GAP for panel in row) + _GAP for row in rows))
    heights = [max(panel.plan.num_hidden_layers for panel in row) * unit + _HEADER for row in rows]
    height = sum(heights) + _FOOTER
    with rc_context({"svg.hashsalt": "lckv", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width, height))
        top = height
        for row, row_height in zip(rows, heights, strict=True):
            spare = width - sum(panel.inches(unit) for panel in row)
            x = gap = spare / (len(row) + 1)
            for panel in row:
                panel_width, panel_height = panel.inches(unit), panel.plan.num_hidden_layers * unit
                y = top - _HEADER - panel_height
                axes = figure.add_axes((x / width, y / height, panel_width / width, panel_height / height))
                panel.draw(axes, panel_width / unit, unit)
                x += panel_width + gap
            top -= row_height
        _draw_legend(figure, panels, _FOOTER * 0.42 / height)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as file:
                figure.savefig(file, dpi=200, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise UserError(f"{path}: the drawing cannot be written there: {error.strerror}") from error


class _Panel:
    """One plan in a picture. Coordinates are in rows: layer *i* is at height *i*, its box around x = 0."""

    box_width = 3.9
    box_height = 0.74

    def __init__(self, name: str, plan: SharingPlan) -> None:
        self.name = name
        self.plan = plan
        self.cycles = [segment for segment in plan.segments if segment.is_cycle]
        left = [_bulge(layer) for layer in plan.layers if layer.is_upward]
        right = [_bulge(layer) for layer in plan.layers if layer.kv_source < layer.layer_idx]
        self.left = self.box_width / 2 + max(left, default=0.0) + 0.15
        self.right = self.box_width / 2 + max(right, default=0.0) + 0.15 + (1.0 if self.cycles else 0.0)

    def inches(self, unit: float) -> float:
        """Width in inches, with the title, if a row is `unit` inches high."""
        return max((self.left + self.right) * unit, *(0.072 * len(line) for line in self._title()))

    def _title(self) -> list[str]:
        plan = self.plan
        string = plan.layer_types if len(plan.layer_types) <= 48 else f"{plan.layer_types[:44]}…"
        share = 100 * len(plan.kv_owners) / plan.num_hidden_layers
        size = f"{len(plan.kv_owners)} of {plan.num_hidden_layers} layers write KV: {share:.3g} %"
        return [self.name, string, size] if self.name else [string, size]

    def draw(self, axes: Axes, width: float, unit: float) -> None:
        """Draws into `axes`, `width` rows wide, each `unit` inches high."""
        middle = (self.right - self.left) / 2
        axes.set_xlim(middle - width / 2, middle + width / 2)
        axes.set_ylim(-0.5, self.plan.num_hidden_layers - 0.5)
        axes.set_axis_off()
        font_size = min(9.5, unit * 72 * 0.36)
        for segment in self.cycles:
            self._draw_cycle(axes, segment, font_size)
        for layer in self.plan.layers:
            if layer.kv_source != layer.layer_idx:
                self._draw_arc(axes, layer)
        for layer in self.plan.layers:
            self._draw_box(axes, layer, font_size)
        self._draw_title(axes)

    def _draw_title(self, axes: Axes) -> None:
        for index, line in enumerate(reversed(self._title())):
            is_name = bool(self.name) and line == self.name
            is_size = index == 0
            axes.annotate(
                line,
                xy=(0.5, 1.0),
                xycoords="axes fraction",
                xytext=(0, 7 + 14 * index),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=11 if is_name else 9,
                fontweight="bold" if is_name else "normal",
                color="#555555" if is_size else "black",
                family="DejaVu Sans" if is_name or is_size else "DejaVu Sans Mono",
            )

    def _draw_box(self, axes: Axes, layer: LayerPlan, font_size: float) -> None:
        from matplotlib.patches import FancyBboxPatch

        edge = _color(self.plan, layer.kv_source)
        fill = _color(self.plan, layer.layer_idx) if layer.computes_kv else "white"
        ink = "white" if layer.computes_kv else "#222222"
        reads = f"reads {layer.kv_source}" if layer.kv_source != layer.layer_idx else ""
        pad = 0.12
        width, height = self.box_width - 2 * pad, self.box_height - 2 * pad
        axes.add_patch(
            FancyBboxPatch(
                (-width / 2, layer.layer_idx - height / 2),
                width,
                height,
                boxstyle=f"round,pad={pad},rounding_size=0.16",
                facecolor=fill,
                edgecolor=edge,
                linewidth=1.4,
                linestyle="--" if layer.is_sliding and not layer.computes_kv else "-",
                zorder=3,
            )
        )
        labels = [
            (-width / 2 + 0.05, "left", str(layer.layer_idx)),
            (-0.75, "center", "KV" * layer.computes_kv),
            (0.25, "center", reads),
            (width / 2 - 0.02, "right", "window" * layer.is_sliding),
        ]
        for x, align, label in labels:
            axes.text(
                x,
                layer.layer_idx - 0.02,
                label,
                ha=align,
                va="center_baseline",
                color=ink,
                fontsize=font_size * (1.0 if label in ("KV", str(layer.layer_idx)) else 0.8),
                fontweight="bold" if label == "KV" else "normal",
                zorder=4,
            )

    def _draw_arc(self, axes: Axes, layer: LayerPlan) -> None:
        """An arrow from the box of the owner to the box of the reader, on the side of its direction."""
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path as Curve

        side = -1 if layer.is_upward else 1
        edge = side * self.box_width / 2
        reach = edge + side * _bulge(layer) / 0.75  # a cubic curve gets three quarters of the way to its handles
        start, end = self._departure(layer), self._arrival(layer)
        curve = Curve(
            [(edge, start), (reach, start), (reach, end), (edge, end)],
            [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4],
        )
        axes.add_patch(
            FancyArrowPatch(
                path=curve,
                arrowstyle="-|>,head_length=3.6,head_width=2.0",
                color=_color(self.plan, layer.kv_source),
                linewidth=1.3,
                linestyle=(0, (3, 1.6)) if layer.is_sliding else "-",
                shrinkA=0,
                shrinkB=0,
                zorder=2,
                clip_on=False,
            )
        )

    def _departure(self, layer: LayerPlan) -> float:
        """Where an owner's lines start: off the middle if the owner is a reader on the same side too."""
        owner = self.plan.layers[layer.kv_source]
        is_both = owner.kv_source != owner.layer_idx and owner.is_upward == layer.is_upward
        return owner.layer_idx + (0.18 if layer.is_upward else -0.18) * -is_both

    def _arrival(self, layer: LayerPlan) -> float:
        """Where the line to a reader ends: off the middle if others read it on the same side."""
        readers = [other for other in self.plan.readers(layer.layer_idx) if other is not layer]
        is_both = any(other.is_upward == layer.is_upward for other in readers)
        return layer.layer_idx + (0.18 if layer.is_upward else -0.18) * is_both

    def _draw_cycle(self, axes: Axes, segment: Segment, font_size: float) -> None:
        bottom, top = segment.start - 0.4, segment.stop - 0.6
        x = self.right - 0.75
        axes.plot(
            [x - 0.22, x, x, x - 0.22], [bottom, bottom, top, top], color="#444444", linewidth=1.1, clip_on=False
        )
        axes.text(
            x + 0.18,
            (bottom + top) / 2,
            "cycle" if segment.stop - segment.start < 4 else "cycle (iterated)",
            rotation=270,
            ha="left",
            va="center",
            fontsize=font_size * 0.95,
            color="#444444",
        )


def _bulge(layer: LayerPlan) -> float:
    """How far the line to a reader leaves the boxes, in rows."""
    return 0.35 + 0.5 * math.pow(abs(layer.kv_source - layer.layer_idx), 0.6)


def _color(plan: SharingPlan, owner: int) -> str:
    return _COLORS[plan.kv_owners.index(owner) % len(_COLORS)]


def _draw_legend(figure: Any, panels: Iterable[_Panel], y: float) -> None:
    """Names what occurs in the picture, and nothing else."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    layers = [layer for panel in panels for layer in panel.plan.layers]
    grey = "#666666"
    entries: list[tuple[Any, str]] = [(Patch(facecolor=grey, edgecolor=grey), "computes KV")]
    if any(not layer.computes_kv for layer in layers):
        entries.append((Patch(facecolor="white", edgecolor=grey), "computes none"))
    if any(layer.kv_source != layer.layer_idx for layer in layers):
        entries.append((Line2D([], [], color=grey, marker=">", markersize=4), "KV to its reader"))
    if any(layer.is_sliding for layer in layers):
        entries.append((Line2D([], [], color=grey, linestyle=(0, (3, 1.6))), "sliding window"))
    figure.legend(
        [handle for handle, _ in entries],
        [label for _, label in entries],
        loc="center",
        bbox_to_anchor=(0.5, y),
        ncols=len(entries),
        frameon=False,
        fontsize=8,
        handlelength=1.8,
        columnspacing=1.4,
    )
