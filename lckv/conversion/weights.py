"""Files of weights, written shard by shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from lckv.loading.model_files import index_name
from lckv.utils.storage import save_tensors, write_json


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_size: int) -> None:
    """Writes tensors under their names as safetensors, in files of so many bytes, with an index if there are several.

    No more than one file's tensors, and the one behind them, are held at a time.
    """
    names: list[list[str]] = []
    num_bytes = 0
    for shard in cut_into_shards(tensors, max_shard_size):
        names.append(list(shard))
        num_bytes += sum(tensor.nbytes for tensor in shard.values())
        save_tensors(shard, folder / f"model-{len(names):05}.safetensors", {"format": "pt"})
        shard.clear()  # else it would still be there while the next one is made
    if len(names) == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard_names in enumerate(names, 1):  # how many there are is known only now
        file = f"model-{number:05}-of-{len(names):05}.safetensors"
        (folder / f"model-{number:05}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(shard_names, file)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    write_json(folder / index_name("model.safetensors"), index)


def cut_into_shards(tensors: Iterable[tuple[str, Tensor]], max_shard_size: int) -> Iterator[dict[str, Tensor]]:
    """Yields tensors, in their order, in shards of at most so many bytes; a larger tensor gets its own."""
    shard: dict[str, Tensor] = {}
    filled = 0
    for name, tensor in tensors:
        if shard and filled + tensor.nbytes > max_shard_size:
            yield shard
            shard, filled = {}, 0
        shard[name] = _unshared(tensor.contiguous(), shard.values())
        filled += tensor.nbytes
    yield shard


def _unshared(tensor: Tensor, others: Iterable[Tensor]) -> Tensor:
    """The tensor, or a copy if it is where another one is, which safetensors would refuse."""
    place = tensor.untyped_storage().data_ptr()
    is_shared = any(other.untyped_storage().data_ptr() == place for other in others)
    return tensor.clone() if is_shared else tensor
