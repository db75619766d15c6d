"""Checkpoints that are whole or absent: written aside, checked, then renamed into place."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lckv.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""Lists the files of a checkpoint with their sizes; the last file that is written."""

_NAME = re.compile(r"checkpoint-(\d+)")
_ASIDE = (".saving-", ".deleting-")


class CheckpointFolder:
    """The folder of a run's checkpoints, `checkpoint-<step>` each.

    A checkpoint is written under a name that nobody looks for. Once every file and the manifest are on the disk, one
    rename puts it in its place, so that a process killed at any moment leaves either the whole checkpoint or none.

    Args:
        path: the folder; made when the first checkpoint is saved.
        keep: how many checkpoints rotation leaves, `None` for all. The newest whole one is never deleted.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self.path = path
        self.keep = keep

    def staging(self, step: int) -> Path:
        """Where the checkpoint of `step` is written until it is whole."""
        return self.path / f".saving-{step}"

    def publish(self, step: int, written: Path) -> Path:
        """Makes the folder `written` the checkpoint of `step`, and rotates older ones away."""
        _write_manifest(written)
        target = self.path / f"checkpoint-{step}"
        if target.exists():  # an unfit one: a whole one would have been resumed from, behind this step
            self._delete(target)
        os.replace(written, target)
        _sync(self.path)
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
        for prefix in _ASIDE:
            for path in self.path.glob(f"{prefix}*"):
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
                self._delete(path)

    def _delete(self, path: Path) -> None:
        aside = path.with_name(f".deleting-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which `checkpoint` was saved."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


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


@contextlib.contextmanager
def saving(what: str, aside: Path, consequence: str) -> Iterator[None]:
    """Turns a failure to write into one line for the user, and removes the half-written folder `aside`.

    Args:
        what: what was being saved, e.g. `"the checkpoint of step 40"`.
        aside: the folder that is written to, removed if writing fails.
        consequence: what the user is left with and what to do, the end of the message.

    Raises:
        UserError: if the disk is full, or writing fails for another reason outside the program.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not _is_write_failure(error):
            raise
        parent = next(path for path in aside.parents if path.exists())
        free = shutil.disk_usage(parent).free
        raise UserError(
            f"could not save {what} in {aside.parent}: {_reason(error)} ({free / 1e6:,.0f} MB are free); {consequence}"
        ) from error


def _is_write_failure(error: Exception) -> bool:
    # torch's zip writer and safetensors report a failed write in words only.
    words = ("PytorchStreamWriter", "inline_container", "iostream error", "I/O error", "I/O Error", "os error")
    return isinstance(error, OSError) or any(word in str(error) for word in words)


def _reason(error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None:  # torch wraps the failed write that started it all
        if isinstance(cause, OSError) and cause.errno is not None:
            return "the disk is full" if cause.errno == errno.ENOSPC else os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    return (
        "the disk is full" if "No space left" in str(error) else "writing failed, most likely because of a full disk"
    )


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        _sync(file)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(sizes, indent=2) + "\n")
    _sync(manifest)
    _sync(folder)


def _sync(path: Path) -> None:
    # Without this, a power cut after the rename could leave a whole-looking checkpoint of empty files.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
