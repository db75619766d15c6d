"""The figures of `results.json` as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lckv.evaluation.evaluations import scalar_figures


def show_results(results: Mapping[str, Any], path: Path, console: Console) -> None:
    """Prints the numbers among the figures of every evaluation, the costs, and where all of it is written."""
    title = f"{results['model']['name']}  {results['layer_types']}"
    table = Table(title=title, title_justify="left")
    for heading, justify in ("evaluation", "left"), ("figure", "left"), ("value", "right"):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    sections = {name: map(_show, scalar_figures(figures)) for name, figures in results["evaluations"].items()}
    for section, rows in {**sections, "costs": _costs(results["costs"])}.items():
        shown = list(rows)
        for number, (name, value) in enumerate(shown):
            table.add_row("" if number else section, name, value, end_section=number == len(shown) - 1)
    console.print(table)
    others = results.get("with_other_settings", {})
    if others:
        told = ", ".join(f"{name} ({len(figures)})" for name, figures in others.items())
        console.print(f"the file also holds figures with other settings: {told}")
    console.print(f"written: {path}")


def _costs(costs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    context = f"at {costs['kv_bytes_context_length']:,} tokens, in 16 bits"
    for name, what in (
        ("written", "written per token, in 16 bits"),
        ("resident", f"resident per token {context}"),
        ("read", f"read to decode a token {context}"),
    ):
        of_llama = f"Llama: {costs['kv_bytes_llama'][name]:,.0f}"
        yield f"KV bytes {what}", f"{costs['kv_bytes'][name]:,.0f}  ({of_llama})"
    yield "parameters", f"{costs['num_parameters']:,}"
    flops, speed = costs["train_flops_per_token"], costs["train_tokens_per_second"]
    yield "FLOPs to train on a token", "depends on the text" if flops is None else f"{flops:,.0f}"
    if speed is not None:
        yield "training tokens/s", f"{speed:,.0f}"


def _show(figure: tuple[str, float]) -> tuple[str, str]:
    name, value = figure
    return name, f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
