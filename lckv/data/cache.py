"""The cache on disk, of trained tokenizers and tokenised blocks.

A manifest in each of its folders tells a damaged one, which is built again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from lckv.errors import UserError
from lckv.utils.storage import CANNOT_WRITE, locked, new_folder

logger = logging.getLogger(__name__)

T = TypeVar("T")

CACHE_VARIABLE = "LCKV_CACHE"
MANIFEST = "manifest.json"

# Checking the sums of every file would make a resumed run read all of a large corpus before its first step.
_MAX_CHECKSUM_BYTES = 256 * 2**20

_CANNOT_WRITE = CANNOT_WRITE | {errno.ENOTDIR, errno.EEXIST}


class DamagedCacheError(Exception):
    """A folder of the cache is absent or not as it was written."""


def fingerprint(*parts: Any) -> str:
    """A short name for the content `parts` (anything that JSON can write): equal parts, equal name."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def find_cache_dir(cache_dir: str | None = None) -> Path:
    """The folder of the cache: `cache_dir` where given, else `$LCKV_CACHE`, else `~/.cache/lckv`."""
    return Path(cache_dir or os.environ.get(CACHE_VARIABLE) or "~/.cache/lckv").expanduser().absolute()


def load_or_build(folder: Path, build: Callable[[Path], object], load: Callable[[Path], T]) -> T:
    """Returns `load(folder)`, after `build` has filled the folder if it is absent or damaged.

    Of several processes that ask at once, one builds and the others wait for it.

    Args:
        folder: where the content is kept; its name must tell the content apart (see [`fingerprint`]).
        build: writes the files into the empty folder that it is given.
        load: reads the whole folder.

    Raises:
        UserError: if the cache cannot be written (permissions, disk full), naming it.
    """
    try:
        return _load(folder, load)
    except DamagedCacheError as error:
        logger.debug("%s", error)
    with _explain_write_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(folder.name + ".lock")
        with locked(lock, on_wait=lambda: logger.info("another process is building %s: waiting for it", folder)):
            try:
                return _load(folder, load)  # another process has built it while this one waited
            except DamagedCacheError as error:
                if folder.exists():
                    logger.warning("%s: building it again", error)
            with new_folder(folder, replaces=True) as new:
                new.chmod(folder.parent.stat().st_mode & 0o777)  # for all who share the cache
                build(new)
                (new / MANIFEST).write_text(json.dumps(_describe(new)), encoding="utf-8")
        return _load(folder, load)


def _load(folder: Path, load: Callable[[Path], T]) -> T:
    _check_manifest(folder)
    return load(folder)


@contextmanager
def _explain_write_errors(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise UserError(
            f"cannot write to the cache {str(cache_dir)!r} ({error.strerror}): "
            f"give another folder in data.cache_dir or ${CACHE_VARIABLE}"
        ) from error


def _checksum(path: Path) -> int | None:
    if path.stat().st_size > _MAX_CHECKSUM_BYTES:
        return None
    return zlib.crc32(path.read_bytes())


def _describe(folder: Path) -> dict[str, list[int | None]]:
    """Size and checksum of every file in `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path)] for path in paths}


def _check_manifest(folder: Path) -> None:
    if not folder.is_dir():
        raise DamagedCacheError(f"{folder} is not in the cache")
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = _describe(folder)
    except (OSError, ValueError) as error:
        raise DamagedCacheError(f"{folder} is damaged ({error})") from error
    if found != expected:
        raise DamagedCacheError(f"{folder} is damaged (its files are not as they were written)")


class NpyWriter:
    """Writes a two-dimensional `.npy` file row by row, so that its length need not be known nor fit in memory.

    Args:
        path: the file, which must not exist.
        num_columns: length of a row.
        dtype: of the elements.
    """

    def __init__(self, path: Path, num_columns: int, dtype: np.dtype) -> None:
        self.num_rows = 0
        self._num_columns = num_columns
        self._dtype = np.dtype(dtype)
        self._file: IO[bytes] = path.open("xb")
        self._write_header()
        self._header_size = self._file.tell()

    def _write_header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        shape = (self.num_rows, self._num_columns)
        # numpy leaves room in the header for the first axis to grow, so it can be written again in place.
        np.lib.format.write_array_header_1_0(self._file, {"descr": descr, "fortran_order": False, "shape": shape})

    def append(self, rows: np.ndarray) -> None:
        """Appends `rows` `(num_new_rows, num_columns)`."""
        assert rows.shape[1] == self._num_columns
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)
        self.num_rows += len(rows)

    def close(self) -> None:
        """Writes the final number of rows into the header and closes the file."""
        with self._file:
            self._file.seek(0)
            self._write_header()
            assert self._file.tell() == self._header_size
