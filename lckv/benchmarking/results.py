"""What was measured, how one contender compares with the first, and both as data, as tables and as a picture."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lckv.benchmarking.settings import Workload
from lckv.sharing.costs import FlopsPerToken, KVBytes
from lckv.utils.charts import new_chart, tidy
from lckv.utils.environment import describe_hardware, versions

if TYPE_CHECKING:
    import torch

_COLORS = ("#3b6ea8", "#e08a3c", "#7a9e4f", "#9b6bb3", "#888888")


@dataclass
class BatchMeasurements:
    """Decoding with one batch size.

    Attributes:
        batch_size: number of sequences.
        fills_budget: whether it is the largest batch that fits the budget.
        planned_kv_bytes: of the cache behind the last step, by arithmetic.
        kv_bytes: the same, measured.
        peak_bytes: memory beyond weights and inputs, the cache included, of the last step.
        seconds: of all steps, for each round.
        error: why there are no (more) figures.
    """

    batch_size: int
    fills_budget: bool
    planned_kv_bytes: int
    kv_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass
class Measurements:
    """Everything that is known about one contender; what could not be measured is `None` or empty.

    Attributes:
        label: what it is called.
        layer_types: its sharing pattern.
        cache: name of the cache.
        cache_options: and its options.
        kv_bytes: by arithmetic, for one sequence behind the last step in a cache that keeps the model's own numbers.
        flops: by arithmetic, for the prompt (run at once) and for the last step.
        weight_bytes: bytes of the parameters.
        error: why there are no (more) figures.
        resident_bytes: live tensors of the cache of one sequence, behind the last step.
        written_bytes: states that the cache was given in the last step, and what a token takes once it is encoded, if
            it is: codes, scales and zero points.
        read_bytes: keys and values that attention was given in the last step, over all layers; of a cache that
            quantises, what it decoded in that step, as it is stored, and the tokens that it keeps as they are.
        prefill_peak_bytes: memory beyond weights and inputs, the cache included, of the prefill of one sequence.
        prefill_passes: over the layers that read upward, for each chunk of the prompt.
        prefill_residual: how far KV moved in the last pass, relative to its size.
        prefill_seconds: of one sequence, for each round.
        first_token_seconds: from an empty hand to the first token: cache, prefill and choice; for each round.
        batches: decoding.
    """

    label: str
    layer_types: str
    cache: str
    cache_options: dict[str, Any]
    kv_bytes: KVBytes
    flops: FlopsPerToken
    weight_bytes: int
    error: str | None = None
    resident_bytes: int | None = None
    written_bytes: int | None = None
    read_bytes: int | None = None
    prefill_peak_bytes: int | None = None
    prefill_passes: list[int] = field(default_factory=list)
    prefill_residual: float | None = None
    prefill_seconds: list[float] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    batches: list[BatchMeasurements] = field(default_factory=list)

    def batch(self, batch_size: int) -> BatchMeasurements | None:
        """The measurement with this batch size, the budget's apart."""
        return next(
            (batch for batch in self.batches if batch.batch_size == batch_size and not batch.fills_budget), None
        )

    @property
    def budget_batch(self) -> BatchMeasurements | None:
        """The measurement with the largest batch that fits the budget."""
        return next((batch for batch in self.batches if batch.fills_budget), None)


def median(values: Sequence[float]) -> float | None:
    """The median, if there is anything."""
    return statistics.median(values) if values else None


def ratio(mine: Sequence[float], other: Sequence[float]) -> float | None:
    """The median over the rounds of the ratio within a round."""
    return median([own / base for own, base in zip(mine, other, strict=False)])


def tokens_per_second(batch: BatchMeasurements | None, new_tokens: int) -> list[float]:
    """Of all sequences together, for each round."""
    return [] if batch is None else [batch.batch_size * new_tokens / seconds for seconds in batch.seconds]


def environment_of(device: torch.device) -> dict[str, Any]:
    """What figures are measured on: this machine, as seen from this process."""
    hardware = describe_hardware(device)
    return {
        "device": f"{device} ({hardware['device']})",
        "num_threads": hardware["num_threads"],
        "spin_count": hardware["spin_count"],
        **{f"{name}_version": version for name, version in versions().items()},
        "system": platform.platform(),
    }


def as_dict(
    results: Sequence[Measurements], workload: Workload, environment: Mapping[str, Any], num_rounds: int
) -> dict[str, Any]:
    """Everything, in base units: bytes, seconds, tokens. Ratios are to the first contender.

    `num_rounds` are those that all have ended: fewer than the workload's if somebody interrupted them.
    """
    return {
        "workload": asdict(workload),
        "environment": environment,
        "num_rounds": num_rounds,
        "is_interrupted": num_rounds < workload.rounds,
        "candidates": [_contender(result, results[0], workload) for result in results],
    }


def _contender(result: Measurements, first: Measurements, workload: Workload) -> dict[str, Any]:
    given = asdict(result)
    times = {name: given.pop(name) for name in ("prefill_seconds", "first_token_seconds")}
    resident = None if result.resident_bytes is None else result.resident_bytes / workload.length
    return given | {
        "plan": {"kv_bytes": given.pop("kv_bytes"), "flops_per_token": given.pop("flops")},
        "kv_bytes_per_token": {"resident": resident, "written": result.written_bytes, "read": result.read_bytes},
        **{name: _summary(seconds, getattr(first, name)) for name, seconds in times.items()},
        "batches": [_batch(batch, first, workload) for batch in result.batches],
        **_growth(result, first),
    }


def _batch(batch: BatchMeasurements, first: Measurements, workload: Workload) -> dict[str, Any]:
    same = first.budget_batch if batch.fills_budget else first.batch(batch.batch_size)
    mine, base = (tokens_per_second(each, workload.new_tokens) for each in (batch, same))
    given = asdict(batch)
    given.pop("seconds")
    return given | {"tokens_per_second": _summary(mine, base)}


def _summary(values: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    return {"rounds": list(values), "median": median(values), "to_first": ratio(values, base)}


def _growth(result: Measurements, first: Measurements) -> dict[str, float | None]:
    """How many times the first contender's sequences fit into the budget: as whole ones, and by the plan's bytes."""
    mine, other = result.budget_batch, first.budget_batch
    if mine is None or other is None:
        return {"budget_growth": None, "planned_budget_growth": None}
    mine_bytes, other_bytes = (each.planned_kv_bytes / max(1, each.batch_size) for each in (mine, other))
    growth = mine.batch_size / other.batch_size if other.batch_size else None
    return {"budget_growth": growth, "planned_budget_growth": other_bytes / mine_bytes}


Figures = Mapping[str, Any]
"""What [`as_dict`] makes, or a part of it: all that is shown is taken from there."""


def print_report(figures: Figures, console: Console) -> None:
    """Prints the tables, why something failed, and what the figures mean."""
    workload, environment, num_rounds = (figures[name] for name in ("workload", "environment", "num_rounds"))
    tables = [_time_table(figures), _bytes_table(figures)]
    if workload["kv_budget"] is not None:
        tables.insert(1, _budget_table(figures))
    for table in tables:
        console.print(table)
        console.print()
    for line in failures(figures):
        console.print(Text(line, style="red"))
    if figures["is_interrupted"]:
        console.print(Text(f"interrupted after {num_rounds} of {workload['rounds']} rounds", style="red"))
    console.print(
        f"Medians of {num_rounds} rounds in which the contenders took turns; x: the median of the ratios to the "
        f"first within a round.\n{workload['prompt_length']} tokens of prompt, {workload['new_tokens']} decoding "
        f"steps, threads: {environment['num_threads']}, {environment['device']}, "
        f"torch {environment['torch_version']}.\n"
        "Bytes: resident are those of the cache's tensors; written are the states that the cache is given, and read "
        "the keys and values that it gives\nto the attention of each layer. A cache that quantises also writes codes, "
        "scales and zero points, a group of tokens at once (here per token),\nand reads what it stores once per step "
        "for all layers that share it, twice where layers read upward. In brackets, the plan's where it differs. "
        "Peak: beyond the weights, cache included."
    )


def failures(figures: Figures) -> list[str]:
    """One line for everything that failed."""
    lines = []
    for candidate in figures["candidates"]:
        lines.append((candidate["label"], candidate["error"]))
        for batch in candidate["batches"]:
            name = "largest batch" if batch["fills_budget"] else f"batch {batch['batch_size']}"
            lines.append((f"{candidate['label']}, {name}", batch["error"]))
    return [f"{label}: {error}" for label, error in lines if error is not None]


def _batches(figures: Figures, batch_size: int | None) -> list[Figures | None]:
    """Every candidate's measurement with this batch size; `None`: with the largest batch that fits the budget."""
    found = []
    for candidate in figures["candidates"]:
        batches = [batch for batch in candidate["batches"] if batch["fills_budget"] == (batch_size is None)]
        found.append(next((batch for batch in batches if batch_size in (None, batch["batch_size"])), None))
    return found


def _time_table(figures: Figures) -> Table:
    sizes, candidates = figures["workload"]["batch_sizes"], figures["candidates"]
    columns = {
        name: [_compared(each[key], _seconds) for each in candidates]
        for name, key in (("prefill", "prefill_seconds"), ("first token", "first_token_seconds"))
    }
    columns |= {f"tokens/s,\nbatch {size}": [_speed(batch) for batch in _batches(figures, size)] for size in sizes}
    return _table("Time", figures, columns)


def _budget_table(figures: Figures) -> Table:
    batches, candidates = _batches(figures, None), figures["candidates"]
    growths = [[each[name] for each in candidates] for name in ("budget_growth", "planned_budget_growth")]
    grown, planned = [["-" if value is None else f"{value:.2f}x" for value in values] for values in growths]
    columns = {
        "batch": ["-" if batch is None else f"{batch['batch_size']}" for batch in batches],
        "growth": grown,
        "by the plan": planned,
        "KV bytes": [_bytes(None if batch is None else batch["kv_bytes"]) for batch in batches],
        "decode peak": [_bytes(None if batch is None else batch["peak_bytes"]) for batch in batches],
        "tokens/s": [_speed(batch) for batch in batches],
    }
    return _table(f"Largest batch in {_bytes(figures['workload']['kv_budget'])} of KV", figures, columns)


def _bytes_table(figures: Figures) -> Table:
    workload, candidates = figures["workload"], figures["candidates"]
    length = workload["prompt_length"] + workload["new_tokens"]

    def column(name: str, planned: str, num_tokens: int = 1) -> list[str]:
        first = candidates[0][name]
        return [_measured(each[name], first, each["plan"]["kv_bytes"][planned], num_tokens) for each in candidates]

    columns = {
        "KV resident\nper token": column("resident_bytes", "resident_total", length),
        "written\nper token": column("written_bytes", "written"),
        "read\nper token": column("read_bytes", "read"),
        "prefill\npeak": [_bytes(each["prefill_peak_bytes"]) for each in candidates],
    }
    for size in workload["batch_sizes"]:
        peaks = [None if batch is None else batch["peak_bytes"] for batch in _batches(figures, size)]
        columns[f"decode peak,\nbatch {size}"] = [_bytes(peak) for peak in peaks]
    return _table("Bytes", figures, columns | {"weights": [_bytes(each["weight_bytes"]) for each in candidates]})


def _table(title: str, figures: Figures, columns: Mapping[str, Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="right")
    for candidate, *cells in zip(figures["candidates"], *columns.values(), strict=True):
        table.add_row(candidate["label"], *cells)
    return table


def _measured(measured: int | None, first: int | None, planned: int, num_tokens: int) -> str:
    if measured is None:
        return "-"
    to_first = f" {measured / first:.2f}x" if first else ""
    shown, expected = (f"{value / num_tokens:,.0f}" for value in (measured, planned))
    return shown + to_first + ("" if shown == expected else f" [{expected}]")


def _speed(batch: Figures | None) -> str:
    if batch is None or batch["error"] is not None:
        return "-" if batch is None else "failed"
    return _compared(batch["tokens_per_second"], "{:,.1f}".format)


def _compared(summary: Figures, show: Callable[[float], str]) -> str:
    if summary["median"] is None:
        return "-"
    return show(summary["median"]) + ("" if summary["to_first"] is None else f" {summary['to_first']:.2f}x")


def _seconds(value: float) -> str:
    return f"{value * 1000:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value} B"


def draw_results(figures: Figures) -> Figure:
    """Draws prefill time, decoding speed, KV bytes and, with a budget, the batches that fit it.

    Contenders that failed have no bars.
    """
    workload, labels = figures["workload"], [each["label"] for each in figures["candidates"]]
    has_budget = workload["kv_budget"] is not None
    panels = [_draw_prefill, _draw_speed, _draw_bytes, *[_draw_budget] * has_budget]
    num_rows, num_columns = (2, 2) if has_budget else (1, 3)
    height = 1.3 + 0.25 * len(labels) * max(3, len(workload["batch_sizes"]) + has_budget)
    figure, all_axes = new_chart((6.2 * num_columns, height * num_rows), num_rows, num_columns, dpi=130)
    for axes, draw in zip(all_axes, panels, strict=True):
        draw(axes, figures)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        tidy(axes, grid="x")
        axes.margins(x=0.16)
    return figure


def _draw_prefill(axes: Axes, figures: Figures) -> None:
    medians = [each["prefill_seconds"]["median"] for each in figures["candidates"]]
    _draw_bars(axes, {"": [_scaled(seconds, 1000) for seconds in medians]}, "{:,.4g}")
    axes.set_title(f"prefill of {figures['workload']['prompt_length']:,} tokens (ms)", loc="left", fontsize=11)


def _draw_speed(axes: Axes, figures: Figures) -> None:
    sizes = {f"batch {size}": size for size in figures["workload"]["batch_sizes"]}
    if figures["workload"]["kv_budget"] is not None:
        sizes["largest batch in the budget"] = None
    groups = {
        name: [None if batch is None else batch["tokens_per_second"]["median"] for batch in _batches(figures, size)]
        for name, size in sizes.items()
    }
    _draw_bars(axes, groups, "{:,.4g}")
    axes.set_title("decoding (tokens/s, all sequences together)", loc="left", fontsize=11)


def _draw_bytes(axes: Axes, figures: Figures) -> None:
    first, *_ = candidates = figures["candidates"]
    groups = {
        f"{name}, {unit}": [
            _scaled(each[f"{name}_bytes"], 100 / base) if (base := first[f"{name}_bytes"]) else None
            for each in candidates
        ]
        for name, unit in (("resident", "per token"), ("written", "per token"), ("read", "per decoded token"))
    }
    _draw_bars(axes, groups, "{:.0f}%")
    axes.set_title(f"KV bytes, measured ({first['label']} = 100%)", loc="left", fontsize=11)


def _draw_budget(axes: Axes, figures: Figures) -> None:
    workload, candidates = figures["workload"], figures["candidates"]
    batches = _batches(figures, None)
    sizes = [None if batch is None or batch["error"] else float(batch["batch_size"]) for batch in batches]
    _draw_bars(axes, {"fit, as measured": sizes}, "{:,.0f}", is_inside=True)
    if sizes[0] is not None:
        growths = [each["planned_budget_growth"] for each in candidates]
        planned = [(_scaled(growth, sizes[0]), place) for place, growth in enumerate(growths) if growth is not None]
        label = f"{candidates[0]['label']} times the plan's factor"
        axes.plot(*zip(*planned, strict=True), "D", color="black", markeredgecolor="white", markersize=7, label=label)
        _add_legend(axes)
    length, budget = workload["prompt_length"] + workload["new_tokens"], workload["kv_budget"]
    axes.set_title(f"sequences of {length:,} tokens in {budget / 1e6:,.4g} MB of KV", loc="left", fontsize=11)


def _draw_bars(
    axes: Axes, groups: Mapping[str, Sequence[float | None]], text: str, *, is_inside: bool = False
) -> None:
    """Horizontal bars, one group of them per contender from the top, each with its value at its end or inside."""
    style = {"label_type": "center", "color": "white"} if is_inside else {"padding": 6}
    thickness = 0.8 / len(groups)
    for number, (label, values) in enumerate(groups.items()):
        places = [place - 0.4 + thickness * (number + 0.5) for place in range(len(values))]
        widths = [value or 0.0 for value in values]
        bars = axes.barh(places, widths, height=thickness * 0.9, color=_COLORS[number % len(_COLORS)], label=label)
        texts = ["failed" if value is None else text.format(value) for value in values]
        for text_of_bar, value in zip(axes.bar_label(bars, texts, fontsize=8, **style), values, strict=True):
            if value is None:  # there is no bar to be seen against
                text_of_bar.set_color("black")
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
