"""Perplexity per token and bits per byte of a language model over blocks of tokens."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from lckv.data.packing import IGNORE_INDEX
from lckv.sharing.iteration import CONVERGE, EXACT


class Blocks(Protocol):
    """What is evaluated: items of which a batch has `input_ids`, `position_ids` and `labels`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Perplexity:
    """How well a text is predicted.

    Attributes:
        loss: mean negative log-likelihood in nats per predicted token.
        num_tokens: number of predicted tokens.
        num_bytes: UTF-8 bytes of the text that they stand for, where known.
    """

    loss: float
    num_tokens: int
    num_bytes: int | None = None

    @property
    def perplexity(self) -> float:
        """Perplexity per token: depends on the tokenizer; infinite where it is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text: does not depend on the tokenizer. `None` where the bytes are not known."""
        if not self.num_bytes:
            return None
        return self.loss * self.num_tokens / self.num_bytes / math.log(2)


@torch.no_grad()
def evaluate_perplexity(
    model: nn.Module,
    blocks: Blocks,
    *,
    batch_size: int,
    num_bytes: int | None = None,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] = default_collate,
    rank: int = 0,
    world_size: int = 1,
    reduce_sum: Callable[[Tensor], Tensor] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    forward_passes: int | str | None = CONVERGE,
) -> Perplexity:
    """Measures how well `model` predicts `blocks`; every predicted token counts the same, whatever the batch size.

    The model is called in evaluation mode, and left in the mode that it was in. The random state does not move.

    Args:
        model: a causal language model of transformers.
        blocks: see [`Blocks`]; labels of `IGNORE_INDEX` are not predicted.
        batch_size: blocks per forward pass.
        num_bytes: UTF-8 bytes of the text that the labels predict, for bits per byte.
        collate: makes a batch of blocks.
        rank: this process among `world_size`, of which each evaluates a share.
        world_size: number of processes; all of them call the model equally often.
        reduce_sum: adds a tensor up over the processes.
        on_batch: told after each forward pass how many of this process's blocks are done, and of how many.
        forward_passes: see [`in_eval_mode`].

    Raises:
        ValueError: if there is nothing to predict.
    """
    device = next(model.parameters()).device
    num_rounds = -(-len(blocks) // (batch_size * world_size))
    totals = torch.zeros(2, dtype=torch.float64)  # summed loss, predicted tokens
    with in_eval_mode(model, forward_passes):
        for number in range(num_rounds):
            # Processes take turns batch by batch: in the last round, those behind the end have none.
            start = (number * world_size + rank) * batch_size
            items = [blocks[index] for index in range(start, min(start + batch_size, len(blocks)))]
            batch = collate(items or [blocks[0]])
            losses = token_losses(model, {name: value.to(device) for name, value in batch.items()})
            if items:  # a process without blocks left keeps step with the others, but counts nothing
                is_predicted = batch["labels"][:, 1:] != IGNORE_INDEX
                # Summed on the CPU: not every device has float64.
                totals += torch.stack([losses.cpu().double().sum(), is_predicted.sum().double()])
            if on_batch is not None:
                on_batch(number + 1, num_rounds)
    if reduce_sum is not None:
        totals = reduce_sum(totals)
    loss_sum, num_tokens = totals.tolist()
    if not num_tokens:
        raise ValueError("there is nothing to predict: every label is ignored")
    return Perplexity(loss_sum / num_tokens, int(num_tokens), num_bytes)


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Negative log-likelihood of every label of a batch of blocks, `(batch, q_len - 1)`, 0 where ignored."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits  # (batch, q_len, vocab_size)
    labels = batch["labels"][:, 1:]
    # The class dimension second, as cross_entropy wants it.
    return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")


@contextlib.contextmanager
def in_eval_mode(model: nn.Module, forward_passes: int | str | None = CONVERGE) -> Iterator[None]:
    """Evaluation mode, and the random states kept: training goes on as if nothing had been in between.

    Args:
        model: a causal language model.
        forward_passes: in the place of the model's, which are for training; by default as many as make its answers
            those of decoding token by token. `None` leaves the model's.
    """
    was_training = model.training
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Only the GPU in use: asking for the state of the others would take memory on each.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), _iterating(model, forward_passes):
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def _iterating(model: nn.Module, forward_passes: int | str | None) -> Iterator[None]:
    """So many passes over cycles, if `model` has any."""
    config = getattr(model, "config", None)
    own = {name: getattr(config, name) for name in EXACT if hasattr(config, name)}
    if forward_passes is None or not own:
        yield
        return
    try:
        for name, value in (EXACT | {"forward_passes": forward_passes}).items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(config, name, value)
