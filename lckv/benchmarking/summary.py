"""The figures as a table and as JSON-able data."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lckv.benchmarking.measurements import BatchMeasurements, Measurements, Workload, median, ratio, tokens_per_second
from lckv.environment import describe_hardware, versions


def environment_of(device: torch.device) -> dict[str, Any]:
    """What figures are measured on: this machine, as seen from this process."""
    hardware = describe_hardware(device)
    return {
        "device": f"{device} ({hardware['device']})",
        "num_threads": hardware["num_threads"],
        **{f"{name}_version": version for name, version in versions().items()},
        "system": platform.platform(),
    }


def as_dict(
    results: Sequence[Measurements], workload: Workload, environment: Mapping[str, Any], num_rounds: int
) -> dict[str, Any]:
    """Everything, in base units: bytes, seconds, tokens. Ratios are to the first contender.

    Args:
        results: of all contenders.
        workload: what they were to do.
        environment: where, see [`environment_of`].
        num_rounds: how many rounds they did; fewer than the workload's if somebody interrupted them.
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
    prefill, first_token = given.pop("prefill_seconds"), given.pop("first_token_seconds")
    resident = None if result.resident_bytes is None else result.resident_bytes / workload.length
    return given | {
        "plan": {"kv_bytes": given.pop("kv_bytes"), "flops_per_token": given.pop("flops")},
        "kv_bytes_per_token": {"resident": resident, "written": result.written_bytes, "read": result.read_bytes},
        "prefill_seconds": _summary(prefill, first.prefill_seconds),
        "first_token_seconds": _summary(first_token, first.first_token_seconds),
        "batches": [_batch(batch, first, workload) for batch in result.batches],
        "budget_growth": growth(result, first),
        "planned_budget_growth": planned_growth(result, first),
    }


def _batch(batch: BatchMeasurements, first: Measurements, workload: Workload) -> dict[str, Any]:
    same = first.budget_batch if batch.fills_budget else first.batch(batch.batch_size)
    mine, base = (tokens_per_second(each, workload.new_tokens) for each in (batch, same))
    given = asdict(batch)
    given.pop("seconds")
    return given | {"tokens_per_second": _summary(mine, base)}


def _summary(values: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    return {"rounds": list(values), "median": median(values), "to_first": ratio(values, base)}


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
    environment: Mapping[str, Any],
    num_rounds: int,
    console: Console,
) -> None:
    """Prints the tables, why something failed, and what the figures mean; the arguments are those of [`as_dict`]."""
    tables = [_time_table(results, workload), _bytes_table(results, workload)]
    if workload.kv_budget is not None:
        tables.insert(1, _budget_table(results, workload))
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
        f"threads: {environment['num_threads']}, {environment['device']}, torch {environment['torch_version']}.\n"
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
        lines.append((result.label, result.error))
        for batch in result.batches:
            name = "largest batch" if batch.fills_budget else f"batch {batch.batch_size}"
            lines.append((f"{result.label}, {name}", batch.error))
    return [f"{label}: {error}" for label, error in lines if error is not None]


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


def _budget_table(results: Sequence[Measurements], workload: Workload) -> Table:
    headings = ["batch", "growth", "by the plan", "KV bytes", "decode peak", "tokens/s"]
    table = _table(f"Largest batch in {_bytes(workload.kv_budget)} of KV", headings)
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
    table, first = _table("Bytes", [*headings, "weights"]), results[0]
    for result in results:
        plan, batches = result.kv_bytes, [result.batch(size) for size in workload.batch_sizes]
        table.add_row(
            result.label,
            _measured(result.resident_bytes, first.resident_bytes, plan.resident_total, workload.length),
            _measured(result.written_bytes, first.written_bytes, plan.written),
            _measured(result.read_bytes, first.read_bytes, plan.read),
            _bytes(result.prefill_peak_bytes),
            *(_bytes(None if batch is None else batch.peak_bytes) for batch in batches),
            _bytes(result.weight_bytes),
        )
    return table


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
