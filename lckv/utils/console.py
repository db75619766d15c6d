"""What people see: consoles, bars with the time that is left, and what they may type next."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Self, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")

_WIDE = 140


def new_console(*, to_stderr: bool = False, is_quiet: bool = False, is_wide: bool = False) -> Console:
    """A console that prints text as it is: nothing in it is markup, a number to highlight, or wrapped.

    Args:
        to_stderr: for what is no result, such as progress.
        is_quiet: for processes that are to print nothing.
        is_wide: for tables: as wide as the terminal; elsewhere, such as in a file, wide enough for them.
    """
    console = Console(stderr=to_stderr, quiet=is_quiet, markup=False, highlight=False, soft_wrap=True)
    if is_wide and not console.is_terminal:
        console.width = _WIDE
    return console


class Bar:
    """How much of something is done, and how long the rest takes: on terminals only, and gone at the end.

    `unit` is in the plural, and `total` how much there is to do, where that is known.
    """

    def __init__(self, console: Console, what: str, unit: str = "", total: float | None = None) -> None:
        self._progress = Progress(
            _CountColumn(unit),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # results go there, which is not where the bar is
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> Self:
        self.show()
        return self

    def __exit__(self, *_: object) -> None:
        self.hide()

    def show(self) -> None:
        """Puts the bar below what has been printed."""
        self._progress.start()

    def hide(self) -> None:
        """Makes room for text on the same terminal."""
        self._progress.stop()

    def update(self, done: float, total: float | None = None) -> None:
        """Says how much is done, and of how much if that was not known."""
        self._progress.update(self._task, completed=done, total=total)

    def advance(self, count: float = 1) -> None:
        """Says how much more is done; the bar goes as soon as that is all."""
        self._progress.advance(self._task, count)
        if self._progress.finished:
            self.hide()

    def track(self, items: Iterable[T]) -> Generator[T, None, None]:
        """Yields `items`, each of which counts as one."""
        yield from self._progress.track(items, task_id=self._task)


def track(items: Iterable[T], what: str, total: int | None = None) -> Generator[T, None, None]:
    """Yields `items` while a bar shows how many have passed."""
    with Bar(new_console(to_stderr=True), what, total=total) as bar:
        yield from bar.track(items)


class _CountColumn(ProgressColumn):
    """Such as "writing 1,500 of 2,500 bytes"."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The text for the bar as it stands."""
        of_total = "" if task.total is None else f" of {task.total:,.0f}"
        return Text(f"{task.description} {task.completed:,.0f}{of_total} {self.unit}".rstrip())


def command(module: str, arguments: Iterable[str]) -> str:
    """What to type to run a module with these arguments: for this Python, `python` where the shell finds the same."""
    return f"{python()} -m {module} {shlex.join(arguments)}"


def python() -> str:
    """What to type for this Python: `python` where the shell finds the same, else its path."""
    executable = Path(sys.executable)
    found = shutil.which("python")
    if found is not None and Path(found).absolute().parent == executable.parent:
        return "python"
    is_here = executable.is_relative_to(Path.cwd())
    return shlex.quote(str(executable.relative_to(Path.cwd()) if is_here else executable))


def arguments_of_this_run() -> list[str]:
    """The command line of this run; for a job of a sweep, what runs this job alone."""
    given = sys.argv[1:]
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return given
    flags = [item for item in given if (item.startswith("-") or "=" not in item) and item not in ("-m", "--multirun")]
    return [*flags, *HydraConfig.get().overrides.task]
