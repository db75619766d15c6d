"""Text for the methods that look at some: which of it, and what it shows of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from rich.console import Console
from torch import Tensor

from lckv.console import Bar
from lckv.conversion.moments import InputMoments, Pair, collect_moments
from lckv.data import BlockDataset, collate
from lckv.models import LCKVLlamaForCausalLM

_TOKENS_AT_ONCE = 2048


def calibrate(
    model: LCKVLlamaForCausalLM, blocks: BlockDataset, chosen: list[int], pairs: Iterable[Pair], console: Console
) -> InputMoments:
    """The second moments of the layers' inputs on the chosen blocks, while a bar shows how far it has come.

    Raises:
        UserError: if what enters a layer is not finite.
    """
    with Bar(console, "calibrating", "tokens", len(chosen) * blocks.block_size) as bar:
        return collect_moments(model, batches_of(blocks, chosen), pairs, on_batch=bar.advance)


def choose_blocks(blocks: BlockDataset, num_tokens: int) -> list[int]:
    """Blocks that lie evenly among all, enough for so many tokens."""
    count = min(len(blocks), -(-num_tokens // blocks.block_size))
    return [int(index) for index in np.linspace(0, len(blocks) - 1, count).round()]


def batches_of(blocks: BlockDataset, indices: list[int]) -> Iterator[dict[str, Tensor]]:
    """The blocks of these indices in batches of a few thousand tokens."""
    size = max(1, _TOKENS_AT_ONCE // blocks.block_size)
    for start in range(0, len(indices), size):
        yield collate([blocks[index] for index in indices[start : start + size]])
