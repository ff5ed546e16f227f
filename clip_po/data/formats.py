"""The named row formats and their checks.

================  ==================================================  =====================================
format            columns                                             optional columns
================  ==================================================  =====================================
image-preference  image, chosen (text), rejected (text or texts)      clean_image, candidates, weight
class-preference  image, label, rejected_label (class or classes)     clean_image, weight
regularization    image
================  ==================================================  =====================================

`clean_image` is the image before an attack. `weight` >= 0 scales a row's preference loss. Without
`candidate_texts` the policy of a row chooses among its `candidates`, or else its chosen and rejected texts.
A class-preference names positions in `candidate_texts`. `rejected` may be absent where every loss is `sft` or
`distillation`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image, List, Value
from PIL import Image as PILImage

from clip_po.data.images import to_rgb
from clip_po.data.skipped_rows import UnreadableImage
from clip_po.losses import SINGLE_REJECTED, WITHOUT_REJECTED
from clip_po.validation import check_candidates as check_candidates

Row = dict[str, Any]

IMAGE_COLUMNS = ("image", "clean_image")

_DECODING = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError),
    *(struct.error, zlib.error, PILImage.DecompressionBombError),
)
"""What decoders of broken files raise; other errors are those of a transform of the user's."""


def as_list(value: Any) -> list[Any]:
    """The value as a list: one text or class alone is a list of one, None an empty one."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def row_format(columns: Collection[str], name: str = "train_dataset") -> str:
    """The format of rows with these columns, "image-preference" or "class-preference".

    Raises:
        ValueError: The columns are of neither format.
    """
    if "image" in columns and "chosen" in columns:
        return "image-preference"
    if "image" in columns and "label" in columns:
        return "class-preference"
    raise ValueError(
        f"{name} has the columns {sorted(columns)}, but preferences need either image, chosen, rejected (texts) "
        "or image, label, rejected_label (positions in candidate_texts). Rename its columns with "
        "`dataset.rename_column(old, new)`; to draw typographic attacks on labelled images, wrap it in "
        "`TypographicPreferences`."
    )


def check_preferences(
    dataset: Dataset,
    candidate_texts: Sequence[str] | None,
    loss_types: Collection[str],
    name: str = "train_dataset",
) -> None:
    """Check every row of a preference data set but its images, which are read when their turn comes.

    Args:
        dataset: The rows.
        candidate_texts: As for the trainer.
        loss_types: Names of the losses: only `sft` and `distillation` do without rejected texts.
        name: What messages call the data set.

    Raises:
        ValueError: Empty, wrong columns or types, or a row whose texts, labels or weight can't be used; the
            message names row and column.
    """
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; give it at least one row.")
    form = row_format(dataset.column_names, name)
    if form == "class-preference" and candidate_texts is None:
        raise ValueError(
            f"{name} has the columns label and rejected_label, which are positions in `candidate_texts`, but no "
            "candidate_texts were given. Pass the class prompts, such as [f'a photo of a {c}' for c in classes]."
        )
    chosen, rejected = ("chosen", "rejected") if form == "image-preference" else ("label", "rejected_label")
    if rejected not in dataset.column_names and not set(loss_types) <= WITHOUT_REJECTED:
        raise ValueError(
            f"{name} has no column {rejected!r} (its columns: {dataset.column_names}), which "
            f"loss_type={sorted(loss_types)} needs; only 'sft' and 'distillation' do without."
        )
    check_types(dataset, name)
    columns = [c for c in (chosen, rejected, "candidates", "weight") if c in dataset.column_names]
    texts = dataset.select_columns(columns).with_format(None)
    needs_rejected = not set(loss_types) <= WITHOUT_REJECTED
    for index, row in enumerate(texts):
        check_row(row, candidate_texts, f"{name} row {index}")
        if needs_rejected and not as_list(row[rejected]):
            raise ValueError(
                f"{name} row {index}: column {rejected!r} is empty, but loss_type={sorted(loss_types)} needs a "
                "rejected text in every row. Drop the row or fill it in."
            )
        single = SINGLE_REJECTED & set(loss_types)
        if single and len(as_list(row[rejected])) > 1:
            raise ValueError(
                f"{name} row {index}: column {rejected!r} has {len(row[rejected])} entries, but {sorted(single)} "
                "compare the chosen text with one. Keep one a row, or use 'sigmoid' (S-DPO)."
            )


def check_types(dataset: Dataset, name: str) -> None:
    """Refuse columns whose declared type is not that of their format; undeclared ones are seen row by row."""
    expected: Mapping[str, tuple[str, Any]] = {
        "image": ("datasets.Image()", lambda f: isinstance(f, Image)),
        "clean_image": ("datasets.Image()", lambda f: isinstance(f, Image)),
        "chosen": ("a string", _is_text),
        "rejected": ("a string or a list of strings", lambda f: _is_text(f) or _is_list(f, _is_text)),
        "candidates": ("a list of strings", lambda f: _is_list(f, _is_text)),
        "label": ("a ClassLabel or an integer", _is_class),
        "rejected_label": ("a class or a list of classes", lambda f: _is_class(f) or _is_list(f, _is_class)),
        "weight": ("a number", lambda f: isinstance(f, Value) and f.dtype.startswith(("float", "int"))),
    }
    for column, feature in (dataset.features or {}).items():
        if column in expected and not expected[column][1](feature):
            remedy = (
                f"cast it: dataset.cast_column({column!r}, datasets.Image())"
                if column in IMAGE_COLUMNS
                else "convert it with dataset.map or rename it"
            )
            raise ValueError(f"{name} column {column!r} must be {expected[column][0]}, got {feature}; {remedy}.")


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "null")


def _is_class(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)


def _is_list(feature: Any, inner: Any) -> bool:
    return isinstance(feature, List) and inner(feature.feature)


def check_row(row: Mapping[str, Any], candidate_texts: Sequence[str] | None, where: str) -> None:
    """Refuse a row whose texts, labels or weight can't be used.

    Raises:
        ValueError: What was found, where, and what to do.
    """
    weight = row.get("weight", 1.0)
    if weight is None or not 0 <= weight < float("inf"):
        raise ValueError(
            f"{where}: column 'weight' must be a finite number >= 0, got {weight!r}. Mend it, or drop the row."
        )
    if "chosen" not in row:
        labels = as_list(row.get("rejected_label"))
        for column, values in (("label", [row["label"]]), ("rejected_label", labels)):
            for value in values:
                _check_class(value, candidate_texts or (), f"{where}: column {column!r}")
        if len(set(labels)) < len(labels):
            raise ValueError(f"{where}: column 'rejected_label' has a class twice: {labels!r}. Give each once.")
        if row["label"] in labels:
            raise ValueError(
                f"{where}: columns 'label' and 'rejected_label' are both {row['label']}; a preference needs two "
                "different classes. Drop the row or mend its label."
            )
        return
    chosen, rejected = row["chosen"], as_list(row.get("rejected"))
    for column, texts in (("chosen", [chosen]), ("rejected", rejected)):
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"{where}: column {column!r} must be a text that is not empty, got {text!r}. Fill it in, or drop "
                    "the row."
                )
    if chosen in rejected:
        raise ValueError(
            f"{where}: columns 'chosen' and 'rejected' are both {chosen!r}; a preference needs two different "
            "texts. Drop the row or mend it."
        )
    if len(set(rejected)) < len(rejected):
        raise ValueError(f"{where}: column 'rejected' has a text twice: {rejected!r}. Give each once.")
    own = row.get("candidates")
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
                raise ValueError(
                    f"{where}: column {column!r} is {text!r}, which is not among the candidate texts "
                    f"{_short(candidates)}. Add it to candidate_texts, or leave candidate_texts out so that each "
                    "row chooses among its own texts."
                )


def _check_class(value: Any, candidate_texts: Sequence[str], where: str) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not 0 <= value < len(candidate_texts):
        raise ValueError(
            f"{where} is {value!r}, but there are {len(candidate_texts)} candidate texts, so labels run from 0 to "
            f"{len(candidate_texts) - 1}. Mend the label (-1 often stands for an unlabelled row: drop it), or give "
            "a candidate text for every class."
        )


def _short(texts: Sequence[str], most: int = 6) -> str:
    return repr(list(texts[:most])) if len(texts) <= most else f"{list(texts[:most])!r}... ({len(texts)} texts)"


def check_regularization(dataset: Dataset, name: str = "reg_dataset") -> None:
    """Refuse a regularization data set that is empty or has no column of images.

    Raises:
        TypeError: No `datasets.Dataset`.
        ValueError: What was found and what to do.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}. Dataset.from_dict({{'image': images}}) "
            "makes one of a list of images; load a streamed one without streaming=True."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; give it at least one image.")
    if "image" not in dataset.column_names:
        raise ValueError(
            f"{name} has the columns {dataset.column_names}, but its images must stand in a column 'image'. "
            "Rename it with `dataset.rename_column(old, 'image')`."
        )
    check_types(dataset.select_columns(["image"]), name)


def read_row(dataset: Any, index: int, name: str) -> Row:
    """Row `index` with its images decoded, in RGB.

    Raises:
        UnreadableImage: An image is missing or can't be read; the message names row and column.
    """
    try:
        row = dataset[index]
        for column in IMAGE_COLUMNS:
            if isinstance(row.get(column), PILImage.Image):
                row[column] = to_rgb(row[column])
    except _DECODING as error:
        raise UnreadableImage(
            f"{name} row {index}: an image in column {_unreadable(dataset, index)} can't be read "
            f"({type(error).__name__}: {error}). Mend the file or leave the row out, for instance with "
            f"`dataset.select`."
        ) from error
    for column in IMAGE_COLUMNS:
        if column not in row:
            continue
        if row[column] is None:
            raise UnreadableImage(
                f"{name} row {index}: column {column!r} holds no image. Leave the row out, for instance with "
                "`dataset.select`."
            )
        if isinstance(row[column], (str, bytes, Mapping)):
            raise UnreadableImage(
                f"{name} row {index}: column {column!r} holds {type(row[column]).__name__}, expected an image. Paths "
                f"and bytes become images by dataset.cast_column({column!r}, datasets.Image())."
            )
    return row


def _unreadable(dataset: Any, index: int) -> str:
    """The columns of images of a row that can't be read; all of them where that can't be told."""
    columns = [c for c, f in (getattr(dataset, "features", None) or {}).items() if isinstance(f, Image)] or ["image"]
    broken = []
    for column in columns:
        try:
            to_rgb(dataset.with_format(None).select_columns([column])[index][column])
        except Exception:  # whatever it is, it is there that something is wrong
            broken.append(column)
    return " or ".join(map(repr, broken or columns))


def to_texts(row: Row, candidate_texts: Sequence[str] | None) -> Row:
    """A row of either preference format as an image-preference: `chosen` a text, `rejected` a list of texts."""
    if "chosen" in row:
        return {**row, "rejected": as_list(row.get("rejected"))}
    texts = candidate_texts or ()
    rejected = [texts[label] for label in as_list(row.get("rejected_label"))]
    return {**row, "chosen": texts[row["label"]], "rejected": rejected}
