"""The figures as a table and as JSON-able data."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lckv.benchmarking.measurements import BatchMeasurements, Measurements, Workload, median, ratio, tokens_per_second


@dataclass(frozen=True)
class Environment:
    """What the figures were measured on."""

    device: str
    num_threads: int
    torch_version: str
    transformers_version: str
    lckv_version: str
    python_version: str
    system: str

    @classmethod
    def of(cls, device: torch.device) -> Environment:
        """This machine, as seen from this process."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        return cls(
            device=f"{device} ({name or platform.machine()})",
            num_threads=torch.get_num_threads(),
            torch_version=torch.__version__,
            transformers_version=version("transformers"),
            lckv_version=version("lckv"),
            python_version=platform.python_version(),
            system=platform.platform(),
        )


def as_dict(
    results: Sequence[Measurements], workload: Workload, environment: Environment, num_rounds: int
) -> dict[str, Any]:
    """Everything, in base units: bytes, seconds, tokens. Ratios are to the first contender.

    Args:
        results: of all contenders.
        workload: what they were to do.
        environment: where.
        num_rounds: how many rounds they did; fewer than the workload's if somebody interrupted them.
    """
    return {
        "workload": asdict(workload),
        "environment": asdict(environment),
        "num_rounds": num_rounds,
        "is_interrupted": num_rounds < workload.rounds,
        "candidates": [_contender(result, results[0], workload) for result in results],
    }


def _contender(result: Measurements, first: Measurements, workload: Workload) -> dict[str, Any]:
    given = asdict(result)
    times = {name: given.pop(f"{name}_seconds") for name in ("prefill", "first_token")}
    batches = [_batch(batch, _same_batch(first, batch), workload) for batch in result.batches]
    bytes_per_token = {
        "resident": None if result.resident_bytes is None else result.resident_bytes / workload.length,
        "written": result.written_bytes,
        "read": result.read_bytes,
    }
    return given | {
        "plan": {"kv_bytes": given.pop("kv_bytes"), "flops_per_token": given.pop("flops")},
        "kv_bytes_per_token": bytes_per_token,
        **{
            f"{name}_seconds": _summary(values, ratio(values, getattr(first, f"{name}_seconds")))
            for name, values in times.items()
        },
        "batches": batches,
        "budget_growth": growth(result, first),
        "planned_budget_growth": planned_growth(result, first),
    }


def _batch(batch: BatchMeasurements, first: BatchMeasurements | None, workload: Workload) -> dict[str, Any]:
    speeds, speeds_of_first = (
        tokens_per_second(batch, workload.new_tokens),
        tokens_per_second(first, workload.new_tokens),
    )
    given = asdict(batch)
    given.pop("seconds")
    return given | {"tokens_per_second": _summary(speeds, ratio(speeds, speeds_of_first))}


def _summary(values: Sequence[float], to_first: float | None) -> dict[str, Any]:
    return {"rounds": list(values), "median": median(values), "to_first": to_first}


def _same_batch(result: Measurements, batch: BatchMeasurements) -> BatchMeasurements | None:
    return result.budget_batch if batch.fills_budget else result.batch(batch.batch_size)


def growth(result: Measurements, first: Measurements) -> float | None:
    """How many times the sequences of the first contender fit into the budget."""
    mine, other = result.budget_batch, first.budget_batch
    return None if mine is None or other is None or not other.batch_size else mine.batch_size / other.batch_size


def planned_growth(result: Measurements, first: Measurements) -> float | None:
    """The same without rounding to whole sequences: the ratio of the planned bytes of one."""
    mine, other = result.budget_batch, first.budget_batch
    if mine is None or other is None:
        return None
    mine_per_sequence = mine.planned_kv_bytes / max(1, mine.batch_size)
    return other.planned_kv_bytes / max(1, other.batch_size) / mine_per_sequence


def print_report(
    results: Sequence[Measurements],
    workload: Workload,
    environment: Environment,
    num_rounds: int,
    console: Console,
) -> None:
    """Prints the tables, why something failed, and what the figures mean; the arguments are those of [`as_dict`]."""
    tables = [_time_table(results, workload), _bytes_table(results, workload)]
    if workload.kv_budget is not None:
        tables.insert(1, _budget_table(results, workload, workload.kv_budget))
    for table in tables:
        console.print(table)
        console.print()
    for line in failures(results):
        console.print(Text(line, style="red"))
    if num_rounds < workload.rounds:
        console.print(Text(f"interrupted after {num_rounds} of {workload.rounds} rounds", style="red"))
    console.print(
        f"Medians of {num_rounds} rounds in which the contenders took turns; x: the median of the ratios to the "
        f"first within a round.\n{workload.prompt_length} tokens of prompt, {workload.new_tokens} decoding steps, "
        f"threads: {environment.num_threads}, {environment.device}, torch {environment.torch_version}.\n"
        "Bytes: resident are those of the cache's tensors; written are the states that the cache is given, and read "
        "the keys and values that it gives\nto the attention of each layer. A cache that quantises also writes codes, "
        "scales and zero points, a group of tokens at once (here per token),\nand reads what it stores once per step "
        "for all layers that share it, twice where layers read upward. In brackets, the plan's where it differs. "
        "Peak: beyond the weights, cache included."
    )


def failures(results: Sequence[Measurements]) -> list[str]:
    """One line for everything that failed."""
    lines = []
    for result in results:
        if result.error is not None:
            lines.append(f"{result.label}: {result.error}")
        for batch in result.batches:
            if batch.error is not None:
                name = "largest batch" if batch.fills_budget else f"batch {batch.batch_size}"
                lines.append(f"{result.label}, {name}: {batch.error}")
    return lines


def _time_table(results: Sequence[Measurements], workload: Workload) -> Table:
    table = _table("Time", ["prefill", "first token", *(f"tokens/s,\nbatch {size}" for size in workload.batch_sizes)])
    first = results[0]
    for result in results:
        table.add_row(
            result.label,
            _compared(result.prefill_seconds, first.prefill_seconds, _seconds),
            _compared(result.first_token_seconds, first.first_token_seconds, _seconds),
            *(_speed(result.batch(size), first.batch(size), workload) for size in workload.batch_sizes),
        )
    return table


def _budget_table(results: Sequence[Measurements], workload: Workload, budget: int) -> Table:
    headings = ["batch", "growth", "by the plan", "KV bytes", "decode peak", "tokens/s"]
    table = _table(f"Largest batch in {_bytes(budget)} of KV", headings)
    for result in results:
        batch, grown, planned = result.budget_batch, growth(result, results[0]), planned_growth(result, results[0])
        table.add_row(
            result.label,
            "-" if batch is None else f"{batch.batch_size}",
            "-" if grown is None else f"{grown:.2f}x",
            "-" if planned is None else f"{planned:.2f}x",
            _bytes(None if batch is None else batch.kv_bytes),
            _bytes(None if batch is None else batch.peak_bytes),
            _speed(batch, results[0].budget_batch, workload),
        )
    return table


def _speed(batch: BatchMeasurements | None, first: BatchMeasurements | None, workload: Workload) -> str:
    if batch is None or batch.error is not None:
        return "-" if batch is None else "failed"
    mine, base = (tokens_per_second(each, workload.new_tokens) for each in (batch, first))
    return _compared(mine, base, lambda speed: f"{speed:,.1f}")


def _bytes_table(results: Sequence[Measurements], workload: Workload) -> Table:
    headings = ["KV resident\nper token", "written\nper token", "read\nper token", "prefill\npeak"]
    headings += [f"decode peak,\nbatch {size}" for size in workload.batch_sizes]
    table = _table("Bytes", [*headings, "weights"])
    for result in results:
        table.add_row(result.label, *_byte_cells(result, results[0], workload), _bytes(result.weight_bytes))
    return table


def _byte_cells(result: Measurements, first: Measurements, workload: Workload) -> list[str]:
    plan, batches = result.kv_bytes, [result.batch(size) for size in workload.batch_sizes]
    return [
        _measured(result.resident_bytes, first.resident_bytes, plan.resident_total, workload.length),
        _measured(result.written_bytes, first.written_bytes, plan.written),
        _measured(result.read_bytes, first.read_bytes, plan.read),
        _bytes(result.prefill_peak_bytes),
        *(_bytes(None if batch is None else batch.peak_bytes) for batch in batches),
    ]


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _measured(measured: int | None, first: int | None, planned: int, num_tokens: int = 1) -> str:
    if measured is None:
        return "-"
    to_first = f" {measured / first:.2f}x" if first else ""
    shown, expected = (f"{value / num_tokens:,.0f}" for value in (measured, planned))
    return shown + to_first + ("" if shown == expected else f" [{expected}]")


def _compared(mine: Sequence[float], base: Sequence[float], show: Callable[[float], str]) -> str:
    middle, to_first = median(mine), ratio(mine, base)
    if middle is None:
        return "-"
    return show(middle) + ("" if to_first is None else f" {to_first:.2f}x")


def _seconds(value: float) -> str:
    return f"{value * 1000:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value} B"
