"""Where a benchmark's results go, so that none overwrites another's unasked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lckv.errors import UserError
from lckv.storage import numbered, write_json

_DEFAULT = Path("runs") / "benchmark"
_RESULTS = "benchmark.json"

logger = logging.getLogger(__name__)


class OutputFolder:
    """Holds `benchmark.json` and the picture beside it.

    Args:
        path: the folder; `None` takes the first of `runs/benchmark`, `runs/benchmark-2`, ... that does not exist.
        overwrite: whether the results of an earlier run there may be replaced.
        plot_format: of the picture.

    Raises:
        UserError: if the folder holds results, or is a file.
    """

    def __init__(self, path: str | None, *, overwrite: bool, plot_format: str) -> None:
        self.path = _DEFAULT if path is None else Path(path)
        self._is_named, self._overwrite, self._plot_format = path is not None, overwrite, plot_format
        if path is not None and self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir={path}: is a file; name a folder")
        if path is not None and self.results.exists() and not overwrite:
            raise UserError(
                f"output_dir={path}: holds the results of an earlier run; name another folder, or give overwrite=true"
            )

    @property
    def results(self) -> Path:
        """The file with the figures."""
        return self.path / _RESULTS

    @property
    def plot(self) -> Path:
        """The file with the picture."""
        return self.path / f"benchmark.{self._plot_format}"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes the folder, so that no run that begins meanwhile takes it, too; if it stays empty, it goes again."""
        is_new = not self._is_named or not self.path.exists()
        if self._is_named:
            self.path.mkdir(parents=True, exist_ok=True)
        else:
            self.path = _make_first_free(self.path)
        try:
            yield
        finally:
            if is_new and not any(self.path.iterdir()):
                self.path.rmdir()

    def write(self, figures: dict[str, Any]) -> None:
        """Writes the figures inside `claimed`.

        If another run has left its own there since this one began, it takes a numbered folder beside it.
        """
        if not self._overwrite and not _is_new(partial(self.results.touch, exist_ok=False)):
            taken, self.path = self.path, _make_first_free(self.path)
            logger.warning("%s has got the results of another run meanwhile; these go to %s", taken, self.path)
        write_json(self.results, figures)


def _make_first_free(path: Path) -> Path:
    """Makes the first of `path`, `path-2`, ... that does not exist; of several runs, each gets one of its own."""
    return next(folder for folder in numbered(path) if _is_new(partial(folder.mkdir, parents=True)))


def _is_new(make: Callable[[], None]) -> bool:
    """Makes it, and says whether it was not there: asked beforehand, another process could come in between."""
    try:
        make()
    except FileExistsError:
        return False
    return True
