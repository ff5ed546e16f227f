"""Judged candidates as a dataset; what can't become a row is reported with its number."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from transformers.utils import logging

from clip_po.data.feedback.agreement import Agreement, Row, rows_of
from clip_po.data.feedback.judgements import Judged
from clip_po.data.path_safety import check_resolved

logger = logging.get_logger(__name__)

MOST_NAMED = 5
"""Number of rows left out that a warning names. The others are counted."""

FEATURES: Mapping[str, Any] = {
    **dict.fromkeys(("image", "chosen_image", "rejected_image"), Image()),
    **dict.fromkeys(("chosen", "rejected", "text"), Value("string")),
    "label": Value("bool"),
    **dict.fromkeys(("weight", "label_smoothing"), Value("float32")),
}

NEUTRAL: Mapping[str, float] = {"weight": 1.0, "label_smoothing": 0.0}
"""Columns that are left out if every row has this value: not every loss reads them."""


def feedback_dataset(items: Iterable[Judged], folder: str | os.PathLike[str] | None, agreement: Agreement) -> Dataset:
    """Return judged candidates as a dataset in one of the row formats.

    Args:
        items: The candidates with the judgements.
        folder: Folder to which paths of images are relative, and in which they must be; None if no image is a path.
        agreement: As for `rows_of`.

    Returns:
        The rows, in the order of the items. A warning names what was left out.

    Raises:
        ValueError: If no item becomes a row, or `agreement` is unknown.
    """
    if agreement not in get_args(Agreement):
        raise ValueError(f"agreement must be 'majority' or 'soft', got {agreement!r}.")
    rows: list[Row] = []
    left_out: list[str] = []
    total = 0
    for item in items:
        total += 1
        try:
            rows += _resolved(item, folder, agreement)
        except ValueError as error:
            left_out.append(f"{item.where}: {error}")
    _report(left_out, total)
    kinds = {tuple(row) for row in rows}
    columns = [name for name in rows[0] if any(row[name] != NEUTRAL.get(name, ...) for row in rows)]
    if len(kinds) > 1:
        raise ValueError(f"The rows are of several formats, with the columns {sorted(kinds)}. Read them one by one.")
    features = Features({name: FEATURES[name] for name in columns})
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns}, features=features)


def _resolved(item: Judged, folder: str | os.PathLike[str] | None, agreement: Agreement) -> list[Row]:
    """Return the rows of an item.

    Raises:
        ValueError: If there are none; the message says why.
    """
    if item.problem:
        raise ValueError(item.problem)
    if not all(isinstance(text, str) and text.strip() for text in item.texts):
        raise ValueError(f"a text is empty or missing ({list(item.texts)!r})")
    if len(set(item.texts)) < len(item.texts):
        raise ValueError(f"two of its texts are the same ({list(item.texts)!r})")
    images = [stored_image(image, folder) for image in item.images]
    rows = list(rows_of(Judged(item.where, images, item.texts, item.scores), agreement))
    if not rows:
        raise ValueError("nobody judged it")
    return rows


def stored_image(image: Any, folder: str | os.PathLike[str] | None) -> Any:
    """Return an image of an export as `datasets.Image` stores it.

    Args:
        image: A PIL image, a path, a data URI, or a mapping with `bytes` and `path`.
        folder: As for `feedback_dataset`. Without one, the path in a mapping is taken as it is: it comes from a column
            of images, which `datasets` would open likewise.

    Returns:
        A PIL image, or a mapping with `bytes` or `path`.

    Raises:
        ValueError: If there is no image, or its file does not exist or is outside the folder.
    """
    if isinstance(image, Pillow.Image):
        return image
    if isinstance(image, Mapping) and image.get("bytes"):
        return {"bytes": image["bytes"], "path": image.get("path")}
    name = image.get("path") if isinstance(image, Mapping) else image
    if isinstance(name, bytes):
        return {"bytes": name, "path": None}
    if not isinstance(name, str) or not name:
        raise ValueError(f"there is no image ({image!r})")
    if name.startswith("data:"):
        return {"bytes": _decoded(name), "path": None}
    if "://" in name:
        raise ValueError(f"the image {name!r} is not a file. Download it, and give its path")
    if folder is None and not isinstance(image, Mapping):
        raise ValueError(f"the image is the path {name!r}. Give the folder of the images")
    path = os.path.join(folder or "", name)
    if folder is not None:
        check_resolved([path, *([os.path.realpath(path)] if os.path.islink(path) else [])], [Path(folder)], "it")
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path!r}")
    return {"bytes": None, "path": path}


def _decoded(uri: str) -> bytes:
    head, _, data = uri.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not in base64")
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"the data URI {uri[:40]!r}... can't be read ({error})") from error


def _report(left_out: Sequence[str], total: int) -> None:
    """Warn of what was left out.

    Raises:
        ValueError: If it is all.
    """
    if not total:
        raise ValueError("There is no feedback: the export is empty.")
    named = "; ".join(left_out[:MOST_NAMED]) + ("; ..." if len(left_out) > MOST_NAMED else ".")
    if len(left_out) == total:
        raise ValueError(f"None of the {total} rows can be used. {named}")
    if left_out:
        logger.warning(f"{len(left_out)} of {total} rows of feedback are left out. {named}")
