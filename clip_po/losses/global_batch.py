"""The rows of all processes, for what compares rows with each other."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_gather


def of_all_processes(rows: Tensor) -> Tensor:
    """Gather the rows of all processes. Gradients flow back to the process that a row comes from.

    Args:
        rows: Tensor[B, ...], the rows of this process. B is the same in every process, all of which must call this.

    Returns:
        Tensor[P * B, ...], in the order of the P processes; `rows` itself with a single process.
    """
    return torch.cat(all_gather(rows)) if processes() > 1 else rows


def of_this_process(rows: Tensor) -> Tensor:
    """Return what belongs to this process of rows in the order of `of_all_processes`.

    Args:
        rows: Tensor[P * B, ...].

    Returns:
        Tensor[B, ...].
    """
    return rows.chunk(processes())[distributed.get_rank()] if processes() > 1 else rows


def processes() -> int:
    """Return the number of processes; 1 if torch.distributed is not initialized."""
    return distributed.get_world_size() if distributed.is_initialized() else 1
