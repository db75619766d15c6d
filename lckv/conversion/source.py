"""The model that a conversion starts from: its configuration, its tensors one at a time, and what lies beside them."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lckv.conversion.heads import Tensors
from lckv.data.tokenizer import check_tokenizer
from lckv.errors import UserError
from lckv.loading import WEIGHT_FILES, Checkpoint, find_checkpoint, index_name, load_model
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM

logger = logging.getLogger(__name__)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_COPIED_FOLDERS = ("additional_chat_templates",)
_BROKEN = (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError)
EMBEDDINGS = "model.embed_tokens.weight"
"""The tensor whose type is the model's."""

# Not used, and no loss: rotations are worked out anew, and tied embeddings are there under their other name.
_DISPENSABLE = re.compile(r".*\.rotary_emb\.inv_freq|lm_head\.weight")


@dataclass(frozen=True)
class Source:
    """A pretrained model in which every layer computes its own keys and values: where it is, and its configuration."""

    checkpoint: Checkpoint
    config: LCKVLlamaConfig

    @classmethod
    def find(cls, name: str, *, revision: str | None = None, key: str = "source") -> Source:
        """Finds a model that can be converted, without reading its weights; see [`lckv.loading.find_checkpoint`].

        Raises:
            UserError: if there is none, it is of a family that is not supported, its weights are quantised, or its
                layers share keys and values already.
        """
        checkpoint = find_checkpoint(name, revision=revision, key=key)
        config = checkpoint.load_config()
        plan = config.sharing_plan
        for layer in plan.layers:
            if layer.kv_source != layer.layer_idx:
                raise UserError(
                    f"{checkpoint}: shares keys and values already ({plan.layer_types}): layer {layer.layer_idx} "
                    f"reads those of layer {layer.kv_source}; allowed are models in which every layer reads its own"
                )
        checkpoint.check_files()
        return cls(checkpoint, config)

    @contextmanager
    def open(self) -> Iterator[Tensors]:
        """Its tensors, which are read when they are asked for; those of a GGUF file are all in memory.

        Raises:
            UserError: if they do not fit the configuration, or cannot be read.
        """
        if self.checkpoint.gguf_file is not None:
            yield self.load_model("cpu").state_dict()
            return
        folder = self._folder()
        with ExitStack() as stack:
            with self.checkpoint.loading("the weights"):
                tensors = CheckpointTensors(folder, stack)
                self._check(tensors)
            yield tensors

    def load_model(self, device: str) -> LCKVLlamaForCausalLM:
        """The whole model, in evaluation mode."""
        found = self.checkpoint
        return load_model(found.given, revision=found.revision, device=device, key=found.key)[0]

    def load_for_text(self, device: str) -> LCKVLlamaForCausalLM:
        """The model with text to run through it whole: not token by token, which would show a layer's last input only.

        On a CPU it is in float32, in which everything is fast there.
        """
        model = self.load_model(device)
        model.config.use_sequential = False
        return model.float() if model.device.type == "cpu" else model

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """Its tokenizer.

        Raises:
            UserError: if there is none that makes blocks of documents.
        """
        return check_tokenizer(self.checkpoint.load_tokenizer(), str(self.checkpoint))

    def copy_rest(self, folder: Path) -> None:
        """Copies tokenizer and settings for generation; where they are inside a GGUF file, writes them anew."""
        if self.checkpoint.gguf_file is not None:
            self.checkpoint.load_tokenizer().save_pretrained(folder)
            return
        origin = self._folder()
        for name in _COPIED:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)
        for name in _COPIED_FOLDERS:
            if (origin / name).is_dir():
                shutil.copytree(origin / name, folder / name)

    def _folder(self) -> Path:
        """Where its files are; those of the Hub are fetched first, if they are not there yet."""
        if self.checkpoint.is_local:
            return Path(self.checkpoint.path)
        name, arguments = self.checkpoint.path, self.checkpoint.arguments()
        safetensors, torchs_own = (  # as some have the same weights once more, under other names
            [file.replace(".", "*.", 1), index_name(file)] for file in WEIGHT_FILES
        )
        others = [*_COPIED, *(f"{name}/*" for name in _COPIED_FOLDERS)]
        with self.checkpoint.loading("the weights"):
            folder = Path(snapshot_download(name, allow_patterns=[*safetensors, *others], **arguments))
            if not any(folder.glob(safetensors[0])):
                snapshot_download(name, allow_patterns=torchs_own, **arguments)
        return folder

    def _check(self, tensors: CheckpointTensors) -> None:
        expected = expected_shapes(self.config)
        for name, shape in expected.items():
            if name not in tensors:
                raise UserError(f"the weights do not fit config.json: there is no {name}")
            tensors.dtype(name)
            if (actual := tensors.shape(name)) != shape:
                raise UserError(f"the weights do not fit config.json: {name} is {list(actual)}, not {list(shape)}")
        unused = [name for name in tensors if name not in expected and not _DISPENSABLE.fullmatch(name)]
        if unused:
            logger.warning("%s: %d weights are not used, such as %s", self.checkpoint, len(unused), unused[0])


def expected_shapes(
    config: LCKVLlamaConfig, model_class: type[LCKVLlamaForCausalLM] = LCKVLlamaForCausalLM
) -> dict[str, torch.Size]:
    """The tensors that a checkpoint of this configuration holds, tied ones once."""
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


class CheckpointTensors(Mapping[str, Tensor]):
    """The tensors of a folder's checkpoint, each read when it is asked for, from files that `stack` closes.

    Raises:
        UserError: if there are no weights, a file of several is missing, or one cannot be read.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._places: dict[str, Any] = {}  # a tensor, or the open file that holds it
        for file in _find_weight_files(folder):
            try:
                self._places |= _open(file, stack)
            except _BROKEN as error:
                raise _unreadable(file, error) from error

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return place if isinstance(place, Tensor) else place.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:  # else the tensor would be read for it
        return name in self._places

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor, which is not read for it."""
        place = self._places[name]
        return place.shape if isinstance(place, Tensor) else torch.Size(place.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, which is not read for it.

        Raises:
            UserError: if it is no floating-point type of 16 bits or more.
        """
        place = self._places[name]
        if isinstance(place, Tensor):
            dtype, given = place.dtype, str(place.dtype)
        else:
            given = place.get_slice(name).get_dtype()
            dtype = _DTYPES.get(given, torch.uint8)
        if dtype not in _DTYPES.values():
            raise UserError(
                f"{name} is of type {given.removeprefix('torch.')}: its weights are quantised, which cannot be read "
                "here; take the original ones"
            )
        return dtype


def dtype_of(tensors: Tensors, name: str) -> torch.dtype:
    """The type of a tensor, which is not read for it if that can be avoided."""
    return tensors.dtype(name) if isinstance(tensors, CheckpointTensors) else tensors[name].dtype


def _open(file: Path, stack: ExitStack) -> dict[str, Any]:
    """For each tensor of a file, the tensor, mapped into memory, or the open file that reads it."""
    if file.suffix != ".safetensors":
        is_mappable = zipfile.is_zipfile(file)  # which files of torch before 1.6 are not
        return dict(torch.load(file, mmap=is_mappable, weights_only=True, map_location="cpu"))
    opened = stack.enter_context(safe_open(file, framework="pt"))
    return dict.fromkeys(opened.keys(), opened)


def _find_weight_files(folder: Path) -> list[Path]:
    """The files with the weights: safetensors, or else torch's own format."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / index_name(name)
        if index.is_file():
            return _indexed_files(index)
    raise UserError(f"{folder} holds no weights ({WEIGHT_FILES[0]})")


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        files = sorted({index.with_name(file) for file in json.loads(index.read_text())["weight_map"].values()})
    except _BROKEN as error:
        raise _unreadable(index, error) from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{index} names {missing[0]}, which is not there")
    return files


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [""])[0]
    return UserError(f"{file} cannot be read: {type(error).__name__}: {reason}")
