"""Writing a checkpoint shard by shard into a folder that appears only when it is whole."""

from __future__ import annotations

import errno
import glob
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lckv.errors import UserError
from lckv.loading import index_name


def check_output(out: Path) -> None:
    """Refuses a place where a folder cannot appear without anything being lost.

    Raises:
        UserError: if something is there already, be it an empty file, or there can be no folder, or it would take the
            place of one that the shell is in.
    """
    here, place = Path.cwd(), out.resolve()
    if place in (here, *here.parents):
        raise UserError(f"out={out}: is the current folder, or holds it; name a folder that is not there yet")
    if place.is_dir() and not any(place.iterdir()):
        return
    if place.exists():
        kind = "is not empty" if place.is_dir() else "is a file"
        raise UserError(f"out={out}: {kind}; name a folder that is not there yet")
    nearest = next(parent for parent in place.parents if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"out={out}: {nearest} is a file; name a folder that is not there yet")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` when the block ends well, and is deleted otherwise.

    What a killed process leaves is a hidden folder without a `config.json`; the next one for `out` on the same machine
    deletes it. Processes that write the same `out` at the same time do not disturb each other: the first one has it.

    Raises:
        UserError: if `out` was filled meanwhile.
    """
    out = out.resolve()  # so that a link stays one
    begin = f".{out.name}.partial-{platform.node()}-"
    _clear_away(out.parent, begin)
    staging = out.with_name(f"{begin}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    staging.mkdir(parents=True)
    try:
        yield staging
        _take_place(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _clear_away(parent: Path, begin: str) -> None:
    """Deletes what processes that are no longer there have left."""
    for leftover in parent.glob(f"{glob.escape(begin)}*"):
        owner = re.fullmatch(r"(\d+)-[0-9a-f]{8}", leftover.name.removeprefix(begin))
        if owner and not psutil.pid_exists(int(owner[1])):
            shutil.rmtree(leftover, ignore_errors=True)


def _take_place(staging: Path, out: Path) -> None:
    try:
        if out.is_dir():
            out.rmdir()
        os.replace(staging, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(f"out={out}: something else was written there meanwhile; name a folder of its own") from error


def plan_shards(sizes: Mapping[str, int], max_shard_size: int) -> list[list[str]]:
    """Cuts tensors, in their order, into shards of at most so many bytes; a larger tensor gets its own."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    *,
    max_shard_size: int,
    on_bytes: Callable[[int, int], Any] | None = None,
) -> None:
    """Writes tensors as safetensors, one shard in memory at a time, with an index if there are several.

    Args:
        folder: where to.
        sizes: the bytes of every tensor, in the order in which they are written.
        read: gives a tensor of this name.
        max_shard_size: bytes of a shard.
        on_bytes: called after each tensor with the bytes so far, and with all bytes.
    """
    shards = plan_shards(sizes, max_shard_size)
    weight_map: dict[str, str] = {}
    num_written = 0
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors[name] = _unshared(read(name).contiguous(), tensors.values())
            weight_map[name] = file
            num_written += sizes[name]
            if on_bytes is not None:
                on_bytes(num_written, sum(sizes.values()))
        _save(tensors, folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / index_name("model.safetensors")).write_text(json.dumps(index, indent=2) + "\n")


def _unshared(tensor: Tensor, others: Iterable[Tensor]) -> Tensor:
    """The tensor, or a copy if it is in the memory of another one, which safetensors would refuse."""
    place = tensor.untyped_storage().data_ptr()
    is_shared = any(other.untyped_storage().data_ptr() == place for other in others)
    return tensor.clone() if is_shared else tensor


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a shard; what the operating system says against it, such as that the disk is full, is an `OSError`."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from error
        raise
