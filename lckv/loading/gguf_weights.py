"""The tensors of a GGUF file and of the models here: who is who, and how rows of projections are ordered."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lckv.errors import UserError
from lckv.loading.gguf_settings import architecture_of, open_gguf
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM

_READ_ELSEWHERE = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")  # rotations are worked out anew


def read_weights(path: Path, config: LCKVLlamaConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Reads a model's tensors, quantised ones as what they stand for.

    Raises:
        UserError: for a tensor that the model has no place for.
    """
    from gguf import dequantize

    reader = open_gguf(path)
    architecture = architecture_of(reader)
    names = tensor_names(architecture, config)
    stored = [tensor for tensor in reader.tensors if not _READ_ELSEWHERE.fullmatch(tensor.name)]
    if unknown := next((tensor.name for tensor in stored if tensor.name not in names), None):
        raise UserError(f"holds {unknown}, which the models here do not have")
    tensors = {}
    for tensor in stored:
        name = names[tensor.name]
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(dtype)
        tensors[name] = _in_halves(values, name, config) if architecture == "llama" else values
    return tensors


def tensor_names(architecture: str, config: LCKVLlamaConfig) -> dict[str, str]:
    """GGUF's names for the model's tensors, and the model's own."""
    with torch.device("meta"):
        ours = LCKVLlamaForCausalLM(config).state_dict()
    return dict(zip(gguf_names(architecture, config.sharing_plan.num_hidden_layers, ours), ours, strict=True))


def gguf_names(architecture: str, num_layers: int, names: Iterable[str]) -> list[str]:
    """What GGUF calls the tensors that transformers calls so in an architecture."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    name_map: Any = get_tensor_name_map(arch, num_layers)
    return [name_map.get_name(name, try_suffixes=(".weight", ".bias")) for name in names]


def _in_halves(values: torch.Tensor, name: str, config: LCKVLlamaConfig) -> torch.Tensor:
    """Of queries and keys, `(num_heads * head_dim, ...)`, GGUF keeps side by side what a rotation mixes."""
    num_heads = _rotated_heads(name, config)
    return values if num_heads is None else _swap(values, num_heads, (-1, 2))


def side_by_side(values: torch.Tensor, name: str, config: LCKVLlamaConfig) -> torch.Tensor:
    """The other way round, for files of the architecture `llama`."""
    num_heads = _rotated_heads(name, config)
    return values if num_heads is None else _swap(values, num_heads, (2, -1))


def _rotated_heads(name: str, config: LCKVLlamaConfig) -> int | None:
    """How many heads a projection makes that are rotated; `None` for other tensors."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return next((number for part, number in heads.items() if f".{part}." in name), None)


def _swap(values: torch.Tensor, num_heads: int, sizes: tuple[int, int]) -> torch.Tensor:
    """Transposes the rows of each head, `(num_heads * head_dim, ...)`, laid out in two dimensions of these sizes."""
    return values.unflatten(0, (num_heads, *sizes)).transpose(1, 2).reshape(values.shape)
