"""Writes the folder of a report: all of it or nothing, and over nothing but an earlier report."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib import rc_context

from lckv.errors import UserError
from lckv.reporting.analysis import Report
from lckv.reporting.figures import MADE_BY, to_figures
from lckv.reporting.html import to_html
from lckv.reporting.markdown import to_markdown
from lckv.reporting.pictures import Picture, pictures_of
from lckv.reporting.pictures.base import draw_on_paper
from lckv.reporting.pictures.style import RC

_FIGURES = "report.json"


def check_out(out: Path) -> None:
    """Refuses a place where something else than an earlier report would be lost.

    Raises:
        UserError: if there is a file, or a folder with other things, or it is the current folder.
    """
    if out.resolve() == Path.cwd():
        raise UserError(f"out={out}: is the current folder, which a report would take the place of; name another")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"out={out}: is {'a link' if out.is_symlink() else 'a file'}; name a folder")
    others = {path.name for path in out.iterdir()} - _own_files(out) if out.is_dir() else set()
    if others:
        raise UserError(f"out={out}: holds {min(others)}, which is no part of a report; give another out=...")


def _own_files(out: Path) -> set[str]:
    """The files of an earlier report, which its figures list."""
    try:
        figures = json.loads((out / _FIGURES).read_text(encoding="utf-8"))
        return set(figures["files"]) if figures["made_by"] == MADE_BY else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def write_report(report: Report, out: Path) -> list[Path]:
    """Writes Markdown, HTML, pictures and figures, and returns their paths.

    Raises:
        UserError: see `check_out`.
    """
    pictures = pictures_of(report)
    with _replacing(out) as folder:
        (folder / "report.md").write_text(to_markdown(report, pictures), encoding="utf-8")
        (folder / "report.html").write_text(to_html(report, pictures), encoding="utf-8")
        for picture in pictures:
            _save(picture, folder)
        files = sorted([*(path.name for path in folder.iterdir()), _FIGURES])
        figures = {**to_figures(report), "files": files}
        (folder / _FIGURES).write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return [out / name for name in files]


def _save(picture: Picture, folder: Path) -> None:
    with rc_context(RC):
        figure = draw_on_paper(picture)
        figure.savefig(folder / f"{picture.name}.png")
        figure.savefig(folder / f"{picture.name}.svg", metadata={"Date": None})


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and is deleted otherwise."""
    staging, aside = (out.parent / f".report-{kind}-{uuid.uuid4().hex[:8]}" for kind in ("new", "old"))
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out={out}: cannot be made ({error.strerror}); give another out=...") from error
    try:
        yield staging
        check_out(out)  # perhaps it was filled meanwhile
        if out.exists():
            os.rename(out, aside)
        os.rename(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if aside.exists() and not out.exists():
            os.rename(aside, out)
        shutil.rmtree(aside, ignore_errors=True)
