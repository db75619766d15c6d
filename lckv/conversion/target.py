"""From a pretrained model to a checkpoint that shares keys and values, tensor by tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import CONFIG_NAME

import lckv
from lckv.conversion.calibration import InputMoments
from lckv.conversion.heads import Tensors
from lckv.conversion.methods import Group, changed_owners, make_tensors
from lckv.conversion.source import EMBEDDINGS, HEAD, Source, expected_shapes
from lckv.conversion.weights import write_weights
from lckv.loading.stored_weights import map_weights
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.sharing.patterns import SharingPlan
from lckv.utils.storage import new_folder, write_json

RECORD = "conversion.json"
"""The file that says where a converted model comes from."""

Make = Callable[[int], dict[str, Tensor]]
"""Gives what a method makes for an owner and its readers."""


def converted_tensors(
    tensors: Tensors,
    source_plan: SharingPlan,
    plan: SharingPlan,
    shapes: Mapping[str, torch.Size],
    method: str,
    make: Make,
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a converted model with their names; what a method makes is made when it comes to the turn.

    A method may make any tensor of the target, be it one that the source lacks or has in another shape. What it does
    not make passes through. An owner that only layers read which did so before is left alone, unless the target has
    other tensors there.

    Args:
        tensors: of the source.
        source_plan: who reads whose keys and values in the source.
        plan: who reads whose keys and values afterwards.
        shapes: of the tensors to yield, in this order.
        method: its name, for messages.
        make: asked at most once for each owner.

    Raises:
        UserError: if the method makes numbers that are not finite.
        ValueError: if neither the source nor the method has a tensor of some name and shape.
    """
    changed = {
        _layer_of(name) for name, shape in shapes.items() if name not in tensors or tensors[name].shape != shape
    }
    # What belongs to no layer, any owner may make.
    to_make = changed_owners(plan, source_plan, plan.kv_owners if None in changed else changed)
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        layer_idx = _layer_of(name)
        if layer_idx is not None:
            # With the keys and values that the layer owns, or as one of those that read another's.
            owners = [layer_idx, *plan.sources[layer_idx]]
        else:
            owners = [] if name in tensors else list(to_make)
        for owner in owners:
            if owner in to_make and name not in made:
                to_make.remove(owner)
                made |= make(owner)
        if name not in made and name not in tensors:
            raise ValueError(f"method={method} makes no {name}, which the source lacks")
        tensor = made.pop(name) if name in made else tensors[name]
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}: the model takes {list(shape)}")
        yield name, tensor


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
    make: Make | None = None,
    moments: InputMoments | None = None,
    ridge: float = 0.0,
    max_shard_size: int = 5 * 10**9,
    record: Mapping[str, Any] | None = None,
    on_parameters: Callable[[int, int], Any] | None = None,
) -> None:
    """Converts a model and writes it, with tokenizer and settings for generation, into a folder that appears at once.

    Besides what a method keeps between the layers of one owner, no more than one shard is in memory, and the tensor
    that is too much for it.

    Args:
        source: the model to start from.
        config: the converted model's; see [`converted_config`].
        method: a name in `METHODS`, or of what `make` does.
        out: the folder; it must not be there yet, or be empty.
        model_class: what `config` is of, which says what tensors there are.
        make: what makes an owner's tensors, in the place of a method.
        moments: for methods that look at calibration text.
        ridge: for these, too.
        max_shard_size: bytes of a file of weights.
        record: what to write into `conversion.json` beside source, pattern and method.
        on_parameters: called after each tensor with the parameters (not bytes) converted so far, and with all of them.

    Raises:
        UserError: if the source's weights do not fit its configuration, or cannot be read, or cannot be merged.
    """
    tensors, source_plan, plan = source.tensors, source.config.sharing_plan, config.sharing_plan
    config.tie_word_embeddings &= HEAD not in tensors
    shapes = expected_shapes(config, model_class)
    total = sum(shape.numel() for shape in shapes.values())

    def by_method(owner: int) -> dict[str, Tensor]:
        return make_tensors(method, Group(owner, plan, tensors, source.config, moments, ridge))

    def told() -> Iterator[tuple[str, Tensor]]:
        done = 0
        for name, tensor in converted_tensors(tensors, source_plan, plan, shapes, method, make or by_method):
            yield name, tensor
            done += tensor.numel()
            if on_parameters is not None:
                on_parameters(done, total)

    with new_folder(out) as folder:
        write_weights(folder, told(), max_shard_size)
        config.dtype = tensors[EMBEDDINGS].dtype
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
    before, tensors = map_weights(init), map_weights(trained)
    with new_folder(out) as folder:
        cast = ((name, tensors[name].to(tensor.dtype)) for name, tensor in before.items())
        write_weights(folder, cast, max_shard_size)
        for file in init.iterdir():  # not those of the training, which writes tokenizer and settings in its own way
            if file.is_dir():
                shutil.copytree(file, folder / file.name)
            elif ".safetensors" not in file.name and file.name != CONFIG_NAME:
                shutil.copyfile(file, folder / file.name)
        config = LCKVLlamaConfig.from_pretrained(trained)
        config.dtype = before[EMBEDDINGS].dtype
        config.save_pretrained(folder)
