"""Checkpoints that are whole or absent: written aside, checked, then renamed into place."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from lckv.errors import UserError
from lckv.utils.storage import clear_away, put_in_place, remove_folder, why_not_written, write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""Lists the files of a checkpoint with their sizes; the last file that is written."""

_NAME = re.compile(r"checkpoint-(\d+)")
_STAGING = ".saving-"


@dataclass(frozen=True)
class CheckpointFolder:
    """The folder of a run's checkpoints, `checkpoint-<step>` each.

    A checkpoint is written under a name that nobody looks for. Once every file and the manifest are on the disk, one
    rename puts it in its place, so that a process killed at any moment leaves either the whole checkpoint or none.

    Args:
        path: the folder; made when the first checkpoint is saved.
        keep: how many checkpoints rotation leaves, `None` for all. The newest whole one is never deleted.
    """

    path: Path
    keep: int | None = None

    def staging(self, step: int) -> Path:
        """Where all processes write the checkpoint of `step` until it is whole."""
        return self.path / f"{_STAGING}{step}"

    def publish(self, step: int, written: Path) -> Path:
        """Makes the folder `written` the checkpoint of `step`, and rotates older ones away."""
        files = sorted(path for path in written.rglob("*") if path.is_file())
        write_json(written / MANIFEST, {str(file.relative_to(written)): file.stat().st_size for file in files})
        target = self.path / f"checkpoint-{step}"
        put_in_place(written, target)  # of an unfit one: a whole one would have been resumed from, behind this step
        shutil.rmtree(self.staging(step), ignore_errors=True)
        self._rotate()
        return target

    def latest(self) -> Path | None:
        """Returns the newest whole checkpoint; warns about newer ones that are not whole."""
        for path in reversed(self._all()):
            if fault := find_fault(path):
                logger.warning("checkpoint %s is not whole (%s): not used", path, fault)
            else:
                return path
        return None

    def clean(self) -> None:
        """Removes what saving or deleting left behind when the process was killed."""
        clear_away(self.path)
        for path in self.path.glob(f"{_STAGING}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _all(self) -> list[Path]:
        found = [(int(match[1]), path) for path in self.path.glob("*") if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def _rotate(self) -> None:
        if self.keep is None:
            return
        newest = self.latest()
        for path in self._all()[: -self.keep]:
            if path != newest:
                remove_folder(path)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which `checkpoint` was saved."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def num_processes_of(checkpoint: Path) -> int:
    """How many processes have saved `checkpoint`: each leaves the state of its random numbers."""
    return len(list(checkpoint.glob("rng_state*.pth")))


def find_fault(checkpoint: Path) -> str | None:
    """Says what is wrong with a checkpoint folder, or returns `None` for a whole one."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


@contextmanager
def saving(what: str, folder: Path, consequence: str) -> Iterator[None]:
    """Turns a failure to write into one line for the user.

    Args:
        what: what is being saved, e.g. `"the checkpoint of step 40"`.
        folder: where.
        consequence: what the user is left with and what to do, the end of the message.

    Raises:
        UserError: if the disk is full, or writing fails for another reason outside the program.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := why_not_written(error)) is None:
            raise
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        raise UserError(
            f"could not save {what} in {folder}: {reason} ({free / 1e6:,.0f} MB are free); {consequence}"
        ) from error
