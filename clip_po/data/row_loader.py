"""The data loader of rows that are named by (epoch, position, index)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from clip_po.data.collator import RowMetadataCollator
from clip_po.data.sampler import EpochSampler


def row_loader(
    dataset: Any,
    sampler: EpochSampler,
    batch_size: int,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    args: TrainingArguments,
    accelerator: Accelerator,
) -> DataLoader[Any]:
    """Load batches of rows in the order of a sampler, shared out among processes.

    Args:
        dataset: `PreferencePairs` or `StreamedPairs`.
        sampler: Names the rows of an epoch.
        batch_size: Rows in a batch of a process.
        collate: Makes a batch of rows. What rows say that is not for the model goes past it.
        args: Number of workers and other arguments of data loading.
        accelerator: Accelerator of the trainer.

    Returns:
        The loader, prepared by the accelerator. Its batches hold what `collate` returns, and `skipped` and
        `stream_mark` if rows have them; see `RowMetadataCollator`.
    """
    loader = accelerator.prepare(
        DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=RowMetadataCollator(collate),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=sampler.worker_seeds,
            # Each evaluation has a loader of its own, whose workers would never end.
            persistent_workers=args.dataloader_persistent_workers and sampler.seed is not None,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),  # new transformers
        )
    )
    # accelerate passes the epoch to the sampler only from here; without it a resume would repeat epoch 0.
    loader.set_sampler(sampler)
    return loader
