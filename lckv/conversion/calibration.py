"""Text for the methods that look at some: which of it, and the second moments of what enters the layers' attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from lckv.data.dataset import BlockDataset, collate
from lckv.errors import UserError
from lckv.models import LCKVLlamaForCausalLM
from lckv.utils.console import Bar

Pair = tuple[int, int]
"""Two layers, by their indices."""

_TOKENS_AT_ONCE = 2048


class InputMoments:
    """The mean of `x_i x_j^T` over tokens, where `x_i` is the normalised input of layer *i*'s attention.

    Only these matrices are kept, `(hidden_size, hidden_size)` for each pair that is asked for, in float64; with
    `has_ones`, `(hidden_size + 1, hidden_size + 1)`: the inputs have a one at their end, for biases.

    Args:
        pairs: the pairs of layers; for each, the other order is there too.
        has_ones: whether projections have biases.
    """

    def __init__(self, pairs: Iterable[Pair], *, has_ones: bool) -> None:
        self.pairs = sorted({(min(pair), max(pair)) for pair in pairs})
        self.has_ones = has_ones
        self.num_tokens = 0
        self._sums: dict[Pair, Tensor] = {}

    def __getitem__(self, pair: Pair) -> Tensor:
        """The mean for layers `pair`, `(inputs of the one, inputs of the other)`, on the CPU, where weights are."""
        first, second = min(pair), max(pair)
        mean = self._sums[first, second] / self.num_tokens
        return mean if pair == (first, second) else mean.T

    def add(self, inputs: dict[int, Tensor]) -> None:
        """Adds a batch: for each layer its attention's inputs `(batch, q_len, hidden_size)`."""
        rows = {layer_idx: states.flatten(0, 1).float() for layer_idx, states in inputs.items()}
        if self.has_ones:
            rows = {layer_idx: F.pad(states, (0, 1), value=1.0) for layer_idx, states in rows.items()}
        for first, second in self.pairs:
            # On the CPU: there may be many pairs, and Apple's accelerators have no float64.
            product = (rows[first].T @ rows[second]).cpu().double()
            self._sums[first, second] = product if self.num_tokens == 0 else self._sums[first, second] + product
        self.num_tokens += len(next(iter(rows.values())))

    def check_finite(self) -> None:
        """Refuses sums that nothing can be fitted to.

        Raises:
            UserError: naming the lowest layer whose inputs are to blame.
        """
        broken = [pair for pair in self.pairs if not self._sums[pair].isfinite().all()]
        own = [first for first, second in broken if first == second]
        if broken:
            raise UserError(
                f"layer {(own or broken[0])[0]}'s inputs are not finite on the calibration text: the source's weights "
                "are broken, or its type is too narrow for what they compute (bfloat16 reaches further than float16); "
                "allowed are models of finite numbers"
            )


@torch.no_grad()
def collect_moments(
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    pairs: Iterable[Pair],
    *,
    on_batch: Callable[[int], Any] | None = None,
) -> InputMoments:
    """Runs text through a model and sums up what enters its attention layers.

    Args:
        model: a model of ours, in evaluation mode.
        batches: `input_ids` and `position_ids`, each `(batch, q_len)`, and perhaps `labels`.
        pairs: which layers' inputs are multiplied.
        on_batch: called after each batch with the number of its tokens.

    Raises:
        UserError: if what enters a layer is not finite.
    """
    moments = InputMoments(pairs, has_ones=model.config.attention_bias)
    layers = sorted({layer_idx for pair in moments.pairs for layer_idx in pair})
    inputs: dict[int, Tensor] = {}

    def keep(layer_idx: int, _module: nn.Module, _args: Any, output: Tensor) -> None:
        inputs[layer_idx] = output

    with ExitStack() as stack:
        for layer_idx in layers:
            hook = model.model.layers[layer_idx].input_layernorm.register_forward_hook(partial(keep, layer_idx))
            stack.callback(hook.remove)
        for batch in batches:
            batch = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
            model.model(**batch, use_cache=False)
            moments.add(inputs)
            if on_batch is not None:
                on_batch(batch["input_ids"].numel())
    moments.check_finite()
    return moments


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


def batches_of(
    blocks: BlockDataset, indices: list[int], num_tokens: int = _TOKENS_AT_ONCE
) -> Iterator[dict[str, Tensor]]:
    """The blocks of these indices in batches of so many tokens, or one block each."""
    size = max(1, num_tokens // blocks.block_size)
    for start in range(0, len(indices), size):
        yield collate([blocks[index] for index in indices[start : start + size]])
