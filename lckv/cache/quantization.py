"""A codec for streams: small integers packed into bytes, with a scale and a zero point per group of numbers.

A group is either `group_size` consecutive tokens of one channel (KIVI, Liu et al., ICML 2024, and KVQuant, Hooper et
al., NeurIPS 2024, found that the channels of keys differ far more in size than their tokens do) or up to `group_size`
consecutive channels of one token. A number *x* of a group is kept as `round((x - zero) / scale)`.

Why not a library: the store appends groups of tokens to a tensor whose batch can be selected and repeated, so packed
bytes must not mix rows, heads or groups. optimum-quanto and hqq flatten a tensor to two dimensions and pack along the
first, which mixes rows and cannot be appended to; optimum-quanto compiles C++ at its first unpacking, and its 8 bits
know no groups; hqq takes groups of nearly equal numbers for empty. torchao's packed 4 bits are made for weights in
matrix products on particular devices, and its portable codec does not pack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lckv.errors import UserError

ALLOWED_BITS = (2, 4, 8)


class Quantized(NamedTuple):
    """Encoded states; every tensor has the batch first, the heads second, and tokens or groups of them third.

    Attributes:
        codes: `(batch, num_heads, num_tokens, head_dim * bits / 8)`, bytes.
        scales: `(batch, num_heads, num_token_groups, num_channel_groups)`, how far apart neighbouring codes are.
        zeros: as `scales`, what the code 0 means.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


@dataclass(frozen=True)
class GroupCodec:
    """Encodes and decodes in one vectorised step each.

    Attributes:
        bits: 2, 4 or 8 per number.
        group_tokens: tokens in a group; the number of tokens to encode must be divisible by it.
        group_channels: channels in a group; `head_dim` must be divisible by it.
    """

    bits: int
    group_tokens: int
    group_channels: int

    @classmethod
    def along(cls, axis: str, bits: int, group_size: int, head_dim: int) -> GroupCodec:
        """The codec with one scale per `"channel"` and `group_size` tokens, or per `"token"` and as many channels.

        Where `group_size` does not divide `head_dim`, its largest divisor that is no larger is taken for channels.
        """
        if axis == "channel":
            return cls(bits, group_size, 1)
        divisors = [size for size in range(1, min(group_size, head_dim) + 1) if head_dim % size == 0]
        return cls(bits, 1, divisors[-1])

    def encode(self, states: torch.Tensor) -> Quantized:
        """Encodes `(batch, num_heads, num_tokens, head_dim)`; no number moves by more than half its scale.

        Scales and zero points take two bytes each: they are in the type of the states if that has two, and otherwise
        in float16. Zero points are rounded down, scales up, and codes computed from the rounded ones.

        Raises:
            UserError: for NaN, infinities, and numbers that float16 cannot hold.
        """
        groups = self._split(states).float()
        dtype = states.dtype if states.element_size() == 2 else torch.float16
        zeros = _round_down(groups.amin(dim=(3, 5), keepdim=True), dtype)
        steps = (groups.amax(dim=(3, 5), keepdim=True) - zeros.float()) / (2**self.bits - 1)
        scales = -_round_down(-steps, dtype)
        if not bool((zeros.isfinite() & scales.isfinite()).all()):
            raise UserError(
                "keys or values to quantise hold NaN, infinity or what float16 scales cannot express: "
                "allowed are finite numbers up to 65504"
            )
        tiny = torch.finfo(torch.float32).tiny  # a group of equal numbers has scale 0, and code 0 for all
        codes = (groups - zeros.float()).div_(scales.float().clamp(min=tiny)).round_().clamp_(0, 2**self.bits - 1)
        return Quantized(pack(codes.to(torch.uint8).view(states.shape), self.bits), _flat(scales), _flat(zeros))

    def decode(self, quantized: Quantized, dtype: torch.dtype) -> torch.Tensor:
        """Decodes to `(batch, num_heads, num_tokens, head_dim)`; the sums are done in float32."""
        codes = unpack(quantized.codes, self.bits)
        groups = self._split(codes).to(torch.float32)
        scales, zeros = (tensor[:, :, :, None, :, None].float() for tensor in quantized[1:])
        return groups.mul_(scales).add_(zeros).view(codes.shape).to(dtype)

    def cut(self, quantized: Quantized, start: int, stop: int | None = None) -> Quantized:
        """The tokens from `start` to `stop`, both at the edges of groups, as views."""
        groups = slice(start // self.group_tokens, None if stop is None else stop // self.group_tokens)
        codes, scales, zeros = quantized
        return Quantized(codes[:, :, start:stop], scales[:, :, groups], zeros[:, :, groups])

    def num_bytes(self, num_tokens: int, head_dim: int) -> int:
        """Bytes of `num_tokens` encoded tokens of one head, scales and zero points included."""
        num_groups = num_tokens // self.group_tokens * (head_dim // self.group_channels)
        return num_tokens * head_dim * self.bits // 8 + 2 * 2 * num_groups

    def _split(self, states: torch.Tensor) -> torch.Tensor:
        """As `(batch, heads, token groups, group_tokens, channel groups, group_channels)`."""
        batch_size, num_heads, num_tokens, head_dim = states.shape
        return states.reshape(
            batch_size,
            num_heads,
            num_tokens // self.group_tokens,
            self.group_tokens,
            head_dim // self.group_channels,
            self.group_channels,
        )


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs numbers below `2 ** bits`, uint8 `(..., n)`, into bytes `(..., n * bits / 8)`.

    Byte *j* of *m* holds the numbers *j*, *j + m*, ..., the first in its lowest bits, so that whole rows are shifted.
    """
    if bits == 8:
        return codes
    parts = codes.unflatten(-1, (8 // bits, codes.shape[-1] * bits // 8)).unbind(-2)
    packed = parts[0].clone()
    for index, part in enumerate(parts[1:], start=1):
        packed |= part << (index * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Undoes [`pack`]: from `(..., head_dim * bits / 8)` bytes to `(..., head_dim)` codes."""
    if bits == 8:
        return packed
    mask = 2**bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1)


def _round_down(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest numbers of a two-byte type that are not above the given ones."""
    rounded = numbers.to(dtype)
    bits = rounded.view(torch.int16)  # sign and magnitude: neighbours differ by one
    below = torch.where(rounded > 0, bits - 1, bits + 1)
    below = torch.where(rounded == 0, torch.tensor(-0x7FFF, dtype=torch.int16, device=bits.device), below)
    return torch.where(rounded.float() > numbers, below.view(dtype), rounded)


def _flat(parameters: torch.Tensor) -> torch.Tensor:
    """Scales or zero points with the dimensions that were reduced taken out."""
    return parameters.squeeze(5).squeeze(3)
