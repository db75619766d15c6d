"""The tensors of a GGUF file, under the names that the models here have for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from lckv.errors import UserError
from lckv.gguf_settings import architecture_of, open_gguf
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
    names = _names(architecture, config)
    stored = [tensor for tensor in reader.tensors if not _READ_ELSEWHERE.fullmatch(tensor.name)]
    if unknown := next((tensor.name for tensor in stored if tensor.name not in names), None):
        raise UserError(f"holds {unknown}, which the models here do not have")
    tensors = {}
    for tensor in stored:
        name = names[tensor.name]
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(dtype)
        tensors[name] = _in_halves(values, name, config) if architecture == "llama" else values
    return tensors


def _names(architecture: str, config: LCKVLlamaConfig) -> dict[str, str]:
    """GGUF's names for the model's tensors, and the model's own."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    name_map: Any = get_tensor_name_map(arch, config.sharing_plan.num_hidden_layers)
    with torch.device("meta"):
        ours = LCKVLlamaForCausalLM(config).state_dict()
    return {name_map.get_name(name, try_suffixes=(".weight", ".bias")): name for name in ours}


def _in_halves(values: torch.Tensor, name: str, config: LCKVLlamaConfig) -> torch.Tensor:
    """Of queries and keys, `(num_heads * head_dim, ...)`, GGUF keeps side by side what a rotation mixes."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    num_heads = next((number for part, number in heads.items() if f".{part}." in name), None)
    if num_heads is None:
        return values
    return values.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(values.shape)
