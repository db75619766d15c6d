"""Files of weights, mapped into memory to be read."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lckv.errors import UserError, first_line
from lckv.loading.model_files import WEIGHT_FILES, index_name

_BROKEN = (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError)


def map_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's checkpoint, mapped into memory: each is read when its numbers are used.

    Raises:
        UserError: if there are no weights, a file of several is missing, or one cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for file in _find_weight_files(folder):
        try:
            if file.suffix == ".safetensors":
                tensors |= load_file(file)
            else:
                is_mappable = zipfile.is_zipfile(file)  # which files of torch before 1.6 are not
                tensors |= torch.load(file, mmap=is_mappable, weights_only=True, map_location="cpu")
        except _BROKEN as error:
            raise _unreadable(file, error) from error
    return tensors


def stored_type(folder: Path, name: str, tensor: Tensor) -> str:
    """What the file with a tensor calls the tensor's type, which with safetensors is not torch's name."""
    for file in _find_weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                if name in opened.keys():
                    return opened.get_slice(name).get_dtype()
    return str(tensor.dtype).removeprefix("torch.")


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
    return UserError(f"{file} cannot be read: {type(error).__name__}: {first_line(error)}")
