"""A layer's attention weights seen head by head: what can be permuted, rotated and merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lckv.errors import UserError

Tensors = Mapping[str, Tensor]
"""A state dict, or anything that reads like one."""


def layer_prefix(layer_idx: int) -> str:
    """What the names of a layer's attention weights begin with."""
    return f"model.layers.{layer_idx}.self_attn."


def read_finite(weights: Tensors, name: str) -> Tensor:
    """A tensor in float32.

    Raises:
        UserError: if one of its numbers is not finite.
    """
    tensor = weights[name].float()
    if not tensor.isfinite().all():
        raise UserError(f"{name}: holds numbers that are not finite, so this source is broken; take a whole one")
    return tensor


@dataclass(frozen=True)
class AttentionHeads:
    """The projections of one attention layer, in float32; query heads are grouped by the KV head that they read.

    Keys and values may be those that another layer computes.

    A projection with a bias has it as one more column, which stands for an input of one.

    Attributes:
        query: `(num_kv_heads, num_groups, head_dim, hidden_size or hidden_size + 1)`.
        key: `(num_kv_heads, head_dim, hidden_size or hidden_size + 1)`.
        value: like `key`.
        output: `(num_kv_heads, num_groups, hidden_size, head_dim)`, without its bias.
        key_norm: `(head_dim,)`, where keys are normalised before they are rotated.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    key_norm: Tensor | None

    @classmethod
    def read(cls, weights: Tensors, layer_idx: int, config: Any, sources: tuple[int, int]) -> AttentionHeads:
        """Reads a layer, of tensors under transformers' names.

        Args:
            weights: all tensors.
            layer_idx: the layer that reads.
            config: the model's.
            sources: the layer that computes the keys, and the one that computes the values.

        Raises:
            UserError: if one of the numbers is not finite.
        """
        prefix, head_dim = layer_prefix(layer_idx), config.head_dim
        key_prefix, value_prefix = map(layer_prefix, sources)

        def read(name: str) -> Tensor:
            weight = read_finite(weights, f"{name}.weight")
            if (bias := f"{name}.bias") in weights:
                weight = torch.cat([weight, read_finite(weights, bias)[:, None]], dim=1)
            return weight.unflatten(0, (-1, head_dim))  # (num_heads, head_dim, hidden_size [+ 1])

        output = read_finite(weights, f"{prefix}o_proj.weight").unflatten(1, (-1, head_dim))
        groups = (config.num_key_value_heads, -1)
        norm = f"{key_prefix}k_norm.weight"
        return cls(
            query=read(f"{prefix}q_proj").unflatten(0, groups),
            key=read(f"{key_prefix}k_proj"),
            value=read(f"{value_prefix}v_proj"),
            output=output.transpose(0, 1).unflatten(0, groups),  # (num_kv_heads, num_groups, hidden_size, head_dim)
            key_norm=read_finite(weights, norm) if norm in weights else None,
        )

    def key_tensors(self) -> dict[str, Tensor]:
        """The key projection and norm under transformers' names, relative to the layer's attention."""
        tensors = _split(self.key, "k_proj", self.hidden_size)
        return tensors if self.key_norm is None else tensors | {"k_norm.weight": self.key_norm}

    def value_tensors(self) -> dict[str, Tensor]:
        """The value projection, named so."""
        return _split(self.value, "v_proj", self.hidden_size)

    def query_tensors(self) -> dict[str, Tensor]:
        """The query projection, named so: what keys are read with."""
        return _split(self.query.flatten(0, 1), "q_proj", self.hidden_size)

    def output_tensors(self) -> dict[str, Tensor]:
        """The output projection, named so: what values are read with."""
        output = self.output.flatten(0, 1).transpose(0, 1)  # (hidden_size, num_heads, head_dim)
        return {"o_proj.weight": output.flatten(1)}

    @property
    def hidden_size(self) -> int:
        """Width of the layer's input, and of its output."""
        return self.output.shape[2]

    def permuted(self, order: Tensor) -> AttentionHeads:
        """The same layer with KV head `order[i]` and its query heads in place `i`; `order` is `(num_kv_heads,)`."""
        return replace(
            self,
            query=self.query[order],
            key=self.key[order],
            value=self.value[order],
            output=self.output[order],
        )

    def with_readers_changed(self, key_gain: Tensor | None, value_decoder: Tensor | None) -> AttentionHeads:
        """Queries and output projection that read other keys and values in the place of this layer's own.

        Args:
            key_gain: complex `(num_kv_heads, head_dim / 2)`: this layer's keys are about so many times the others, one
                rotary plane at a time; `None` for one.
            value_decoder: `(num_kv_heads, head_dim, head_dim)`, which turns the others' values into this layer's;
                `None` for one.
        """
        query = self.query
        if key_gain is not None:
            # The score is the real part of q * conj(k), so a factor of the key goes to the query conjugated.
            query = from_planes(to_planes(query) * key_gain.conj()[:, None, :, None])
        output = self.output if value_decoder is None else self.output @ value_decoder[:, None]
        return replace(self, query=query, output=output)


def to_planes(states: Tensor) -> Tensor:
    """`(..., head_dim, n)` as complex `(..., head_dim / 2, n)`: what one rotary angle turns becomes one number."""
    half = states.shape[-2] // 2
    return torch.complex(states[..., :half, :].contiguous(), states[..., half:, :].contiguous())


def from_planes(states: Tensor) -> Tensor:
    """Undoes [`to_planes`]: from complex `(..., head_dim / 2, n)` to `(..., head_dim, n)`."""
    return torch.cat([states.real, states.imag], dim=-2)


def _split(states: Tensor, name: str, hidden_size: int) -> dict[str, Tensor]:
    """Weight, and bias if there is one, of `(num_heads, head_dim, hidden_size [+ 1])`."""
    weight = states.flatten(0, 1)
    tensors = {f"{name}.weight": weight[:, :hidden_size]}
    if weight.shape[1] > hidden_size:
        tensors[f"{name}.bias"] = weight[:, hidden_size]
    return tensors
