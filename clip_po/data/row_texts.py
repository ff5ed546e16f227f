"""The texts of rows as the model reads them: different to it, and not cut unnoticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from clip_po.candidates import CandidateTexts
from clip_po.data.formats import Row, as_list

logger = logging.get_logger(__name__)

ROWS_AT_ONCE = 1000

REMEDY = "Change one of them, or drop the row."

TEXT_COLUMNS = ("chosen", "rejected", "candidates")


def own_texts(row: Mapping[str, Any]) -> list[str]:
    """Return the texts among which a row chooses if there are no `candidate_texts`.

    Args:
        row: A row of image preferences.

    Returns:
        Its `candidates`, or else the chosen and the rejected texts.
    """
    return as_list(row.get("candidates")) or [row["chosen"], *as_list(row.get("rejected"))]


def check_row_texts(dataset: Dataset, candidate_texts: CandidateTexts, name: str) -> None:
    """Raise if the model can't tell two texts of a row apart, and warn of texts that are cut.

    Rows that share `candidate_texts` or hold classes have no texts of their own.

    Args:
        dataset: The rows, checked by `check_preferences`.
        candidate_texts: The candidate texts of every row, if any, and the token ids that tell texts apart.
        name: Name of the dataset in messages.

    Raises:
        ValueError: If two texts of a row have the same token ids; the message names the row.
    """
    tokens = candidate_texts.tokens
    if tokens is None or candidate_texts or "chosen" not in dataset.column_names:
        return
    columns = [column for column in TEXT_COLUMNS if column in dataset.column_names]
    cut = 0
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        end = min(start + ROWS_AT_ONCE, len(dataset))
        rows = dataset.select(range(start, end)).select_columns(columns).with_format(None).to_list()
        cut += tokens.learn(text for row in rows for text in own_texts(row))
        for number, row in enumerate(rows, start):
            tokens.check_differ(own_texts(row), f"{name} row {number}", REMEDY)
    tokens.warn_of_cut(cut, name)


def check_streamed_texts(row: Row, candidate_texts: CandidateTexts, where: str) -> None:
    """Raise if the model can't tell two texts of a streamed row apart, and warn of the first one that is cut.

    Args:
        row: The row, in either preference format.
        candidate_texts: As for `check_row_texts`.
        where: The row in messages.

    Raises:
        ValueError: If two texts of the row have the same token ids.
    """
    tokens = candidate_texts.tokens
    if tokens is None or candidate_texts or "chosen" not in row:
        return
    if tokens.learn(own_texts(row)):
        logger.warning_once(
            f"The stream has texts with more than the {tokens.longest} tokens that the model reads. The rest has no "
            "effect. Shorten texts that differ only there."
        )
    tokens.check_differ(own_texts(row), where, REMEDY)
