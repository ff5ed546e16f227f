"""The order of rows: the same for any number of processes and after a resume."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

RowKey = tuple[int, int, int]
"""(epoch, position in the epoch, row of the dataset)."""


@functools.lru_cache(maxsize=4)
def permutation(length: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return a random order of rows, the same in every process and run for the same arguments.

    Args:
        length: Number of rows.
        seed: Seed of the order.
        epoch: Epoch, counted from 0. The order is drawn anew for each.

    Returns:
        The numbers 0..length-1, each once.
    """
    generator = torch.Generator().manual_seed(_seed_of(seed, epoch))
    return tuple(torch.randperm(length, generator=generator).tolist())


class EpochSampler(Sampler[RowKey]):
    """Sampler of row keys (epoch, position, row), from which alone everything random about a row is drawn.

    What workers draw from global random generators, such as a transform of the user, depends on `worker_seeds`.

    Each epoch is filled up to whole global batches: positions from `length` on repeat rows, and `PreferencePairs`
    gives them the weight 0. The epoch is the only state, so a resumed run sees the same rows.

    Args:
        length: Number of rows of the dataset, >= 1.
        multiple: Number of rows of a global batch: the batch size of a process times the number of processes.
        seed: Seed of the order; None keeps the order of the dataset.
        drop_last: Drop the last, incomplete global batch instead of filling it up.

    Attributes:
        worker_seeds: The generator of the data loader, which seeds its workers in each epoch. Without one of its own,
            a data loader draws from torch's global generator, and so from the random state of the training.
    """

    def __init__(self, length: int, multiple: int, seed: int | None, drop_last: bool = False) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0
        batches = max(1, length // multiple) if drop_last else -(-length // multiple)
        self.total = batches * multiple
        self.worker_seeds = torch.Generator()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. Trainer and accelerate call this method before each epoch.

        Args:
            epoch: Epoch, counted from 0.
        """
        self.epoch = epoch
        self.worker_seeds.manual_seed(_seed_of(self.seed or 0, epoch))

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[RowKey]:
        order = range(self.length) if self.seed is None else permutation(self.length, self.seed, self.epoch)
        for position in range(self.total):
            yield self.epoch, position, order[position % self.length]


def _seed_of(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % 2**63
