"""Pairs of a chosen and a rejected candidate in datasets of preferences, as positions of images and texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from clip_po.data.column_images import Place, image_counts
from clip_po.data.formats import as_list
from clip_po.data.row_kinds import IMAGE_PAIR, PAIR_IMAGES, PICK_A_PIC, kind_of, standard_row
from clip_po.validation import check_row_weight, check_text

IMAGE_TO_TEXT, TEXT_TO_IMAGE = "image_to_text", "text_to_image"
"""Directions of preferences: between texts for an image, and between images for a text."""

TEXT_PAIR = frozenset({"image", "chosen", "rejected"})

_USED = ("chosen", "rejected", "text", "label", "caption", "label_0", "label_1", "weight", "label_smoothing")


@dataclass(frozen=True)
class PreferencePairs:
    """Pairs of a chosen and a rejected candidate, as positions of images and texts.

    Attributes:
        places: Where the images are.
        texts: M different texts.
        chosen: Array [P, 2]: position of the image and of the text of the chosen pair.
        rejected: Array [P, 2], likewise.
        row: Array [P], the row of each pair.
        direction: Array [P] of `IMAGE_TO_TEXT` or `TEXT_TO_IMAGE`.
        doubt: Array [P], the share of annotators for whom the preference is the other way round, in [0, 0.5].
        weight: Array [P] of weights >= 0.
    """

    places: list[Place]
    texts: list[str]
    chosen: np.ndarray
    rejected: np.ndarray
    row: np.ndarray
    direction: np.ndarray
    doubt: np.ndarray
    weight: np.ndarray


def has_preferences(dataset: Dataset) -> bool:
    """Return whether a dataset has the columns of preferences between texts or between images.

    Args:
        dataset: One split.

    Returns:
        True for image, chosen, rejected; for text, chosen_image, rejected_image; and for Pick-a-Pic's columns.
    """
    names = set(dataset.column_names)
    return any(names >= columns for columns in (TEXT_PAIR, IMAGE_PAIR, PICK_A_PIC))


def preference_pairs(dataset: Dataset) -> PreferencePairs:
    """Read the pairs of a dataset. Images are not read.

    Args:
        dataset: Rows of the kinds "texts" and "images" of `clip_po.data.row_kinds`, also mixed. Rows of unpaired
            feedback among them are left out. `rejected` and `rejected_image` may be lists. Optional columns:
            `label_smoothing`, the share of annotators against the preference, and `weight`.

    Returns:
        A pair for each rejected candidate.

    Raises:
        ValueError: If columns are missing, there are no pairs, or a text, weight or `label_smoothing` can't be used;
            the message names the row.
    """
    if not has_preferences(dataset):
        raise ValueError(
            f"The dataset has the columns {dataset.column_names}, but preferences need image, chosen and rejected, or "
            "text, chosen_image and rejected_image. Rename its columns with dataset.rename_column(old, new)."
        )
    names = dataset.column_names
    # Images are named by their columns, which Pick-a-Pic's labels exchange.
    columns = {column: column for column in PAIR_IMAGES if column in names}
    counts = {column: image_counts(dataset, column) for column in columns}
    images: dict[Place, int] = {}
    texts: dict[str, int] = {}
    found = []
    for number, values in enumerate(dataset.with_format(None).select_columns([c for c in _USED if c in names])):
        row = standard_row({**values, **columns})
        doubt, weight = _doubt(row.get("label_smoothing"), number), row.get("weight", 1.0)
        check_row_weight(weight, f"Row {number}: column 'weight'")
        for direction, chosen, rejected in _pairs(row, number, counts):
            pair = [
                (images.setdefault(place, len(images)), texts.setdefault(text, len(texts)))
                for place, text in (chosen, rejected)
            ]
            found.append((*pair, number, direction, doubt, weight))
    if not found:
        raise ValueError("The dataset has no preferences: no row has a chosen and a rejected candidate.")
    return PreferencePairs([*images], [*texts], *(np.array(column) for column in zip(*found, strict=True)))


def _pairs(
    row: Mapping[str, Any], number: int, counts: Mapping[str, list[int]]
) -> Iterator[tuple[str, tuple[Place, str], tuple[Place, str]]]:
    """Return the direction, and the image and text of the chosen and of each rejected candidate of a row."""
    kind = kind_of(row)
    if kind == "texts":
        image = ("image", number, 0)
        for text in as_list(row.get("rejected")):
            yield IMAGE_TO_TEXT, (image, _text(row, "chosen", number)), (image, _checked(text, "rejected", number))
    elif kind == "images":
        text, column = _text(row, "text", number), row["rejected_image"]
        for position in range(counts[column][number]):
            yield TEXT_TO_IMAGE, ((row["chosen_image"], number, 0), text), ((column, number, position), text)


def _text(row: Mapping[str, Any], column: str, number: int) -> str:
    return _checked(row.get(column), column, number)


def _checked(text: Any, column: str, number: int) -> str:
    check_text(text, f"Row {number}: column {column!r}", "Fill it in or drop the row.")
    return text


def _doubt(value: Any, row: int) -> float:
    doubt = 0.0 if value is None else float(value)
    if not 0 <= doubt <= 0.5:
        raise ValueError(
            f"Row {row}: column 'label_smoothing' is {value!r}, expected a share from 0 to 0.5. Exchange the chosen "
            "and the rejected candidate of a row whose preference is probably wrong."
        )
    return doubt
