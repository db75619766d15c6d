"""For scripts that set ways of doing one thing side by side: they take turns, and rows and curves are shown."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.table import Table

from lckv.benchmarking.results import median, ratio
from lckv.utils.charts import new_chart, save_chart
from lckv.utils.console import new_console, track
from lckv.utils.storage import write_json

K = TypeVar("K")


def read_arguments(description: str | None, *required: str, **defaults: Any) -> Namespace:
    """Reads a script's command line, and sets torch's threads and the seed.

    Args:
        description: what `--help` says first.
        required: names of arguments without `--`.
        defaults: the others; their values say their types. `threads` (1), `rounds` (5) and `output` (a JSON file) are
            every script's.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    for name in required:
        parser.add_argument(name)
    for name, default in ({"threads": 1, "rounds": 5, "output": ""} | defaults).items():
        kind: dict[str, Any] = {"type": type(default)}
        if isinstance(default, bool):
            kind = {"action": "store_true"}
        elif isinstance(default, tuple):
            kind = {"type": type(default[0]), "nargs": "*"}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help="by default %(default)s", **kind)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


def take_turns(
    ways: Mapping[K, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    warm_up: int = 1,
) -> dict[K, list[float]]:
    """Seconds of each way in each round, so that other load on the machine falls on all of them.

    Args:
        ways: what is timed, by name.
        rounds: how often.
        clock: by default the process's CPU time, which other processes disturb less.
        warm_up: rounds before these, which do not count.
    """
    seconds: dict[K, list[float]] = {name: [] for name in ways}
    for turn in track(range(-warm_up, rounds), "rounds", warm_up + rounds):
        for name, way in ways.items():
            start = clock()
            way()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return seconds


def milliseconds(seconds: Mapping[str, Sequence[float]], baseline: str) -> dict[str, dict[str, float | None]]:
    """Each way's median, and the median over the rounds of the ratio to the baseline within a round."""
    return {
        name: {"ms": 1000 * (median(values) or 0), f"to {baseline}": ratio(values, seconds[baseline])}
        for name, values in seconds.items()
    }


def show(*tables: Mapping[str, Mapping[str, Any]], output: str = "") -> None:
    """Prints each table of rows, with a column for every name in them, and writes the figures to the file `output`."""
    for rows in tables:
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        table = Table("", *columns)
        for name, row in rows.items():
            table.add_row(name, *(_shown(row.get(column)) for column in columns))
        new_console(is_wide=True).print(table)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(output), tables)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def draw(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], xlabel: str, path: Path) -> None:
    """Draws curves, by their label, into panels side by side, by what is on their vertical axis."""
    figure, all_axes = new_chart((1.5 + 4 * len(panels), 3.8), num_columns=len(panels))
    for axes, (ylabel, curves) in zip(all_axes, panels.items(), strict=True):
        for label, (x, y) in curves.items():
            axes.plot(x, y, label=label, marker="o" if len(x) < 50 else None, markersize=4)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_chart(figure, path)
