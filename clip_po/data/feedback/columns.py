"""Columns of the candidates, and judgements that may not be understood."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from clip_po.data.feedback.judgements import Judged, Scores
from clip_po.data.formats import as_list


def candidate_columns(image: str | Sequence[str], text: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the columns of images and of texts.

    Args:
        image: One column, or several candidates.
        text: One column, or several candidates.

    Returns:
        Both as lists.

    Raises:
        ValueError: If both have several columns.
    """
    images, texts = as_list(image), as_list(text)
    if len(images) > 1 and len(texts) > 1:
        raise ValueError(
            f"image={images} and text={texts} both have several columns. Give one image with several texts, or one "
            "text with several images."
        )
    return images, texts


def check_columns(columns: Collection[str], wanted: Sequence[str], name: str) -> None:
    """Raise if a column is missing.

    Args:
        columns: Names of the columns.
        wanted: Names that must be among them.
        name: Name of the data in messages.

    Raises:
        ValueError: If one is not; the message names it.
    """
    if missing := [column for column in wanted if column not in columns]:
        raise ValueError(f"{name} has no column {missing[0]!r}; its columns are {list(columns)}.")


def described(
    where: str, images: Sequence[Any], texts: Sequence[str], scores: Callable[[], Sequence[Scores]]
) -> Judged:
    """Return judged candidates, with what is not understood as their problem.

    Args:
        where: As for `Judged`.
        images: As for `Judged`.
        texts: As for `Judged`.
        scores: Reads the judgements.

    Returns:
        The candidates.
    """
    try:
        return Judged(where, images, texts, scores())
    except (ValueError, TypeError) as error:
        return Judged(where, images, texts, problem=str(error))
