"""Kinds of feedback, told row by row, so that rows of several kinds can be mixed in one dataset.

========  =====================================================  ==================================================
kind      columns of the row                                     the policy chooses
========  =====================================================  ==================================================
texts     image, chosen, rejected (texts)                        among texts, for an image
images    text, chosen_image, rejected_image (image or images)   among images, for a text
unpaired  image, text, label (bool)                              among texts, for an image; one text is right or wrong
========  =====================================================  ==================================================

Pick-a-Pic's columns (caption, jpg_0, jpg_1, label_0, label_1) are another layout of "images".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from datasets import ClassLabel

Kind = Literal["texts", "images", "unpaired"]

IMAGE_PAIR = frozenset({"text", "chosen_image", "rejected_image"})
UNPAIRED_TEXT = frozenset({"image", "text", "label"})
PICK_A_PIC = frozenset({"caption", "jpg_0", "jpg_1", "label_0", "label_1"})

PAIR_IMAGES = ("chosen_image", "rejected_image", "jpg_0", "jpg_1")
"""Columns that hold the images of a row of the kind "images"."""

TIE = 0.5
"""Pick-a-Pic's label of both images where neither is better, and the label smoothing of a tie."""


def has_kinds(columns: Collection[str], features: Mapping[str, Any] | None) -> bool:
    """Return whether rows with these columns have other kinds of feedback than preferences between texts.

    Args:
        columns: Names of the columns.
        features: Features of the dataset; None where a stream does not say.

    Returns:
        True for rows of two images, of unpaired feedback, in Pick-a-Pic's layout, or mixed with these.
    """
    given = set(columns)
    of_classes = "rejected_label" in given or isinstance((features or {}).get("label"), ClassLabel)
    return given >= IMAGE_PAIR or given >= PICK_A_PIC or (given >= UNPAIRED_TEXT and not of_classes)


def possible_kinds(columns: Collection[str]) -> list[Kind]:
    """Return the kinds of which rows with these columns may be.

    Args:
        columns: Names of the columns, for which `has_kinds` is true.

    Returns:
        Each kind once.
    """
    given, found = set(columns), list[Kind]()
    if given & {"chosen", "rejected_label"}:
        found.append("texts")
    if given >= IMAGE_PAIR or given >= PICK_A_PIC:
        found.append("images")
    return [*found, "unpaired"] if given >= UNPAIRED_TEXT else found


def standard_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a row fills, with Pick-a-Pic's in the columns of an image pair.

    Args:
        values: Values by column. A concatenated dataset has None in the columns of the other kinds.

    Returns:
        The values that are not None. Of a tie, `jpg_0` counts as chosen, and `label_smoothing` is 0.5.
    """
    row = {name: value for name, value in values.items() if value is not None}
    if "caption" not in row:
        return row
    first, second = (row.pop(f"jpg_{n}", None) for n in (0, 1))
    shares = [row.pop(f"label_{n}", None) for n in (0, 1)]
    if shares[0] == shares[1]:
        row["label_smoothing"] = TIE
    elif None not in shares and shares[1] > shares[0]:
        first, second = second, first
    images = {"chosen_image": first, "rejected_image": second}
    row["text"] = row.pop("caption")
    return {**row, **{name: image for name, image in images.items() if image is not None}}


def kind_of(row: Mapping[str, Any]) -> Kind:
    """Return the kind of a row.

    Args:
        row: The values that it fills, as `standard_row` returns them. Images are not read.

    Returns:
        "texts" for a row with a chosen text or class; "unpaired" for one with a text and a label; else "images".
    """
    if "chosen" in row or "rejected_label" in row:
        return "texts"
    return "unpaired" if "label" in row else "images"
