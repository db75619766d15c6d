"""Running calibration text through a model for the methods that look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from lckv.conversion.methods import needed_pairs
from lckv.conversion.moments import InputMoments, collect_moments
from lckv.conversion.source import Source
from lckv.data import BlockDataset, collate
from lckv.patterns import SharingPlan

_TOKENS_AT_ONCE = 2048


def calibrate(
    source: Source,
    plan: SharingPlan,
    blocks: BlockDataset,
    num_tokens: int,
    *,
    device: str = "auto",
    on_tokens: Callable[[int, int], Any] | None = None,
) -> InputMoments:
    """The second moments of the layers' inputs that a calibrated method needs for a sharing pattern.

    Args:
        source: the model, which is loaded for it, on a CPU in float32.
        plan: the pattern.
        blocks: of text; those that are taken lie evenly among them.
        num_tokens: how many tokens to take, rounded up to whole blocks.
        device: where the model runs; "auto": an accelerator, if there is one.
        on_tokens: called with the tokens done so far, and with all tokens.

    Raises:
        UserError: if what enters a layer is not finite.
    """
    chosen = choose_blocks(blocks, num_tokens)
    total, num_done = len(chosen) * blocks.block_size, 0

    def advance(num_new: int) -> None:
        nonlocal num_done
        num_done += num_new
        if on_tokens is not None:
            on_tokens(num_done, total)

    model = source.load_model(device)
    if model.device.type == "cpu":
        model = model.float()
    model.config.use_sequential = False  # token by token, only the last one's inputs would be seen
    has_ones = source.config.attention_bias
    return collect_moments(model, batches_of(blocks, chosen), needed_pairs(plan), has_ones=has_ones, on_batch=advance)


def choose_blocks(blocks: BlockDataset, num_tokens: int) -> list[int]:
    """Blocks that lie evenly among all, enough for so many tokens."""
    count = min(len(blocks), -(-num_tokens // blocks.block_size))
    return [int(index) for index in np.linspace(0, len(blocks) - 1, count).round()]


def batches_of(blocks: BlockDataset, indices: list[int]) -> Iterator[dict[str, Tensor]]:
    """The blocks of these indices in batches of a few thousand tokens."""
    size = max(1, _TOKENS_AT_ONCE // blocks.block_size)
    for start in range(0, len(indices), size):
        yield collate([blocks[index] for index in indices[start : start + size]])
