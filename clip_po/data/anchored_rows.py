"""Rows anchored at an image or at a text: preferences between texts or images, and unpaired feedback."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image

from clip_po.candidates import CandidateTexts
from clip_po.data.anchored_checks import check_anchored_row, check_image_columns, check_ties
from clip_po.data.column_names import check_column_names
from clip_po.data.embedding_cache import fingerprint
from clip_po.data.formats import DECODING_ERRORS, Row, as_list, to_texts
from clip_po.data.grades import GRADES
from clip_po.data.images import blank_image, check_index, is_transformed, unformatted
from clip_po.data.row_kinds import IMAGE_PAIR, PAIR_IMAGES, PICK_A_PIC, TIE, UNPAIRED_TEXT, Kind, kind_of, standard_row
from clip_po.data.stored_images import decode_stored, image_feature, image_identity, stored_bytes
from clip_po.validation import unreadable_image

COLUMNS = frozenset(
    {*IMAGE_PAIR, *UNPAIRED_TEXT, *PICK_A_PIC, *GRADES}
    | {"clean_image", "chosen", "rejected", "rejected_label", "candidates", "weight"}
)
"""All columns that are read."""

IMAGES = frozenset({"image", "clean_image", *PAIR_IMAGES})
"""Those of them that hold images."""

ROWS_AT_ONCE = 100


class AnchoredRows:
    """Rows of a `datasets.Dataset` whose kind is told row by row: see `clip_po.data.row_kinds`.

    Beside the columns of the row protocol, a row of unpaired feedback has `desirable` (1 for a right text, which is
    its `chosen` one, 0 for a wrong one, -1 in rows of other kinds). A row of two or more images has, in the place of
    `image`, `chosen` and `rejected`, its `text`, its `images`, the chosen one first, and their number `image_count`.
    `image_ids` tells images apart.

    Args:
        dataset: The rows. Its format, such as "torch", does not apply.
        candidate_texts: The candidate texts of every row, if any.
        name: Name of the dataset in messages.
    """

    redrawn = False

    def __init__(self, dataset: Dataset, candidate_texts: CandidateTexts, name: str) -> None:
        self.candidate_texts = candidate_texts
        self.name = name
        self._names = dataset.column_names
        used = [column for column in dataset.column_names if column in COLUMNS]
        self.dataset = dataset if is_transformed(dataset) else dataset.select_columns(used)
        self._features = {column: image_feature(dataset.features.get(column)) for column in used if column in IMAGES}
        self._stored = dataset.select_columns(used).with_format("arrow")  # images as they are stored
        without_images = [column for column in used if column not in IMAGES]
        self._values = [
            standard_row(row) for row in dataset.select_columns(without_images).with_format(None).to_list()
        ]
        self.kinds: list[Kind] = [kind_of(row) for row in self._values]
        rejected = _rejected_images(self._stored)
        counts = [1 + rejected[index] if kind == "images" else 1 for index, kind in enumerate(self.kinds)]
        self._starts = [0, *itertools.accumulate(counts)]
        without_clean = {"clean_image"} if "images" in self.kinds else set()
        self._columns = [column for column in used if column not in without_clean]

    @property
    def column_names(self) -> Sequence[str]:
        """The columns of the dataset, without `clean_image` if rows of two images have none."""
        return self._columns

    @property
    def transformed(self) -> bool:
        """Whether a transform of the user, which may be random, changes rows as they are read."""
        return is_transformed(self.dataset)

    @property
    def image_count(self) -> int:
        """The number of images of all rows, without clean images."""
        return self._starts[-1]

    @property
    def has_candidates(self) -> bool:
        """Whether every row of unpaired feedback has `candidates`."""
        return all(
            "candidates" in row for row, kind in zip(self._values, self.kinds, strict=True) if kind == "unpaired"
        )

    @property
    def label_counts(self) -> tuple[int, int]:
        """The numbers of right and of wrong texts of unpaired feedback."""
        labels = [row["label"] for row, kind in zip(self._values, self.kinds, strict=True) if kind == "unpaired"]
        return labels.count(True), labels.count(False)

    def __len__(self) -> int:
        return len(self._values)

    def images_of(self, index: int) -> range:
        """Return the numbers of the images of a row among those of all rows.

        Args:
            index: Number of the row.

        Returns:
            The numbers, which `image` takes; that of the chosen image first.
        """
        return range(self._starts[index], self._starts[index + 1])

    # ---- Rows

    def row(self, index: int, epoch: int) -> Row:
        """Return a row with its images decoded.

        Args:
            index: Number of the row.
            epoch: Not used: rows are the same in every epoch, except for a transform of the user.

        Returns:
            The row; `image` or `images`, and `clean_image`, are RGB.

        Raises:
            UnreadableImage: If an image is missing or can't be read; the message names row and column.
        """
        values, where = self._read(index), f"{self.name} row {index}"
        row = self.texts(index, epoch)
        if self.kinds[index] == "images":
            row["images"] = [self._decoded(column, value, where) for column, value in _pair_images(values)]
            return row
        row["image"] = self._decoded("image", values.get("image"), where)
        if "clean_image" in self.column_names:
            row["clean_image"] = self._decoded("clean_image", values.get("clean_image"), where)
        return row

    def texts(self, index: int, epoch: int) -> Row:
        """Return a row without its images, which are not decoded.

        Args:
            index: Number of the row.
            epoch: Not used: texts are the same in every epoch.

        Returns:
            A new dict with the columns of `row` except `image`, `images` and `clean_image`.
        """
        kind = self.kinds[index]
        images = stored_images(self._row_as_stored(index), kind)
        return anchored_row(self._values[index], kind, [value for _, value in images], self.candidate_texts)

    def blank(self, index: int, epoch: int) -> Row:
        """Return a row with blank images in the place of its own.

        Args:
            index: Number of the row.
            epoch: Not used.

        Returns:
            The row.
        """
        row = self.texts(index, epoch)
        if self.kinds[index] == "images":
            return {**row, "images": [blank_image()] * row["image_count"]}
        clean = {"clean_image": blank_image()} if "clean_image" in self.column_names else {}
        return {**row, "image": blank_image(), **clean}

    def image(self, name: str, index: int) -> Image.Image:
        """Return one image of a row. The others are not decoded.

        Args:
            name: "image" or "clean_image".
            index: Number of the row of a clean image; otherwise the number of the image, as from `images_of`.

        Returns:
            RGB image.

        Raises:
            UnreadableImage: If it is missing or can't be read; the message names row and column.
        """
        if name == "clean_image":
            return self._decoded(name, self._row_as_stored(index).get(name), f"{self.name} row {index}")
        row = self._row_of(index)
        column, value = stored_images(self._row_as_stored(row), self.kinds[row])[index - self._starts[row]]
        return self._decoded(column, value, f"{self.name} row {row}")

    def digest(self, name: str) -> str:
        """Return a digest of the images of a name as they are stored.

        Args:
            name: "image" or "clean_image".

        Returns:
            The digest. A transform of the user has no effect on it.

        Raises:
            UnreadableImage: If a file can't be read; the message names the row.
        """
        parts = [repr(self._features)]
        for index, kind in enumerate(self.kinds):
            stored = self._row_as_stored(index)
            images = [(name, stored.get(name))] if name == "clean_image" else stored_images(stored, kind)
            for column, value in images:
                try:
                    parts.append(fingerprint(stored_bytes(value).hex()))
                except OSError as error:
                    raise unreadable_image(error, repr(column), f"{self.name} row {index}") from error
        return fingerprint(*parts)

    def check(self, candidate_texts: CandidateTexts, loss_types: Collection[str], name: str) -> None:
        """Raise if columns, texts, labels or weights of the rows can't be used.

        Args:
            candidate_texts: The candidate texts of every row, if any.
            loss_types: Names of the losses.
            name: Name of the dataset in messages.

        Raises:
            ValueError: If they can't; the message names row and column.
            TypeError: If an entry of a row's `candidates` is not a string, or a grade is not a number.
        """
        check_column_names(self._names, self.dataset.features, name)
        check_image_columns(self.dataset.features, [] if self.transformed else list(self._features), name)
        check_ties(sum(row.get("label_smoothing") == TIE for row in self._values), self._names, loss_types, name)
        cut = 0
        for index, (row, kind) in enumerate(zip(self._values, self.kinds, strict=True)):
            images = len(self.images_of(index))
            cut += check_anchored_row(row, kind, images, candidate_texts, loss_types, f"{name} row {index}")
        if candidate_texts.tokens is not None:
            candidate_texts.tokens.warn_of_cut(cut, name)

    # ---- Reading

    def _row_as_stored(self, index: int) -> Row:
        check_index(self._stored, index, self.name)
        stored: pa.Table = self._stored[index : index + 1]
        return standard_row(cast(list[dict[str, Any]], stored.to_pylist())[0])

    def _read(self, index: int) -> Row:
        """Return a row as it is stored, or as a transform of the user returns it."""
        if not self.transformed:
            return self._row_as_stored(index)
        check_index(self.dataset, index, self.name)
        try:
            return standard_row(unformatted(self.dataset)[index])
        except DECODING_ERRORS as error:
            raise unreadable_image(
                error, " or ".join(map(repr, self._features)), f"{self.name} row {index}"
            ) from error

    def _row_of(self, image: int) -> int:
        return bisect.bisect_right(self._starts, image) - 1

    def _decoded(self, column: str, value: Any, where: str) -> Image.Image:
        return decode_stored(value, self._features.get(column) or ImageFeature(), column, where)


def anchored_row(values: Mapping[str, Any], kind: Kind, stored: Sequence[Any], candidate_texts: CandidateTexts) -> Row:
    """Return a row without its images.

    Args:
        values: The values that it fills, without images.
        kind: Its kind.
        stored: Its images as they are stored, without a clean image.
        candidate_texts: The candidate texts of every row, if any.

    Returns:
        A new dict, as `AnchoredRows.texts` returns it.
    """
    row = dict(values)
    if kind == "images":
        row["image_count"] = len(stored)
    elif kind == "unpaired":
        row |= {"chosen": row.pop("text"), "rejected": []}
    else:
        row = to_texts(row, candidate_texts.texts)
    row["desirable"] = int(row.pop("label")) if kind == "unpaired" else -1
    return {**row, "image_ids": [image_identity(value) for value in stored]}


def stored_images(values: Mapping[str, Any], kind: Kind) -> list[tuple[str, Any]]:
    """Return the images of a row, without a clean image, as they are stored.

    Args:
        values: The values that it fills.
        kind: Its kind.

    Returns:
        Column and image; of a row of images, the chosen one first.
    """
    return _pair_images(values) if kind == "images" else [("image", values.get("image"))]


def _pair_images(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the images of a row of the kind "images" with their columns, the chosen one first."""
    rejected = as_list(values.get("rejected_image")) or [None]
    return [("chosen_image", values.get("chosen_image")), *(("rejected_image", image) for image in rejected)]


def _rejected_images(stored: Dataset) -> list[int]:
    """Return the number of rejected images of each row, as if all rows were of the kind "images"."""
    if not isinstance(stored.features.get("rejected_image"), List):
        return [1] * len(stored)
    column, counts = stored.select_columns(["rejected_image"]), list[int]()
    for start in range(0, len(column), ROWS_AT_ONCE):  # shuffled rows are copied, with the bytes of their images
        lists = column[start : start + ROWS_AT_ONCE]["rejected_image"]
        counts += pc.fill_null(pc.list_value_length(lists), 0).to_pylist()
    return counts
