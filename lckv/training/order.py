"""The order in which training reads the blocks: a function of the seed and the position alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler


@dataclass(eq=False)
class TrainingOrder(Sampler[int]):
    """Yields the block indices of a whole run, epoch after epoch, each epoch in an order of its own.

    One sequence for the run, in place of one per epoch, leaves no short batch where an epoch ends. So the blocks of
    optimizer step *n* are always `order[n * global_batch_size : (n + 1) * global_batch_size]`, however many
    processes and accumulation steps share them and wherever the run was interrupted.

    Args:
        num_blocks: number of blocks in the training data.
        num_samples: number of indices to yield, steps times global batch size.
        seed: seed of the shuffling.
    """

    num_blocks: int
    num_samples: int
    seed: int

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.num_samples, self.num_blocks):
            yield from self._epoch(start // self.num_blocks)[: self.num_samples - start]

    def slice(self, start: int, stop: int) -> list[int]:
        """Returns the indices at positions `start, ..., stop - 1` of the run."""
        indices: list[int] = []
        for epoch in range(start // self.num_blocks, -(-stop // self.num_blocks)):
            first = epoch * self.num_blocks
            indices += self._epoch(epoch)[max(start - first, 0) : stop - first]
        return indices

    def _epoch(self, epoch: int) -> list[int]:
        # A generator of its own: the order neither depends on nor moves the global random state (dropout). The factor
        # is beyond any number of epochs, so that no seed's epoch is another seed's later one.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_blocks, generator=generator).tolist()
