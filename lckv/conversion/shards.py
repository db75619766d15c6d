"""Writing a checkpoint's weights shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lckv.loading import index_name
from lckv.storage import save_tensors


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
        save_tensors(tensors, folder / file, {"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / index_name("model.safetensors")).write_text(json.dumps(index, indent=2) + "\n")


def _unshared(tensor: Tensor, others: Iterable[Tensor]) -> Tensor:
    """The tensor, or a copy if it is in the memory of another one, which safetensors would refuse."""
    place = tensor.untyped_storage().data_ptr()
    is_shared = any(other.untyped_storage().data_ptr() == place for other in others)
    return tensor.clone() if is_shared else tensor
