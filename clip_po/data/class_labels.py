"""Class names, labels and weights of labelled images, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import ClassLabel, Dataset

from clip_po.validation import check_class_names, check_column, check_label, check_row_weight


def known_class_names(feature: object, label_column: str, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names of a label column, checked.

    Args:
        feature: The feature of the column; None where a stream does not say.
        label_column: Name of the column in messages.
        class_names: C names in the order of the labels; None for the names of the `ClassLabel`.

    Returns:
        C names in the order of the labels.

    Raises:
        ValueError: If there are no names, if one is empty, repeated or not a string, or if `class_names` has another
            number of names than the `ClassLabel`, or the same names in another order.
    """
    known: list[str] | None = feature.names if isinstance(feature, ClassLabel) else None
    chosen = known if class_names is None else class_names
    if chosen is None:
        raise ValueError(
            f"Column {label_column!r} is {feature}, without names; pass class_names, or load the column "
            f"as a ClassLabel, for instance with Dataset.class_encode_column({label_column!r})."
        )
    check_class_names(chosen)
    names = tuple(chosen)
    if known is not None and len(known) != len(names):
        raise ValueError(
            f"Column {label_column!r} has {len(known)} classes, class_names has {len(names)} names; give one "
            f"name for each of {known[:5]}{'...' if len(known) > 5 else ''}, in this order."
        )
    if known is not None and sorted(known) == sorted(names) and tuple(known) != names:
        raise ValueError(
            f"class_names has the names of column {label_column!r} in another order; leave class_names out."
        )
    return names


def read_labels(
    dataset: Dataset, label_column: str, class_names: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names and labels of a dataset, checked.

    Args:
        dataset: One split, N rows.
        label_column: Column of `ClassLabel` or integers.
        class_names: C names in the order of the labels; None for the names of the `ClassLabel`.

    Returns:
        The names, and the labels as int64[N] in 0..C-1.

    Raises:
        ValueError: If the column is missing or has no names, the names don't match it, or a label is out of range;
            the message names the row.
        TypeError: If `dataset` is not a single split.
    """
    names = known_class_names(check_column(dataset, label_column, "label_column"), label_column, class_names)
    values = list(dataset.with_format(None)[label_column])
    for row, value in enumerate(values):
        check_label(value, len(names), f"Row {row}: column {label_column!r}")
    return names, np.array(values, dtype=np.int64)


def read_weights(dataset: Dataset, weight_column: str) -> list[float]:
    """Return the weights of rows, checked to be finite numbers >= 0.

    Args:
        dataset: One split.
        weight_column: Name of the column.

    Returns:
        One weight per row, in the order of the rows.

    Raises:
        ValueError: If the column is missing, or a weight is not finite or negative; the message names the row.
        TypeError: If `dataset` is not a single split.
    """
    check_column(dataset, weight_column, "weight_column")
    values = list(dataset.with_format(None)[weight_column])
    for row, value in enumerate(values):
        check_row_weight(value, f"Row {row}: column {weight_column!r}")
    return [float(value) for value in values]
