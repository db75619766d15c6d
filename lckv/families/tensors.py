"""The tensors of other families, under the names and in the shapes that ours have, each made when it is read.

What a family multiplies or adds behind a tensor is folded into it, and rows of queries and keys are put into the order
in which rotary planes are pairs of halves, those that turn first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.models.parts.rotary import num_rotated, rotary_embedding
from lckv.utils.registry import Registry

Changes = Mapping[str, Callable[[Tensor], Tensor]]
"""What is made of a stored tensor: our names, and how each of these tensors comes from it."""

ReadTensor = Callable[[str, LCKVLlamaConfig], Changes]
"""From a stored tensor's name and the model's configuration to what is made of it: nothing, of what means nothing.

A name that the family does not have stays as it is.
"""

TENSORS: Registry[ReadTensor] = Registry("family with tensors of its own")
"""By transformers' `model_type`: how tensors are read that are not Llama's; a family without an entry has Llama's."""


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made by its maker whenever it is looked up, and not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.makers = dict(makers)

    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)

    def __contains__(self, name: object) -> bool:  # the mapping's own would make the tensor
        return name in self.makers


def read_tensors(stored: Mapping[str, Tensor], config: LCKVLlamaConfig, read: ReadTensor) -> LazyTensors:
    """What our model of this configuration has for the stored tensors of another one."""
    return LazyTensors(
        {ours: partial(_make, stored, name, change) for name in stored for ours, change in read(name, config).items()}
    )


def _make(stored: Mapping[str, Tensor], name: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(stored[name]).contiguous()  # as a model's parameters have to be, to be saved


def as_stored(tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


def our_tensors(name: str, config: LCKVLlamaConfig) -> Changes:
    """Tensors that are ours already."""
    return {name: as_stored}


def llama_tensors(name: str, config: LCKVLlamaConfig, *, side_by_side: bool = False) -> Changes:
    """Tensors under Llama's names, of models that rotate a part of each head, or pairs of numbers side by side.

    Args:
        name: of the stored tensor.
        config: the model's.
        side_by_side: whether a rotation mixes a head's numbers 0 and 1, 2 and 3, not those of two halves.
    """
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or parts[-2] not in _ROTATED:
        return {name: as_stored}
    layer_idx = int(parts[2])
    label = config.query_label(layer_idx)  # its keys' as well: every layer reads itself
    is_norm = parts[-2] in ("q_norm", "k_norm")
    rows, scales = rotary_rows(config, label, side_by_side)
    if config.use_qk_norm and not is_norm:
        scales = torch.ones_like(scales)  # behind the norm, which would undo them
    return {name: partial(_reordered, rows=rows, scales=scales)}


def is_turned_whole(config: LCKVLlamaConfig) -> bool:
    """Whether rotations turn all planes, so that Llama's order of rows is the model's own."""
    head_dim = config.head_dim
    return all(num_rotated(head_dim, parameters) in (0, head_dim) for parameters in config.rotations.values())


_ROTATED = ("q_proj", "k_proj", "q_norm", "k_norm")


def rotary_rows(config: Any, label: str | None, side_by_side: bool = False) -> tuple[Tensor, Tensor]:
    """Where a head's numbers come from that rotates its first ones, and what multiplies each, both `(head_dim,)`.

    Rotations scale what they turn in some models (YaRN), here what they leave, too: it is divided by that before.
    """
    size = num_rotated(config.head_dim, config.rotations[label])
    turning = torch.arange(size)
    halves = turning.view(-1, 2).T if side_by_side else turning.view(2, -1)
    rows = torch.cat([halves, torch.arange(size, config.head_dim).view(2, -1)], dim=1).flatten()
    scales = torch.where(rows < size, 1.0, 1.0 / rotary_embedding(config, label).attention_scaling)
    return rows, scales


def _reordered(tensor: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    """Of each head, `(num_heads * head_dim, ...)`, these rows, multiplied."""
    if rows.equal(torch.arange(len(rows))):
        return tensor  # mapped into memory as it is
    heads = tensor.unflatten(0, (-1, len(rows)))[:, rows]
    scales = scales.view(1, -1, *(1 for _ in tensor.shape[1:]))
    return (heads * scales).to(tensor.dtype).flatten(0, 1)


@TENSORS.register("gpt2")
def gpt2(name: str, config: LCKVLlamaConfig) -> Changes:
    """Projections that are transposed, those of queries, keys and values in one."""
    name = name.removeprefix("transformer.")
    outside = {
        "wte.weight": "model.embed_tokens.weight",
        "wpe.weight": "model.embed_positions.weight",
        "ln_f.weight": "model.norm.weight",
        "ln_f.bias": "model.norm.bias",
    }
    inside = {
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    found = re.fullmatch(r"h\.(\d+)\.(.+)\.(\w+)", name)
    if found is None:
        return {outside.get(name, name): as_stored}
    layer_idx, module, kind = found.groups()
    prefix = f"model.layers.{layer_idx}."
    if module == "attn.c_attn":
        names = ("q_proj", "k_proj", "v_proj")
        return {f"{prefix}self_attn.{each}.{kind}": partial(_third, index=i) for i, each in enumerate(names)}
    if module == "attn":  # masks, in old files
        return {}
    return {f"{prefix}{inside.get(module, module)}.{kind}": _transposed}


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor


def _third(tensor: Tensor, index: int) -> Tensor:
    return _transposed(tensor).chunk(3)[index]


@TENSORS.register("gemma3_text")
def gemma3_text(name: str, config: LCKVLlamaConfig) -> Changes:
    """Norms that multiply by one more than their weights, and stand behind attention and MLP, too."""
    return {rename_output_norms(name): _plus_one if "norm" in name else as_stored}


def rename_output_norms(name: str) -> str:
    """Our name for a norm of a layer that has two in front of attention and MLP, and two behind them."""
    for theirs, ours in (
        ("post_attention_layernorm", "attention_output_layernorm"),
        ("pre_feedforward_layernorm", "post_attention_layernorm"),
        ("post_feedforward_layernorm", "mlp_output_layernorm"),
    ):
        if theirs in name:
            return name.replace(theirs, ours)
    return name


def _plus_one(tensor: Tensor) -> Tensor:
    return (tensor.float() + 1.0).to(tensor.dtype)


__all__ = [
    "TENSORS",
    "Changes",
    "LazyTensors",
    "ReadTensor",
    "as_stored",
    "is_turned_whole",
    "llama_tensors",
    "our_tensors",
    "read_tensors",
    "rename_output_norms",
]
