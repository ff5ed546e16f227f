"""Labelled images: their columns, classes and labels, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from PIL import Image

from clip_po.data.images import to_rgb
from clip_po.data.skipped_rows import UnreadableImage
from clip_po.validation import check_class_names as check_class_names


def read_labels(
    dataset: Dataset, label_column: str, class_names: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and labels of a data set, checked.

    Args:
        dataset: One split.
        label_column: Column of ClassLabel or integers.
        class_names: C names in the order of the labels; None for those of the ClassLabel column.

    Returns:
        The names, and the labels as an array [N] of integers in 0..C-1.

    Raises:
        ValueError: The column is missing or holds no classes, the names don't match it, or a label is out of
            range; the message names the row.
        TypeError: `dataset` is no single split.
    """
    feature = _column(dataset, label_column, "label_column")
    known: list[str] | None = feature.names if isinstance(feature, ClassLabel) else None
    chosen = known if class_names is None else class_names
    if chosen is None:
        raise ValueError(
            f"Column {label_column!r} is {feature}, without names; pass class_names, or turn strings into "
            f"classes by dataset.class_encode_column({label_column!r})."
        )
    check_class_names(chosen)
    names = tuple(chosen)
    if known is not None and len(known) != len(names):
        raise ValueError(
            f"Column {label_column!r} has {len(known)} classes, class_names has {len(names)} names; give one "
            f"name for each of {known[:5]}{'...' if len(known) > 5 else ''}, in this order."
        )
    if known is not None and sorted(known) == sorted(names) and tuple(known) != names:
        raise ValueError(f"class_names are those of column {label_column!r} in another order; leave class_names out.")
    values = list(dataset.with_format(None)[label_column])
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < len(names):
            raise ValueError(
                f"Row {row}: {label_column!r} is {value!r}, expected a class number in 0..{len(names) - 1}. "
                "Filter such rows out, or mend class_names."
            )
    return names, np.array(values, dtype=np.int64)


def read_weights(dataset: Dataset, weight_column: str) -> list[float]:
    """Weights of rows, checked: finite numbers >= 0.

    Raises:
        ValueError: The column is missing, or a weight can't be used; the message names the row.
        TypeError: `dataset` is no single split.
    """
    _column(dataset, weight_column, "weight_column")
    values = list(dataset.with_format(None)[weight_column])
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < math.inf:
            raise ValueError(
                f"Row {row}: {weight_column!r} is {value!r}, expected a finite number >= 0. Mend it, or filter the "
                "row out."
            )
    return [float(value) for value in values]


def read_images(dataset: Dataset, image_column: str) -> Dataset:
    """The image column of a data set alone, unformatted, so that reading a row decodes one image only.

    Raises:
        ValueError: The column is missing.
        TypeError: `dataset` is no single split.
    """
    _column(dataset, image_column, "image_column")
    return dataset.with_format(None).select_columns([image_column])


def read_image(images: Dataset, image_column: str, row: int) -> Image.Image:
    """The image of a row, in RGB.

    Raises:
        UnreadableImage: It can't be read, or is no image; the message names row and column.
    """
    try:
        image = images[row][image_column]
        if isinstance(image, Image.Image):
            return to_rgb(image)
    except Exception as error:  # decoders of broken files raise anything from OSError to SyntaxError
        raise UnreadableImage(
            f"Row {row}: the image in column {image_column!r} can't be read "
            f"({type(error).__name__}: {error}). Mend the file, or filter the row out."
        ) from error
    raise UnreadableImage(
        f"Row {row}: column {image_column!r} holds {type(image).__name__}, expected an image. Filter the row "
        f"out; paths become images by dataset.cast_column({image_column!r}, datasets.Image())."
    )


def _column(dataset: Any, column: str, argument: str) -> Any:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"Expected one split, a datasets.Dataset, got {type(dataset).__name__}; choose one, as in "
            'load_dataset(..., split="test").'
        )
    if column not in dataset.column_names:
        raise ValueError(f"{argument}={column!r} is no column of the data set; it has {dataset.column_names}.")
    return dataset.features[column]
