"""The figures as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lckv.benchmarking.measurements import BatchMeasurements, Measurements, Workload, median, tokens_per_second
from lckv.benchmarking.summary import planned_growth
from lckv.storage import new_file

_COLORS = ("#3b6ea8", "#e08a3c", "#7a9e4f", "#9b6bb3", "#888888")


def plot_results(results: Sequence[Measurements], workload: Workload, path: Path) -> None:
    """Writes the picture that [`draw_results`] makes, as PNG, SVG or PDF by the ending of `path`."""
    with new_file(path) as file:
        draw_results(results, workload).savefig(file)


def draw_results(results: Sequence[Measurements], workload: Workload) -> Figure:
    """Draws prefill time, decoding speed, KV bytes and, with a budget, the batches that fit it.

    Args:
        results: all contenders; those that failed have no bars.
        workload: what they did.
    """
    panels = [_draw_prefill, _draw_speed, _draw_bytes]
    num_rows, num_columns = 1, 3
    if workload.kv_budget is not None:
        panels.append(_draw_budget)
        num_rows, num_columns = 2, 2
    num_bars = max(3, len(workload.batch_sizes) + (workload.kv_budget is not None))
    height = 1.3 + 0.25 * len(results) * num_bars
    figure = Figure(figsize=(6.2 * num_columns, height * num_rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves a notebook's own figures alone
    for number, draw in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, number)
        draw(axes, results, workload)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.16)
    return figure


def _draw_prefill(axes: Axes, results: Sequence[Measurements], workload: Workload) -> None:
    milliseconds = [_scaled(median(result.prefill_seconds), 1000) for result in results]
    _draw_bars(axes, results, {"": milliseconds}, "{:,.4g}")
    axes.set_title(f"prefill of {workload.prompt_length:,} tokens (ms)", loc="left", fontsize=11)


def _draw_speed(axes: Axes, results: Sequence[Measurements], workload: Workload) -> None:
    def speeds(batches: Sequence[BatchMeasurements | None]) -> list[float | None]:
        return [median(tokens_per_second(batch, workload.new_tokens)) for batch in batches]

    groups = {f"batch {size}": speeds([result.batch(size) for result in results]) for size in workload.batch_sizes}
    if workload.kv_budget is not None:
        groups["largest batch in the budget"] = speeds([result.budget_batch for result in results])
    _draw_bars(axes, results, groups, "{:,.4g}")
    axes.set_title("decoding (tokens/s, all sequences together)", loc="left", fontsize=11)


def _draw_bytes(axes: Axes, results: Sequence[Measurements], workload: Workload) -> None:
    groups = {
        f"{name}, {unit}": [
            _scaled(getattr(result, attribute), 100 / base) if (base := getattr(results[0], attribute)) else None
            for result in results
        ]
        for name, unit, attribute in (
            ("resident", "per token", "resident_bytes"),
            ("written", "per token", "written_bytes"),
            ("read", "per decoded token", "read_bytes"),
        )
    }
    _draw_bars(axes, results, groups, "{:.0f}%")
    axes.set_title(f"KV bytes, measured ({results[0].label} = 100%)", loc="left", fontsize=11)


def _draw_budget(axes: Axes, results: Sequence[Measurements], workload: Workload) -> None:
    batches = [result.budget_batch for result in results]
    sizes = [None if batch is None or batch.error else float(batch.batch_size) for batch in batches]
    _draw_bars(axes, results, {"fit, as measured": sizes}, "{:,.0f}", is_inside=True)
    if sizes[0] is not None:
        growths = [planned_growth(result, results[0]) for result in results]
        planned = [(_scaled(growth, sizes[0]), place) for place, growth in enumerate(growths) if growth is not None]
        label = f"{results[0].label} times the plan's factor"
        axes.plot(*zip(*planned, strict=True), "D", color="black", markeredgecolor="white", markersize=7, label=label)
        _add_legend(axes)
    budget = workload.kv_budget or 0
    axes.set_title(f"sequences of {workload.length:,} tokens in {budget / 1e6:,.4g} MB of KV", loc="left", fontsize=11)


def _draw_bars(
    axes: Axes,
    results: Sequence[Measurements],
    groups: dict[str, list[float | None]],
    text: str,
    *,
    is_inside: bool = False,
) -> None:
    """Horizontal bars, one group of them per contender from the top, each with its value at its end or inside."""
    style = {"label_type": "center", "color": "white"} if is_inside else {"padding": 6}
    thickness = 0.8 / len(groups)
    for number, (label, values) in enumerate(groups.items()):
        places = [place - 0.4 + thickness * (number + 0.5) for place in range(len(results))]
        widths = [value or 0.0 for value in values]
        bars = axes.barh(places, widths, height=thickness * 0.9, color=_COLORS[number % len(_COLORS)], label=label)
        texts = ["failed" if value is None else text.format(value) for value in values]
        for text_of_bar, value in zip(axes.bar_label(bars, texts, fontsize=8, **style), values, strict=True):
            if value is None:  # there is no bar to be seen against
                text_of_bar.set_color("black")
    axes.set_yticks(range(len(results)), [result.label for result in results])
    axes.invert_yaxis()
    if len(groups) > 1:
        _add_legend(axes)


def _add_legend(axes: Axes) -> None:
    """Below the axes, where no bar can lie under it."""
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.08), ncols=len(handles), frameon=False, fontsize=8, borderaxespad=0
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
