"""The row formats of datasets, and their checks.

================  ==================================================  =====================================
format            columns                                             optional columns
================  ==================================================  =====================================
image-preference  image, chosen (text), rejected (text or texts)      clean_image, candidates, weight
class-preference  image, label, rejected_label (class or classes)     clean_image, weight
image-pair        text, chosen_image, rejected_image (or images)      weight
unpaired          image, text, label (bool)                           candidates, clean_image, weight
regularization    image                                               text
================  ==================================================  =====================================

Rows of the first four formats may be mixed in one dataset: `clip_po.data.row_kinds` tells them apart.
`clean_image` is the image before an attack. `weight` >= 0 scales the preference loss of a row. All kinds of
preferences may also have the columns of `clip_po.data.grades`, such as `margin`. Without
`candidate_texts` the policy of a row chooses among its `candidates`, or by default its chosen and rejected texts. The
classes of a class-preference are positions in `candidate_texts`. `rejected` may be absent if every loss is `sft` or
`distillation`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Image, IterableDataset, List, Value
from PIL import Image as PILImage

from clip_po.data.attacks.words import spelling
from clip_po.data.class_positions import check_candidate_positions
from clip_po.data.column_names import check_column_names
from clip_po.data.grades import GRADES, check_grades
from clip_po.data.images import check_index, image_path, to_rgb, unformatted
from clip_po.losses import WITHOUT_REJECTED
from clip_po.other_kinds import dataset_remedy
from clip_po.validation import (
    check_candidates,
    check_image,
    check_label,
    check_rejected,
    check_rejected_count,
    check_row_weight,
    check_text,
    unreadable_image,
)

Row = dict[str, Any]

IMAGE_COLUMNS = ("image", "clean_image")

DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, OverflowError),
    *(struct.error, zlib.error, PILImage.DecompressionBombError),
)
"""Errors that mean an unreadable image also where every image of the row can be read alone: a transform of the user
may open files."""


def as_list(value: Any) -> list[Any]:
    """Return a value as a list.

    Args:
        value: A text, a class, a list or tuple of them, or None.

    Returns:
        A new list: the entries of a list or tuple, a single value as a list of one, None as an empty list.
    """
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


# ---- Columns -----------------------------------------------------------------------------------------------


def row_format(columns: Collection[str], name: str = "train_dataset") -> str:
    """Return the format of rows with these columns.

    Args:
        columns: Names of the columns.
        name: Name of the dataset in messages.

    Returns:
        "image-preference" if there are `image` and `chosen`, else "class-preference" if there are `image` and `label`.

    Raises:
        ValueError: If the columns fit neither format.
    """
    if "image" in columns and "chosen" in columns:
        return "image-preference"
    if "image" in columns and "label" in columns:
        return "class-preference"
    raise ValueError(
        f"{name} has the columns {sorted(columns)}, but preferences need either image, chosen, rejected (texts) "
        "or image, label, rejected_label (positions in candidate_texts). Rename its columns with "
        "`dataset.rename_column(old, new)`. To draw typographic attacks on labelled images, wrap it in "
        "`TypographicPreferences`."
    )


def check_columns(
    columns: Collection[str], candidate_texts: Sequence[str] | None, loss_types: Collection[str], name: str
) -> tuple[str, str]:
    """Raise if the columns of preferences don't suit the losses.

    Args:
        columns: Names of the columns.
        candidate_texts: The candidate texts of every row, or None.
        loss_types: Names of the losses.
        name: Name of the dataset in messages.

    Returns:
        The names of the columns of the chosen and the rejected texts or classes.

    Raises:
        ValueError: If the columns fit no format, a class-preference comes without candidate texts, or rejected texts
            are missing.
    """
    form = row_format(columns, name)
    chosen, rejected = ("chosen", "rejected") if form == "image-preference" else ("label", "rejected_label")
    if rejected not in columns and not set(loss_types) <= WITHOUT_REJECTED:
        wrap = " To draw typographic attacks on labelled images, wrap them: TypographicPreferences(dataset, attack)."
        raise ValueError(
            f"{name} has no column {rejected!r} (its columns: {list(columns)}), which "
            f"loss_type={sorted(loss_types)} needs; only 'sft' and 'distillation' do without."
            f"{wrap if chosen == 'label' else ''}"
        )
    if form == "class-preference" and candidate_texts is None:
        raise ValueError(
            f"{name} has labels, which are positions in `candidate_texts`, but no candidate_texts were given. Pass "
            "the class prompts, such as [f'a photo of a {c}' for c in classes]."
        )
    return chosen, rejected


def check_types(dataset: Dataset | IterableDataset, name: str) -> None:
    """Raise if the declared type of a column does not fit its format. Undeclared types are checked row by row.

    Args:
        dataset: The rows.
        name: Name of the dataset in messages.

    Raises:
        ValueError: If a type does not fit; the message names the column.
    """
    expected: Mapping[str, tuple[str, Any]] = {
        "image": ("datasets.Image()", lambda f: isinstance(f, Image)),
        "clean_image": ("datasets.Image()", lambda f: isinstance(f, Image)),
        "chosen": ("a string", is_text),
        "rejected": ("a string or a list of strings", lambda f: is_text(f) or _is_list(f, is_text)),
        "candidates": ("a list of strings", lambda f: _is_list(f, is_text)),
        "label": ("a ClassLabel or an integer", _is_class),
        "rejected_label": ("a class or a list of classes", lambda f: _is_class(f) or _is_list(f, _is_class)),
        **dict.fromkeys(("weight", *GRADES), ("a number", _is_number)),
    }
    for column, feature in (dataset.features or {}).items():
        if column in expected and not expected[column][1](feature):
            remedy = (
                f"cast it: dataset.cast_column({column!r}, datasets.Image())"
                if column in IMAGE_COLUMNS
                else "convert it with dataset.map or rename it"
            )
            raise ValueError(f"{name} column {column!r} must be {expected[column][0]}, got {feature}; {remedy}.")


def is_text(feature: Any) -> bool:
    """Return whether a column holds texts.

    Args:
        feature: Feature of the column.

    Returns:
        True also for a column of nothing but None.
    """
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "null")


def _is_number(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(("float", "int", "uint"))


def _is_class(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)


def _is_list(feature: Any, inner: Any) -> bool:
    return isinstance(feature, List) and inner(feature.feature)


# ---- Rows --------------------------------------------------------------------------------------------------


def check_preferences(
    dataset: Dataset,
    candidate_texts: Sequence[str] | None,
    loss_types: Collection[str],
    name: str = "train_dataset",
) -> None:
    """Raise if any row of a preference dataset can't be used. Images are not read.

    Args:
        dataset: The rows.
        candidate_texts: The candidate texts of every row, or None.
        loss_types: Names of the losses. Only `sft` and `distillation` do without rejected texts.
        name: Name of the dataset in messages.

    Raises:
        ValueError: If the dataset is empty, columns or types are wrong, or the texts, labels or weight of a row can't
            be used; the message names row and column.
    """
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; give it at least one row.")
    check_column_names(dataset.column_names, dataset.features, name)
    used = [*check_columns(dataset.column_names, candidate_texts, loss_types, name), "candidates", "weight", *GRADES]
    check_types(dataset, name)
    if "chosen" not in dataset.column_names:
        check_candidate_positions(dataset.features, candidate_texts or (), name)
    texts = dataset.select_columns([column for column in used if column in dataset.column_names]).with_format(None)
    for index, row in enumerate(texts):
        check_row(row, candidate_texts, loss_types, f"{name} row {index}")


def check_row(
    row: Mapping[str, Any], candidate_texts: Sequence[str] | None, loss_types: Collection[str], where: str
) -> None:
    """Raise if the texts, labels, weight or grades of a row can't be used.

    Args:
        row: The row, in either preference format.
        candidate_texts: The candidate texts of every row, or None.
        loss_types: Names of the losses.
        where: The row in messages, such as "train_dataset row 3".

    Raises:
        ValueError: If they can't; the message names the column.
        TypeError: If an entry of `candidates` is not a string, or a grade is not a number.
    """
    check_row_weight(row.get("weight", 1.0), f"{where}: column 'weight'")
    check_grades(row, where)
    columns = ("chosen", "rejected") if "chosen" in row else ("label", "rejected_label")
    chosen, rejected = row[columns[0]], as_list(row.get(columns[1]))
    for column, values in zip(columns, ([chosen], rejected), strict=True):
        for value in values:
            if "chosen" in row:
                check_text(value, f"{where}: column {column!r}", "Fill it in or drop the row.")
            else:
                classes = len(candidate_texts or ())
                check_label(value, classes, f"{where}: column {column!r}", "candidate_texts")
    check_rejected(chosen, rejected, columns, where)
    if "chosen" in row:
        _check_candidates(chosen, rejected, row.get("candidates"), candidate_texts, where)
    check_rejected_count(len(rejected), loss_types, f"{where}: column {columns[1]!r}")


def _check_candidates(
    chosen: str,
    rejected: Sequence[str],
    own: Sequence[str] | None,
    candidate_texts: Sequence[str] | None,
    where: str,
) -> None:
    """Raise if the texts of a row are not among its candidate texts."""
    candidates = candidate_texts if candidate_texts is not None else own
    if candidates is None:
        if not rejected:
            raise ValueError(
                f"{where}: {chosen!r} is its only candidate text, so its probability is always 1. Give "
                "candidate_texts to the trainer, or a column 'candidates' or 'rejected'."
            )
        return
    check_candidates(own, f"{where}: column 'candidates'")
    for column, texts in (("chosen", [chosen]), ("rejected", rejected)):
        for text in texts:
            if text not in candidates:
                same = next((known for known in candidates if spelling(known) == spelling(text)), None)
                remedy = "Add it to candidate_texts" if same is None else f"Write it as there, {same!r}"
                raise ValueError(
                    f"{where}: column {column!r} is {text!r}, which is not among the candidate texts "
                    f"{_short(candidates)}. {remedy}, or leave candidate_texts out so that each row chooses among its "
                    "own texts."
                )


def _short(texts: Sequence[str], most: int = 6) -> str:
    return repr(list(texts[:most])) if len(texts) <= most else f"{list(texts[:most])!r}... ({len(texts)} texts)"


def _images_remedy(value: Any, name: str) -> str:
    if isinstance(value, (list, tuple)):
        return "Dataset.from_dict({'image': images}).cast_column('image', Image()) converts a list of images."
    return dataset_remedy(value, name)


def check_regularization(dataset: Dataset, name: str = "reg_dataset") -> None:
    """Raise if a regularization dataset is empty or has no column of images.

    Args:
        dataset: The dataset.
        name: Name of the dataset in messages.

    Raises:
        TypeError: If it is not a `datasets.Dataset`.
        ValueError: If it is empty, or has no column `image` of images.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}. {_images_remedy(dataset, name)}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; give it at least one image.")
    if "image" not in dataset.column_names:
        raise ValueError(
            f"{name} has the columns {dataset.column_names}, but its images must be in a column 'image'. "
            "Rename it with `dataset.rename_column(old, 'image')`."
        )
    check_types(dataset.select_columns(["image"]), name)


# ---- Reading -----------------------------------------------------------------------------------------------


def read_row(dataset: Dataset, index: int, name: str) -> Row:
    """Return a row with its images decoded, in RGB.

    Args:
        dataset: The rows.
        index: Number of the row, 0..len(dataset)-1.
        name: Name of the dataset in messages.

    Returns:
        All columns of the row by name, without a format, and after a transform of the user if there is one. `image`
        and `clean_image` are RGB images.

    Raises:
        UnreadableImage: If `image` or `clean_image` is None or holds a path or bytes, or any image of the row can't be
            read; the message names row, column and, where it is known, the file.
        IndexError: If there is no such row.
    """
    where = f"{name} row {index}"
    check_index(dataset, index, name)
    try:
        row = unformatted(dataset)[index]
        for column in IMAGE_COLUMNS:
            if isinstance(row.get(column), PILImage.Image):
                row[column] = to_rgb(row[column])
    except Exception as error:  # decoders of broken files raise anything from OSError to SyntaxError
        broken = _unreadable(dataset, index)
        if not broken and not isinstance(error, DECODING_ERRORS):
            raise  # an error in a transform of the user
        columns = " or ".join(map(repr, broken or _image_columns(dataset)))
        paths = ", ".join(filter(None, broken.values()))
        raise unreadable_image(error, columns, where, paths) from error
    for column in IMAGE_COLUMNS:
        if column in row:
            check_image(row[column], column, where)
    return row


def _image_columns(dataset: Dataset) -> list[str]:
    return [column for column, feature in dataset.features.items() if isinstance(feature, Image)] or ["image"]


def _unreadable(dataset: Dataset, index: int) -> dict[str, str | None]:
    """Return the image columns of a row that can't be read alone, with the paths of their images."""
    broken = {}
    for column in _image_columns(dataset):
        try:
            to_rgb(dataset.with_format(None).select_columns([column])[index][column])
        except Exception:  # any error here means that the image is the cause
            broken[column] = image_path(dataset, column, index)
    return broken


def to_texts(row: Row, candidate_texts: Sequence[str] | None) -> Row:
    """Return a row of either preference format as an image-preference.

    Args:
        row: The row.
        candidate_texts: The texts that the classes of a class-preference refer to.

    Returns:
        The row with `chosen`, a text, and `rejected`, a list of texts.
    """
    if "chosen" in row:
        return {**row, "rejected": as_list(row.get("rejected"))}
    texts = candidate_texts or ()
    rejected = [texts[label] for label in as_list(row.get("rejected_label"))]
    return {**row, "chosen": texts[row["label"]], "rejected": rejected}
