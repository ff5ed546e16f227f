"""Which rows come when: one order for every number of processes and every resume."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

RowKey = tuple[int, int, int]
"""(epoch, position in the epoch, row of the data set)."""


@functools.lru_cache(maxsize=4)
def permutation(length: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A random order of `length` rows, the same for the same seed and epoch everywhere."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return tuple(torch.randperm(length, generator=generator).tolist())


class EpochSampler(Sampler[RowKey]):
    """Names rows by (epoch, position, row), so that whatever is drawn at random can be drawn from the name alone.

    The epoch is filled up to whole global batches: positions from `length` on repeat rows, and
    `PreferencePairs` gives them the weight 0. No state but the epoch: a resume skips and sees the same rows.

    Args:
        length: Rows of the data set, >= 1.
        multiple: Rows of a global batch: the batch size of a process times the number of processes.
        seed: Seed of the order; None keeps the order of the data set.
        drop_last: Leave the rows of the last, incomplete global batch out instead of filling it up.
    """

    def __init__(self, length: int, multiple: int, seed: int | None, drop_last: bool = False) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0
        batches = max(1, length // multiple) if drop_last else -(-length // multiple)
        self.total = batches * multiple

    def set_epoch(self, epoch: int) -> None:
        """Start at the given epoch; Trainer and accelerate call it before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[RowKey]:
        order = range(self.length) if self.seed is None else permutation(self.length, self.seed, self.epoch)
        for position in range(self.total):
            yield self.epoch, position, order[position % self.length]
