"""Writing a checkpoint's weights shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lckv.loading import index_name
from lckv.storage import save_tensors, write_json


def plan_shards(sizes: Iterable[tuple[str, int]], max_shard_size: int) -> Iterator[list[str]]:
    """Cuts tensors, in their order, into shards of at most so many bytes; a larger tensor gets its own.

    A shard is there as soon as the size of the first tensor behind it is known.
    """
    shard: list[str] = []
    filled = 0
    for name, size in sizes:
        if shard and filled + size > max_shard_size:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def write_weights(
    folder: Path,
    shapes: Mapping[str, torch.Size],
    dtype: Callable[[str], torch.dtype],
    read: Callable[[str], Tensor],
    *,
    max_shard_size: int,
    on_parameters: Callable[[int, int], Any] | None = None,
) -> None:
    """Writes tensors as safetensors, one shard in memory at a time, with an index if there are several.

    Args:
        folder: where to.
        shapes: of every tensor, in the order in which they are written.
        dtype: gives the type of a tensor, and is asked before the tensor is read.
        read: gives a tensor of this name.
        max_shard_size: bytes of a shard.
        on_parameters: called after each tensor with the parameters (not bytes) written so far, and with all of them.
    """
    sizes = ((name, shape.numel() * dtype(name).itemsize) for name, shape in shapes.items())
    total, num_read, num_bytes = sum(shape.numel() for shape in shapes.values()), 0, 0
    shards: list[list[str]] = []
    for names in plan_shards(sizes, max_shard_size):
        shards.append(names)
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors[name] = _unshared(read(name).contiguous(), tensors.values())
            num_read += tensors[name].numel()
            num_bytes += tensors[name].nbytes
            if on_parameters is not None:
                on_parameters(num_read, total)
        save_tensors(tensors, folder / f"model-{len(shards):05}.safetensors", {"format": "pt"})
        tensors.clear()  # else it would still be there while the next shard is made
    if len(shards) == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):  # how many there are is known only now
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"model-{number:05}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    write_json(folder / index_name("model.safetensors"), index)


def _unshared(tensor: Tensor, others: Iterable[Tensor]) -> Tensor:
    """The tensor, or a copy if it is in the memory of another one, which safetensors would refuse."""
    place = tensor.untyped_storage().data_ptr()
    is_shared = any(other.untyped_storage().data_ptr() == place for other in others)
    return tensor.clone() if is_shared else tensor
