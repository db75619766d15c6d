"""Files and folders that are written whole or not at all: nothing saved is lost or torn by a mistake or a kill.

What is written grows under a hidden name beside its place. Only once all of it is on the disk does a rename put it
there, so that whoever looks sees what was there before or what is there now, never something between. A hidden name
says which process made it; what killed processes have left is cleared away by the next one that writes there.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lckv.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CANNOT_WRITE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the operating system says where nothing can be written, and no program could do better."""

_PARTIAL, _REPLACED, _DELETED = "partial", "replaced", "deleted"
_HIDDEN = re.compile(rf"\.(.+)\.({_PARTIAL}|{_REPLACED}|{_DELETED})-(.+)-(\d+)-[0-9a-f]{{8}}(\.\w+)?")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole, in place of what was there."""
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, **options: Any) -> None:
    """The same for what JSON can hold, indented; `options` are those of `json.dumps`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, **options) + "\n")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name to write a file under, of the same ending; it takes the place of `path` when the block ends well."""
    clear_away(path.parent, path.name)
    written = _hidden(path, _PARTIAL, path.suffix)
    try:
        yield written
        _sync(written)
        os.replace(written, path)
        _sync(path.parent)
    finally:
        written.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, replaces: bool = False) -> Iterator[Path]:
    """A folder to write into, which appears as `path` when the block ends well, and is deleted otherwise.

    Processes that write the same folder at the same time do not disturb each other: the first one has it.

    Args:
        path: where; a link to a folder stays a link.
        replaces: whether it takes the place of a folder that is there; else that may only be an empty one.

    Raises:
        UserError: if `path` was filled meanwhile, and must not be replaced.
    """
    path = path.resolve()
    clear_away(path.parent, path.name)
    written = _hidden(path, _PARTIAL)
    written.mkdir(parents=True)
    try:
        yield written
        if replaces:
            put_in_place(written, path)
        else:
            _sync_all(written)
            _take_place(written, path)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def put_in_place(written: Path, path: Path) -> None:
    """Renames a folder that is complete, in place of the one that was there: that comes back if the renaming fails."""
    _sync_all(written)
    replaced = _hidden(path, _REPLACED)
    if path.exists():
        os.replace(path, replaced)
    try:
        os.replace(written, path)
    except BaseException:
        if replaced.exists():
            os.replace(replaced, path)
        raise
    _sync(path.parent)
    if replaced.exists():
        remove_folder(replaced, of=path)


def remove_folder(path: Path, *, of: Path | None = None) -> None:
    """Deletes a folder, which at no time is there in part; `of` is what it was, if it goes by a hidden name now."""
    deleted = _hidden(of or path, _DELETED)
    os.replace(path, deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def clear_away(folder: Path, name: str | None = None) -> None:
    """Deletes what processes of this machine that are no longer there have left of `name`, or of anything.

    A folder that was to be replaced when its process was killed comes back.
    """
    for entry in folder.glob(".*"):
        if not (found := _HIDDEN.fullmatch(entry.name)) or found[3] != platform.node():
            continue
        if name not in (None, found[1]) or psutil.pid_exists(int(found[4])):
            continue
        if found[2] == _REPLACED and not (folder / found[1]).exists():
            os.replace(entry, folder / found[1])
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, wait: float = -1, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Keeps other processes out while the block runs; this one may come in again.

    Args:
        path: of a file that stands for what must be written by one process only.
        wait: for how many seconds, if another process is in there; -1: until it is out.
        on_wait: called before waiting.

    Raises:
        TimeoutError: if the other one was in there all the while.
    """
    lock = FileLock(path, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if on_wait is not None:
            on_wait()
        lock.acquire(timeout=wait)
    try:
        yield
    finally:
        lock.release()


def check_new_folder(path: Path, key: str = "out") -> None:
    """Refuses a place, given under `key`, where a folder cannot appear without anything being lost.

    Raises:
        UserError: if something is there already, be it an empty file, or there can be no folder, or it would take the
            place of one that the shell is in.
    """
    here, place = Path.cwd(), path.resolve()
    if place in (here, *here.parents):
        raise UserError(f"{key}={path}: is the current folder, or holds it; name a folder that is not there yet")
    check_folder(path, f"{key}={path}", instead="name a folder that is not there yet")
    if place.is_dir() and any(place.iterdir()):
        raise UserError(f"{key}={path}: is not empty; name a folder that is not there yet")


def check_new_file(path: Path, suffix: str) -> None:
    """Refuses a place, given as `out`, where a file cannot appear without anything being lost.

    Raises:
        UserError: if it has not this suffix, something is there already, or there can be no file.
    """
    instead = f"name a file that is not there yet, such as model{suffix}"
    if path.suffix.lower() != suffix:
        raise UserError(f"out={path}: does not end in {suffix}; {instead}")
    if path.exists():
        raise UserError(f"out={path}: is there already; {instead}")
    check_folder(path.parent, f"out={path}", instead)


def check_folder(path: Path, setting: str, instead: str = "name another folder") -> None:
    """Refuses a folder that cannot be made, or be written into; only trying tells, as of what is in /proc.

    Args:
        path: the folder, which may be there.
        setting: what the user gave, `key=value`.
        instead: what may be done.

    Raises:
        UserError: if it is a file or in one, or for what the operating system says.
    """
    place = path.resolve()
    try:
        missing = [each for each in (place, *place.parents) if not each.exists()]
        nearest = missing[-1].parent if missing else place
        if not nearest.is_dir():
            file = nearest if path.is_absolute() else os.path.relpath(nearest)
            raise UserError(f"{setting}: {file} is a file; {instead}")
        tried = _hidden(missing[-1] if missing else place / "new", _PARTIAL)
        tried.mkdir()
        tried.rmdir()
    except OSError as error:
        raise UserError(f"{setting}: cannot be written to ({error.strerror}); {instead}") from error


def numbered(path: Path) -> Iterator[Path]:
    """Yields `path`, `path-2`, `path-3` and so on, for whoever takes the first that is free."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes safetensors; what the operating system says against it, such as that the disk is full, is an `OSError`.

    Args:
        tensors: none of which shares memory with another.
        path: the file, written right there: inside of `new_file` or `new_folder`, that is.
        metadata: texts to go with them.
    """
    from safetensors.torch import save_file  # brings torch along, which nothing else here needs

    path.touch()
    mode = path.stat().st_mode  # safetensors puts a file in its place that nobody else may read
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise
    path.chmod(mode)


def why_not_written(error: BaseException) -> str | None:
    """Why something could not be written, in few words; `None` for an error that says nothing of the kind."""
    # torch's zip writer and safetensors report a failed write in words only.
    words = ("PytorchStreamWriter", "inline_container", "iostream error", "I/O error", "I/O Error", "os error")
    if not (isinstance(error, OSError) or any(word in str(error) for word in words)):
        return None
    cause: BaseException | None = error
    while cause is not None:  # torch wraps the failed write that started it all
        if isinstance(cause, OSError) and cause.errno is not None:
            return "the disk is full" if cause.errno == errno.ENOSPC else os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    if "No space left" in str(error):
        return "the disk is full"
    return "writing failed, most likely because of a full disk"


def _hidden(path: Path, kind: str, suffix: str = "") -> Path:
    """A name beside `path` that nobody looks for, and that says who made it."""
    owner = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name}.{kind}-{owner}{suffix}")


def _take_place(written: Path, path: Path) -> None:
    try:
        os.replace(written, path)  # of folders, an empty one gives way
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(f"out={path}: something else was written there meanwhile; name a folder of its own") from error
    _sync(path.parent)


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    # Without this, a power cut after the rename could leave the new name with nothing behind it.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
