"""Writes what is said of a model and of its tokenizer as one GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from lckv.exporting.gguf_plain import Description, check_finite

_FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


def write_gguf(path: Path, described: Description, tokenizer: dict[str, Any], dtype: torch.dtype, name: str) -> None:
    """Writes a file.

    Args:
        path: where.
        described: the model.
        tokenizer: its settings.
        dtype: of matrices; what is added or multiplied number by number stays float32, as llama.cpp wants it.
        name: of the model, for people.

    Raises:
        UserError: if the type does not hold the numbers of a matrix.
        OSError: if the file cannot be written; numpy's does not say why.
    """
    from gguf import GGUFWriter, LlamaFileType

    logging.getLogger("gguf").setLevel(logging.WARNING)  # else it reports what it writes
    tensors = {
        key: tensor.to(dtype if tensor.ndim == 2 else torch.float32).contiguous()
        for key, tensor in described.tensors.items()
    }
    type_name = str(dtype).removeprefix("torch.")
    check_finite(tensors, f"as dtype={type_name}; bfloat16 and float32 reach further than float16")
    writer = GGUFWriter(path, described.architecture)
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[_FILE_TYPES[dtype]])
    settings = {f"{described.architecture}.{key}": value for key, value in described.settings.items()}
    for key, value in (settings | tokenizer).items():
        _adder(writer, value)(key, value)
    for key, tensor in tensors.items():
        _add_tensor(writer, key, tensor)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _adder(writer: Any, value: Any) -> Callable[[str, Any], None]:
    """What adds a setting of this type."""
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    return adders[type(value)]


def _add_tensor(writer: Any, key: str, tensor: torch.Tensor) -> None:
    from gguf import GGMLQuantizationType

    if tensor.dtype == torch.bfloat16:  # which numpy does not have
        writer.add_tensor(key, tensor.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(key, tensor.numpy())
