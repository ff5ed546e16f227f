"""Positions of a batch: which text and which image each candidate of a row is, and which candidates are preferred."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from clip_po.candidates import CandidateTexts
from clip_po.data.formats import Row


def candidate_positions(rows: Sequence[Row], candidate_texts: CandidateTexts) -> dict[str, Any]:
    """Return the candidates of each row as positions among the texts and images of the batch.

    Args:
        rows: B rows. One with `image_count` is anchored at its `text`, the others at their image.
        candidate_texts: The candidate texts of every row, if any.

    Returns:
        `chosen` (Tensor[B]) and `rejected` (Tensor[B, R]), positions among the candidates of the row, -1 for none.
        Without candidate texts for every row also `texts`, each once, and `candidates` (Tensor[B, N]), positions among
        them. If a row is anchored at its text, always `candidates`, and `candidate_images` (Tensor[B, N]): positions
        among the images of the rows in their order.
    """
    anchored = any("image_count" in row for row in rows)
    found: dict[str, Any] = {}
    own = [_own_texts(row, candidate_texts) for row in rows] if anchored or not candidate_texts else []
    positions: list[Callable[[str], int]] = [candidate_texts.position] * len(rows)
    place: Callable[[str], int] = candidate_texts.position
    if not candidate_texts:
        texts = list(dict.fromkeys(text for candidates in own for text in candidates))
        place = {text: position for position, text in enumerate(texts)}.__getitem__
        found["texts"] = texts
        positions = [{text: n for n, text in enumerate(candidates)}.__getitem__ for candidates in own]
    if own:
        found["candidates"] = ragged([[place(text) for text in candidates] for candidates in own])
    if anchored:
        starts = itertools.accumulate((row.get("image_count", 1) for row in rows), initial=0)
        found["candidate_images"] = ragged(
            [
                [*range(start, start + row["image_count"])] if "image_count" in row else [start] * len(candidates)
                for row, candidates, start in zip(rows, own, starts, strict=False)
            ]
        )
    chosen, rejected = zip(*map(_chosen_and_rejected, rows, positions), strict=True)
    return {**found, "chosen": torch.tensor(chosen), "rejected": ragged(rejected)}


def _own_texts(row: Row, candidate_texts: CandidateTexts) -> Sequence[str]:
    """Return the text of each candidate of a row."""
    if "image_count" in row:
        return [row["text"]] * row["image_count"]
    return candidate_texts.texts or row.get("candidates") or [row["chosen"], *row["rejected"]]


def _chosen_and_rejected(row: Row, position: Callable[[str], int]) -> tuple[int, list[int]]:
    """Return the positions of the chosen candidate, -1 for none, and of the rejected ones."""
    if "image_count" in row:
        return 0, [*range(1, row["image_count"])]
    return -1 if row["chosen"] is None else position(row["chosen"]), [position(text) for text in row["rejected"]]


def ragged(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return rows of different lengths as a tensor.

    Args:
        rows: B rows of numbers.

    Returns:
        Tensor[B, longest], at least one column, padded with -1.
    """
    longest = max(1, *(len(row) for row in rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows])
