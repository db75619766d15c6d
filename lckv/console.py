"""How far conversions and searches are, shown on terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def showing_progress(console: Console, what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time that is left; the block calls what it gets with how much is done, and how much there is.

    Args:
        console: where to show it, if it is a terminal.
        what: is done.
        unit: in which it is counted, in the plural.
    """
    columns = (
        TextColumn(f"{what} {{task.completed:,.0f}} of {{task.total:,.0f}} {unit}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=0)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def counting_progress(console: Console, what: str, unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """The same where `total` is known, and the block calls what it gets with how much more is done."""
    done = 0
    with showing_progress(console, what, unit) as show:
        show(done, total)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            show(done, total)

        yield advance
