"""Texts that all processes share: the candidates of a global batch, and their embeddings with gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_gather


def in_batch_candidates(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Make every text of the global batch a candidate of each of its rows.

    All processes must call it together. Under gradient accumulation a global batch is one micro-batch of all
    processes.

    Args:
        batch: The rows of this process, as `DataCollatorForContrastivePreference` makes them without
            `candidate_texts`.

    Returns:
        The batch without `candidates`: its `texts` are those of all processes, each once and in the order of the
        rows, and `chosen` [B] and `rejected` [B, R] are positions in them.
    """
    own: list[list[str]] = [batch["texts"]]
    if _processes() > 1:
        own = [[] for _ in range(_processes())]
        distributed.all_gather_object(own, batch["texts"])
    place = {text: position for position, text in enumerate(dict.fromkeys(text for texts in own for text in texts))}
    moved = batch["chosen"].new_tensor([place[text] for text in batch["texts"]])
    candidates = moved[batch["candidates"].clamp(min=0)]
    chosen, rejected = batch["chosen"].unsqueeze(-1), batch["rejected"]
    return {
        **{name: value for name, value in batch.items() if name != "candidates"},
        "texts": list(place),
        "chosen": candidates.gather(-1, chosen).squeeze(-1),
        "rejected": candidates.gather(-1, rejected.clamp(min=0)).masked_fill(rejected < 0, -1),
    }


def share_of_texts(texts: Sequence[str]) -> list[str]:
    """Those of the texts that all processes have which this process encodes: equally many each.

    Args:
        texts: M texts, the same in every process.

    Returns:
        ceil(M / processes) texts, filled up with empty ones; all of them where there is one process.
    """
    each = -(-len(texts) // _processes())
    start = each * (distributed.get_rank() if _processes() > 1 else 0)
    own = list(texts[start : start + each])
    return [*own, *[""] * (each - len(own))]


def embeds_of_all(embeds: Tensor, count: int) -> Tensor:
    """The embeddings of shared texts, from the shares that the processes encoded.

    Its gradient is the sum of those of all processes, so that each text's reaches the process that encoded it.

    Args:
        embeds: Tensor[ceil(M / processes), D], of `share_of_texts`.
        count: M.

    Returns:
        Tensor[M, D], the same in every process.
    """
    return torch.cat(all_gather(embeds))[:count] if _processes() > 1 else embeds


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1
