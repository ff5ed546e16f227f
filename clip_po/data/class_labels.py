"""Class names, labels and weights of labelled images, checked before anything is computed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from datasets import ClassLabel, Dataset, Value

from clip_po.data.attacks.words import spelling
from clip_po.data.class_positions import misplaced_text, shortened
from clip_po.data.table_files import replace_column
from clip_po.validation import check_class_names, check_column, check_label, check_row_weight

UNLABELLED = -1
"""What a ClassLabel holds for a row without a label, as in test splits on the Hub."""

_WORDNET_ID = re.compile(r"n\d{8}")


def known_class_names(feature: object, label_column: str, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names of a label column, checked.

    Args:
        feature: The feature of the column; None where a stream does not say.
        label_column: Name of the column in messages.
        class_names: C names in the order of the labels; None for the names of the `ClassLabel`.

    Returns:
        C names in the order of the labels.

    Raises:
        ValueError: If there are no names, if one is empty or not a string, or if `class_names` has another number of
            names than the `ClassLabel`, or the same names in another order.
    """
    known: list[str] | None = feature.names if isinstance(feature, ClassLabel) else None
    if class_names is None and known is not None:
        return _checked(readable_names(known))
    if class_names is None:
        raise ValueError(
            f"Column {label_column!r} is {feature}, without names; pass class_names, or load the column "
            f"as a ClassLabel, for instance with Dataset.class_encode_column({label_column!r})."
        )
    names = _checked(class_names)
    if known is not None and len(known) != len(names):
        raise ValueError(
            f"Column {label_column!r} has {len(known)} classes, class_names has {len(names)} names; give one "
            f"name for each of {shortened(known)}, in this order."
        )
    if known is not None and (wrong := misplaced_text(known, names)) is not None:
        position, other = wrong
        raise ValueError(
            f"class_names has the names of column {label_column!r} in another order: {names[position]!r} is at "
            f"position {position}, where the column has {known[position]!r}, and names class {other}. Give the names "
            f"in the order of the labels, {shortened(known)}, or leave class_names out to take those of the column."
        )
    return names


def _checked(names: Sequence[str]) -> tuple[str, ...]:
    check_class_names(names)
    return tuple(names)


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


def readable_names(
    names: Sequence[str], until: str | None = None, renamed: Mapping[str, str] | None = None
) -> list[str]:
    """Return the names of classes as they are written in prompts and on images.

    Args:
        names: Names of a dataset, such as those of folders.
        until: Text at which names are cut, such as a comma between synonyms.
        renamed: Other names for some of `names`.

    Returns:
        The names in the same order, with spaces for underscores.

    Raises:
        ValueError: If all names are WordNet ids such as "n02099601", which say nothing to a model.
    """
    given = [(renamed or {}).get(name, name) for name in names]
    if given and all(_WORDNET_ID.fullmatch(name) for name in given):
        raise ValueError(
            f"The class names are WordNet ids ({', '.join(given[:3])}, ...), which are no words to a model. Name the "
            "classes with --class_name_map FILE, a YAML or JSON file such as {n02099601: golden retriever}, or "
            "with --class_names."
        )
    return [readable_name(name, until) for name in given]


def readable_name(name: str, until: str | None = None) -> str:
    """Return the name of a class as it is written in prompts and on images.

    Args:
        name: Name of a dataset, such as that of a folder.
        until: Text at which the name is cut, such as a comma between synonyms.

    Returns:
        The name with spaces for underscores.
    """
    return (name.split(until)[0] if until else name).replace("_", " ").strip()


def encode_labels(dataset: Dataset, label_column: str, class_names: Sequence[str] | None = None) -> Dataset:
    """Return a dataset whose labels are numbers: a column of strings becomes a `ClassLabel`.

    Args:
        dataset: One split.
        label_column: Name of the column. Any other column than one of strings is left as it is.
        class_names: The classes in the order of their numbers; None for the sorted values of the column.

    Returns:
        The dataset.

    Raises:
        ValueError: If a value is missing, or is not one of `class_names`. The message names the row.
    """
    feature = dataset.features.get(label_column)
    if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string"):
        return dataset
    values = list(dataset.with_format(None)[label_column])
    names = sorted({value for value in values if value is not None}) if class_names is None else list(class_names)
    number = {name: index for index, name in enumerate(names)}
    number |= {value: number[name] for value in set(values) if value and (name := readable_name(value)) in number}
    for row, value in enumerate(values):
        if value not in number:
            raise ValueError(
                f"Row {row}: column {label_column!r} is {value!r}, which is not one of the {len(names)} classes "
                f"{names[:5]}{'...' if len(names) > 5 else ''}. Fix the row, or give the classes with --class_names."
            )
    return replace_column(dataset, label_column, [number[value] for value in values], ClassLabel(names=names))


def align_labels(dataset: Dataset, label_column: str, names: Sequence[str], split: str) -> Dataset:
    """Return a dataset whose labels are numbers of the classes of another split.

    Args:
        dataset: One split.
        label_column: Name of the column. A column without class names is left as it is.
        names: The class names of the other split, in the order of its labels.
        split: Name of the split in messages.

    Returns:
        The dataset.

    Raises:
        ValueError: If the dataset has a class that is not in `names`.
    """
    feature = dataset.features.get(label_column)
    if not isinstance(feature, ClassLabel) or feature.names == list(names):
        return dataset
    number = {spelling(name): index for index, name in enumerate(names)}
    unknown = [name for name in feature.names if spelling(name) not in number]
    if unknown:
        raise ValueError(
            f"The split {split!r} has the classes {shortened(unknown)}, which the training split does not have: "
            f"{shortened(names)}. Remove their rows, or give the names of the same classes in both splits."
        )
    moved = [number[spelling(name)] for name in feature.names]
    values = [
        moved[value] if isinstance(value, int) and 0 <= value < len(moved) else value
        for value in dataset.with_format(None)[label_column]
    ]
    return replace_column(dataset, label_column, values, ClassLabel(names=list(names)))


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


def column_texts(dataset: Dataset, column: str) -> list[str]:
    """Return the values of a column as texts.

    Args:
        dataset: One split, N rows.
        column: Name of a column of the split.

    Returns:
        N texts: a ClassLabel by its names, every other value by `str`, and "" for a row without a value: None, nan,
        blank text, or -1 in a ClassLabel.

    Raises:
        ValueError: If a label is the number of no class; the message names the row.
    """
    feature = dataset.features[column]
    values = list(dataset.with_format(None)[column])
    if not isinstance(feature, ClassLabel):
        return ["" if _is_missing(value) else str(value) for value in values]
    for row, value in enumerate(values):
        if value not in (None, UNLABELLED):
            check_label(value, len(feature.names), f"Row {row}: column {column!r}")
    return ["" if value in (None, UNLABELLED) else feature.names[value] for value in values]


def _is_missing(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))
