"""From a pretrained model to a checkpoint that shares keys and values, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import CONFIG_NAME

import lckv
from lckv.conversion.heads import Tensors
from lckv.conversion.methods import Group, groups_of, make_tensors
from lckv.conversion.moments import InputMoments
from lckv.conversion.shards import write_weights
from lckv.conversion.source import CheckpointTensors, Source, dtype_of, expected_shapes
from lckv.models import LCKVLlamaConfig
from lckv.patterns import SharingPlan
from lckv.storage import new_folder

RECORD = "conversion.json"
"""The file that says where a converted model comes from."""


@dataclass
class ConvertedTensors:
    """The tensors of a converted model; what a method makes is made when it is first asked for, and given out once.

    Attributes:
        tensors: of the source.
        config: the source's.
        plan: who reads whose keys and values afterwards.
        method: a name in `METHODS`.
        moments: for methods that look at calibration text.
        ridge: for these, too.
    """

    tensors: Tensors
    config: LCKVLlamaConfig
    plan: SharingPlan
    method: str
    moments: InputMoments | None = None
    ridge: float = 0.0
    _made: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._to_make = dict(groups_of(self.plan))

    def read(self, name: str) -> Tensor:
        """The tensor of this name.

        Raises:
            UserError: if the method makes numbers that are not finite.
        """
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            layer_idx = int(parts[2])
            for owner in {layer_idx, self.plan.kv_source[layer_idx]} & self._to_make.keys():
                self._made |= self._make(owner, self._to_make.pop(owner))
        return self._made.pop(name) if name in self._made else self.tensors[name]

    def _make(self, owner: int, readers: tuple[int, ...]) -> dict[str, Tensor]:
        group = Group(owner, readers, self.tensors, self.config, self.moments, self.ridge)
        return make_tensors(self.method, group)


def converted_config(source: LCKVLlamaConfig, plan: SharingPlan, **settings: Any) -> LCKVLlamaConfig:
    """The source's configuration with another sharing pattern.

    Args:
        source: of a model in which every layer computes keys and values.
        plan: the pattern.
        settings: other arguments of `LCKVLlamaConfig` that change, such as `forward_passes`.

    Raises:
        UserError: for wrong settings.
    """
    config: LCKVLlamaConfig = LCKVLlamaConfig.from_dict(source.to_dict(), layer_types=plan.layer_types, **settings)
    config.architectures = ["LCKVLlamaForCausalLM"]
    return config


def source_config_of(folder: Path) -> LCKVLlamaConfig:
    """The configuration of the model that a converted one was made from."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    config: LCKVLlamaConfig = LCKVLlamaConfig.from_dict(record["source_config"])
    return config


def write_converted(
    source: Source,
    config: LCKVLlamaConfig,
    method: str,
    out: Path,
    *,
    moments: InputMoments | None = None,
    ridge: float = 0.0,
    max_shard_size: int = 5 * 10**9,
    record: Mapping[str, Any] | None = None,
    on_bytes: Callable[[int, int], Any] | None = None,
) -> None:
    """Converts a model and writes it, with tokenizer and settings for generation, into a folder that appears at once.

    Besides what a method keeps between the layers of one owner, no more than one shard is in memory.

    Args:
        source: the model to start from.
        config: the converted model's; see [`converted_config`].
        method: a name in `METHODS`.
        out: the folder; it must not be there yet, or be empty.
        moments: for methods that look at calibration text.
        ridge: for these, too.
        max_shard_size: bytes of a file of weights.
        record: what to write into `conversion.json` beside source, pattern and method.
        on_bytes: called after each tensor with the bytes written so far, and with all bytes.

    Raises:
        UserError: if the source's weights do not fit its configuration, or cannot be read, or cannot be merged.
    """
    with source.open() as tensors, new_folder(out) as folder:
        converted = ConvertedTensors(tensors, source.config, config.sharing_plan, method, moments, ridge)
        sizes = {
            name: shape.numel() * dtype_of(tensors, name).itemsize for name, shape in expected_shapes(config).items()
        }
        config.dtype = dtype_of(tensors, "model.embed_tokens.weight")
        write_weights(folder, sizes, converted.read, max_shard_size=max_shard_size, on_bytes=on_bytes)
        source.copy_rest(folder)
        origin = {
            "source": source.checkpoint.given,
            "revision": source.checkpoint.revision,
            "layer_types": config.kv_sharing,
            "method": method,
            "lckv_version": lckv.__version__,
            "source_config": source.config.to_dict(),
        }
        (folder / RECORD).write_text(json.dumps(origin | dict(record or {}), indent=2) + "\n")
        config.save_pretrained(folder)  # last: without it, nothing loads


def write_trained(trained: Path, init: Path, out: Path, *, max_shard_size: int = 5 * 10**9) -> None:
    """Writes what became of a converted model in training, in the types that the source's tensors have.

    Args:
        trained: the trained model's folder, in whatever type it was trained.
        init: the converted model that the training started from.
        out: the folder, which appears at once; it must not be there yet, or be empty.
        max_shard_size: bytes of a file of weights.
    """
    with ExitStack() as stack, new_folder(out) as folder:
        before, tensors = CheckpointTensors(init, stack), CheckpointTensors(trained, stack)
        dtypes = {name: before.dtype(name) for name in before}
        sizes = {name: before.shape(name).numel() * dtype.itemsize for name, dtype in dtypes.items()}
        write_weights(folder, sizes, lambda name: tensors[name].to(dtypes[name]), max_shard_size=max_shard_size)
        for file in init.iterdir():  # not those of the training, which writes tokenizer and settings in its own way
            if file.is_dir():
                shutil.copytree(file, folder / file.name)
            elif ".safetensors" not in file.name and file.name != CONFIG_NAME:
                shutil.copyfile(file, folder / file.name)
        config = LCKVLlamaConfig.from_pretrained(trained)
        config.dtype = dtypes["model.embed_tokens.weight"]
        config.save_pretrained(folder)
