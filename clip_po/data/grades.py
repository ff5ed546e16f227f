"""Grades of preferences: by how much the chosen text is the better one, and how sure that is.

==============================  =======================================================================
column                          meaning
==============================  =======================================================================
margin                          number >= 0 by which beta * log-ratio of the chosen text must be above
chosen_score, rejected_score    two numbers, of which the difference is the margin
label_smoothing                 probability in [0, 0.5] that the preference is wrong; 0.5 for a tie
==============================  =======================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clip_po.losses import LOSSES
from clip_po.validation import FINITE, NOT_NEGATIVE, Allowed, check_number

if TYPE_CHECKING:
    from clip_po.config import ContrastivePOConfig

SCORES = ("chosen_score", "rejected_score")
GRADES = ("margin", *SCORES, "label_smoothing")
"""Optional columns of preferences."""

_RANGES: Mapping[str, Allowed] = {
    "margin": NOT_NEGATIVE,
    **dict.fromkeys(SCORES, FINITE),
    "label_smoothing": Allowed("lie in [0, 0.5]", lambda number: 0 <= number <= 0.5),
}


def check_grade_columns(columns: Collection[str], args: ContrastivePOConfig, name: str) -> None:
    """Raise if grades of preferences would have no effect, or say the same thing twice.

    Args:
        columns: Names of the columns.
        args: The losses and `label_smoothing`.
        name: Name of the dataset in messages.

    Raises:
        ValueError: If a loss that compares two texts does not read a grade that there is, only one of the two scores
            is there, or margins or label smoothing are given in two ways.
    """
    given = [column for column in GRADES if column in columns]
    comparing = {loss_type for loss_type in args.loss_type if LOSSES[loss_type].rejected != "none"}
    for column in given:
        grade = "margin" if column in SCORES else column
        reading = {loss_type for loss_type in LOSSES if grade in LOSSES[loss_type].columns}
        if not comparing or comparing - reading:
            raise ValueError(
                f"{name} has a column {column!r}, which only {sorted(reading)} read, but the loss_type is "
                f"{sorted(args.loss_type)}. Change it, or drop the column with dataset.remove_columns({column!r})."
            )
    scores = [column for column in SCORES if column in given]
    if len(scores) == 1:
        raise ValueError(
            f"{name} has a column {scores[0]!r}, but a margin is the difference of the two columns {list(SCORES)}. "
            "Add the other one, or drop it."
        )
    if scores and "margin" in given:
        raise ValueError(
            f"{name} has the columns 'margin' and {list(SCORES)}, which both set the margin. Drop one or the other."
        )
    if "label_smoothing" in given and args.label_smoothing != 0:
        raise ValueError(
            f"{name} has a column 'label_smoothing', which sets it for each row, and label_smoothing="
            f"{args.label_smoothing} sets it for all. Leave one of the two out."
        )


def check_grades(row: Mapping[str, Any], where: str) -> None:
    """Raise if the grades of a preference can't be used.

    Args:
        row: The row. A grade of None is no grade.
        where: The row in messages, such as "train_dataset row 3".

    Raises:
        TypeError: If a grade is not a number.
        ValueError: If a grade is not finite, a margin is negative, a label smoothing is above 0.5, only one of the two
            scores is given, or the rejected text has the higher one.
    """
    for column, allowed in _RANGES.items():
        if row.get(column) is not None:
            check_number(f"{where}: column {column!r}", row[column], allowed, "Fix it or drop the row.")
    chosen, rejected = (row.get(column) for column in SCORES)
    if (chosen is None) != (rejected is None) or (chosen is not None and chosen < rejected):
        raise ValueError(
            f"{where}: chosen_score is {chosen} and rejected_score is {rejected}, but the chosen text must have the "
            "higher score. Exchange the two texts, fix the scores or drop the row."
        )


def grades_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the grades of a batch.

    Args:
        rows: B rows, checked by `check_grades`.

    Returns:
        `margin` and `label_smoothing`, Tensor[B] each; without a name that no row has a grade of. A row without a
        grade has the margin 0 and the label smoothing 0.
    """
    grades = {
        "margin": [_margin(row) for row in rows],
        "label_smoothing": [row.get("label_smoothing") for row in rows],
    }
    return {
        name: torch.tensor([0.0 if value is None else value for value in values], dtype=torch.float32)
        for name, values in grades.items()
        if any(value is not None for value in values)
    }


def _margin(row: Mapping[str, Any]) -> float | None:
    chosen, rejected = (row.get(column) for column in SCORES)
    return row.get("margin") if chosen is None or rejected is None else chosen - rejected
