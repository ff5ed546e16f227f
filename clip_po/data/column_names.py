"""Columns of other formats and misspelled columns: refused with the way to the formats of `clip_po.data.formats`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from datasets import Image, List, Value

from clip_po.data.grades import GRADES
from clip_po.data.row_kinds import IMAGE_PAIR, PICK_A_PIC, UNPAIRED_TEXT, has_kinds

COMMON = ("image", "clean_image", "weight", *GRADES)
TEXTS = (*COMMON, "chosen", "rejected", "candidates")
CLASSES = (*COMMON, "label", "rejected_label")
FEEDBACK = (*TEXTS, *IMAGE_PAIR, *UNPAIRED_TEXT, *PICK_A_PIC)

OTHER_NAMES: Mapping[str, str] = {
    "candidatetext": "candidates",
    "rowweight": "weight",
    "sampleweight": "weight",
}
"""Names from elsewhere, as `_plain` returns them, and what they are called here."""

ALIKE = 0.85
"""Similarity from which names with the same first letter and about the same length are spellings of one."""

IMAGE_PAIRS = re.compile(r"(chosen|rejected)_(image|img)|(image|img|jpg|png)_?([0-9]|w|l|win|lose|winner|loser|a|b)")
"""Columns of datasets of preferences between two images, under other names too."""


def check_column_names(columns: Collection[str], features: Mapping[str, Any] | None, name: str) -> None:
    """Raise if columns belong to a format that is not supported, or are misspelled and would have no effect.

    Args:
        columns: Names of the columns.
        features: Features of the dataset; None where a stream does not say.
        name: Name of the dataset in messages.

    Raises:
        ValueError: If the rows are conversations, or preferences between images or texts that are labelled right or
            wrong one by one under other names, or if a column has a name that is nearly that of a column in use.
    """
    other_kinds = has_kinds(columns, features)
    if not other_kinds and (remedy := _other_format(set(columns), features or {})):
        raise ValueError(f"{name} has the columns {sorted(columns)}. {remedy}")
    wanted: Collection[str] | None = FEEDBACK if other_kinds else None
    if not other_kinds and {"image", "chosen"} <= set(columns):
        wanted = TEXTS
    elif not other_kinds and {"image", "label"} <= set(columns):
        wanted = CLASSES
    for column in columns:
        known = None if column in {*TEXTS, *CLASSES, *FEEDBACK} else meant(column, wanted or (*TEXTS, *CLASSES))
        if known is not None and known not in columns:
            raise ValueError(
                f"{name} has a column {column!r}, which nothing reads: the column must be called {known!r}. Rename it "
                f"with dataset.rename_column({column!r}, {known!r}), or drop it with "
                f"dataset.remove_columns({column!r})."
            )


def _other_format(columns: set[str], kinds: Mapping[str, Any]) -> str | None:
    """Return how to convert rows of a format that is not supported; None if they are of no such format."""
    chosen = kinds.get("chosen")
    of_pairs = [column for column in columns if IMAGE_PAIRS.fullmatch(column)]
    if isinstance(chosen, Image) or (len(of_pairs) > 1 and not {"image", "chosen"} <= columns):
        return (
            "A preference between images has the columns text, chosen_image and rejected_image, or those of "
            "Pick-a-Pic: caption, jpg_0, jpg_1, label_0 and label_1. Rename its columns with "
            "dataset.rename_column(old, new)."
        )
    if isinstance(chosen, (list, dict)) or (isinstance(chosen, List) and not isinstance(chosen.feature, Value)):
        return (
            "Its column chosen holds messages of a conversation, but CLIP reads one text. Keep the text of the "
            "answer: dataset.map(lambda row: {c: row[c][-1]['content'] for c in ('chosen', 'rejected')})."
        )
    if "images" in columns and "image" not in columns:
        return (
            "Its column images holds a list for each row, but a preference here has one image. Keep the first: "
            "dataset.map(lambda row: {'image': row['images'][0]}, remove_columns='images')."
        )
    label = kinds.get("label")
    unpaired = isinstance(label, Value) and label.dtype == "bool" and "chosen" not in columns
    if unpaired or {"completion", "label"} <= columns:
        return (
            "Its rows are unpaired: each holds one text and whether it is right. Unpaired feedback has the columns "
            "image, text and label (True or False). Rename its columns with dataset.rename_column(old, new)."
        )
    return None


def meant(column: str, wanted: Collection[str]) -> str | None:
    """Return the column that a name is a spelling of.

    Args:
        column: The name.
        wanted: Names of columns.

    Returns:
        One of `wanted`, the name itself or what it is a misspelling of; None if there is none.
    """
    plain = _plain(column)
    if (other := OTHER_NAMES.get(plain)) in wanted:
        return other
    return next((known for known in wanted if plain and _misspelled(plain, _plain(known))), None)


def _misspelled(plain: str, known: str) -> bool:
    """Return whether a name is "rejeted" for "rejected" or "wieght" for "weight", but not "height" for "weight"."""
    close = plain[0] == known[0] and abs(len(plain) - len(known)) <= 1
    return sorted(plain) == sorted(known) or (close and difflib.SequenceMatcher(None, plain, known).ratio() >= ALIKE)


def _plain(column: str) -> str:
    """Return a name in lower case, without separators and the plural."""
    return re.sub(r"[^a-z0-9]", "", column.casefold()).removesuffix("s")
