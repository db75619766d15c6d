"""From a pretrained model to a checkpoint that shares keys and values, tensor by tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import CONFIG_NAME

import lckv
from lckv.conversion.calibration import InputMoments
from lckv.conversion.heads import Tensors
from lckv.conversion.methods import Group, groups_of, make_tensors
from lckv.conversion.shards import write_weights
from lckv.conversion.source import EMBEDDINGS, CheckpointTensors, Source, dtype_of, expected_shapes
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.patterns import SharingPlan
from lckv.storage import new_folder, write_json

RECORD = "conversion.json"
"""The file that says where a converted model comes from."""


@dataclass
class ConvertedTensors:
    """The tensors of a converted model; what a method makes is made when it is first asked for, and given out once.

    A method may make any tensor of the target, be it one that the source lacks or has in another shape. What it does
    not make passes through. An owner that only it reads is left alone, unless the target has other tensors there.

    Attributes:
        tensors: of the source.
        config: the source's.
        plan: who reads whose keys and values afterwards.
        shapes: of the target's tensors.
        method: a name in `METHODS`.
        moments: for methods that look at calibration text.
        ridge: for these, too.
    """

    tensors: Tensors
    config: LCKVLlamaConfig
    plan: SharingPlan
    shapes: Mapping[str, torch.Size]
    method: str
    moments: InputMoments | None = None
    ridge: float = 0.0
    _made: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        before = expected_shapes(self.config)
        changed = {_layer_of(name) for name, shape in self.shapes.items() if before.get(name) != shape}
        # What belongs to no layer, any group may make.
        self._to_make = dict(groups_of(self.plan, self.plan.kv_owners if None in changed else changed))

    def dtype(self, name: str) -> torch.dtype:
        """The type of the tensor of this name, which is made for it if the method does, but not read."""
        self._make(name)
        return self._made[name].dtype if name in self._made else dtype_of(self.tensors, name)

    def read(self, name: str) -> Tensor:
        """The tensor of this name.

        Raises:
            UserError: if the method makes numbers that are not finite.
            ValueError: if neither the source nor the method has a tensor of this name and shape.
        """
        self._make(name)
        tensor = self._made.pop(name) if name in self._made else self.tensors[name]
        if tensor.shape != self.shapes[name]:
            raise ValueError(f"{name} is {list(tensor.shape)}: the model takes {list(self.shapes[name])}")
        return tensor

    def _make(self, name: str) -> None:
        """Makes what the method changes in a tensor's layer; for a name of no layer, until a group has it."""
        layer_idx = _layer_of(name)
        owners = [] if layer_idx is None else [layer_idx, self.plan.kv_source[layer_idx]]
        if layer_idx is None and name not in self.tensors:
            owners = list(self._to_make)
        for owner in owners:
            if owner in self._to_make and name not in self._made:
                readers = self._to_make.pop(owner)
                group = Group(owner, readers, self.tensors, self.config, self.moments, self.ridge)
                self._made |= make_tensors(self.method, group)
        if name not in self._made and name not in self.tensors:
            raise ValueError(f"method={self.method} makes no {name}, which the source lacks")


def _layer_of(name: str) -> int | None:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return None if found is None else int(found[1])


def converted_config(source: LCKVLlamaConfig, plan: SharingPlan, **settings: Any) -> LCKVLlamaConfig:
    """The configuration of a source with another sharing pattern, and other `settings` such as `forward_passes`.

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
    model_class: type[LCKVLlamaForCausalLM] = LCKVLlamaForCausalLM,
    moments: InputMoments | None = None,
    ridge: float = 0.0,
    max_shard_size: int = 5 * 10**9,
    record: Mapping[str, Any] | None = None,
    on_parameters: Callable[[int, int], Any] | None = None,
) -> None:
    """Converts a model and writes it, with tokenizer and settings for generation, into a folder that appears at once.

    Besides what a method keeps between the layers of one owner, no more than one shard is in memory.

    Args:
        source: the model to start from.
        config: the converted model's; see [`converted_config`].
        method: a name in `METHODS`.
        out: the folder; it must not be there yet, or be empty.
        model_class: what `config` is of, which says what tensors there are.
        moments: for methods that look at calibration text.
        ridge: for these, too.
        max_shard_size: bytes of a file of weights.
        record: what to write into `conversion.json` beside source, pattern and method.
        on_parameters: see [`lckv.conversion.shards.write_weights`].

    Raises:
        UserError: if the source's weights do not fit its configuration, or cannot be read, or cannot be merged.
    """
    with source.open() as tensors, new_folder(out) as folder:
        shapes = expected_shapes(config, model_class)
        plan = config.sharing_plan
        converted = ConvertedTensors(tensors, source.config, plan, shapes, method, moments, ridge)
        config.dtype = dtype_of(tensors, EMBEDDINGS)
        write_weights(
            folder,
            shapes,
            converted.dtype,
            converted.read,
            max_shard_size=max_shard_size,
            on_parameters=on_parameters,
        )
        source.copy_rest(folder)
        origin = {
            "source": source.checkpoint.given,
            "revision": source.checkpoint.revision,
            "layer_types": config.kv_sharing,
            "method": method,
            "lckv_version": lckv.__version__,
            "source_config": source.config.to_dict(),
        }
        write_json(folder / RECORD, origin | dict(record or {}))
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
        shapes = {name: before.shape(name) for name in before}
        write_weights(
            folder,
            shapes,
            before.dtype,
            lambda name: tensors[name].to(before.dtype(name)),
            max_shard_size=max_shard_size,
        )
        for file in init.iterdir():  # not those of the training, which writes tokenizer and settings in its own way
            if file.is_dir():
                shutil.copytree(file, folder / file.name)
            elif ".safetensors" not in file.name and file.name != CONFIG_NAME:
                shutil.copyfile(file, folder / file.name)
        config = LCKVLlamaConfig.from_pretrained(trained)
        config.dtype = before.dtype(EMBEDDINGS)
        config.save_pretrained(folder)
