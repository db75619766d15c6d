"""Where a benchmark's results go, so that none overwrites another's unasked."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

from lckv.errors import UserError, near_miss

PLOT_FORMATS = ("png", "svg", "pdf")
_RESULTS = "benchmark.json"


class OutputFolder:
    """Holds `benchmark.json` and the picture beside it.

    Args:
        path: the folder; `None` takes the first of `runs/benchmark`, `runs/benchmark-2`, ... that has no results.
        overwrite: whether the results of an earlier run there may be replaced.
        plot_format: of the picture.

    Raises:
        UserError: if the folder holds results, or is a file.
    """

    def __init__(self, path: str | None, *, overwrite: bool, plot_format: str) -> None:
        if plot_format not in PLOT_FORMATS:
            hint = near_miss(plot_format, PLOT_FORMATS)
            raise UserError(f"plot_format={plot_format}: allowed are {', '.join(PLOT_FORMATS)}{hint}")
        if path is None and overwrite:
            raise UserError("overwrite=true: has no effect without output_dir; name the folder, or leave it out")
        self.path = _first_free(Path("runs") / "benchmark") if path is None else Path(path)
        self.plot = self.path / f"benchmark.{plot_format}"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir={path}: is a file; name a folder")
        if self.results.exists() and not overwrite:
            raise UserError(
                f"output_dir={path}: holds the results of an earlier run; name another folder, or give overwrite=true"
            )

    @property
    def results(self) -> Path:
        """The file with the figures."""
        return self.path / _RESULTS

    def write(self, figures: dict[str, Any]) -> None:
        """Writes the figures, whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        aside = self.path / f".{_RESULTS}.tmp"
        aside.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, self.results)


def _first_free(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([path], numbered) if not (folder / _RESULTS).exists())
