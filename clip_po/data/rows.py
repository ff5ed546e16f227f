"""The row protocol: what the trainer needs of preferences, and its adapter for a `datasets.Dataset`."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable

from datasets import Dataset
from PIL import Image

from clip_po.candidates import CandidateTexts
from clip_po.data.anchored_rows import AnchoredRows
from clip_po.data.embedding_cache import image_digest
from clip_po.data.formats import IMAGE_COLUMNS, Row, check_preferences, read_row, to_texts
from clip_po.data.images import is_transformed
from clip_po.data.row_kinds import has_kinds
from clip_po.data.row_texts import check_row_texts
from clip_po.other_kinds import dataset_remedy


@runtime_checkable
class PreferenceRows(Protocol):
    """Numbered preferences. Whatever implements this protocol can be given to the trainer.

    A row holds `image`, `chosen` (a text), `rejected` (a list of texts) and optionally `clean_image`, `candidates` and
    `weight`, as an image-preference of `clip_po.data.formats`. `chosen` is None in a row without a label, which only
    the losses in `clip_po.losses.LABEL_FREE` read. Such a row has `candidates` or the trainer `candidate_texts`.
    """

    @property
    def column_names(self) -> Sequence[str]:
        """The columns of a row."""

    @property
    def redrawn(self) -> bool:
        """Whether the images in `image` differ from epoch to epoch."""

    @property
    def transformed(self) -> bool:
        """Whether any image may differ each time it is read."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def row(self, index: int, epoch: int) -> Row:
        """Return a row of an epoch.

        Args:
            index: Number of the row, 0..len-1.
            epoch: Epoch, counted from 0.

        Returns:
            A new dict with all columns; images are RGB.

        Raises:
            UnreadableImage: If one of its images can't be read.
        """

    def texts(self, index: int, epoch: int) -> Row:
        """Return a row of an epoch without its images, which are not read.

        Args:
            index: Number of the row.
            epoch: Epoch, counted from 0.

        Returns:
            A new dict with the columns of `row` except `image` and `clean_image`.
        """

    def image(self, name: str, index: int) -> Image.Image:
        """Return one image of a row of epoch 0.

        Args:
            name: "image" or "clean_image".
            index: Number of the row.

        Returns:
            RGB image.

        Raises:
            UnreadableImage: If it can't be read.
        """

    def digest(self, name: str) -> str | None:
        """Return a digest of all images of a column in epoch 0, for the embedding cache.

        Args:
            name: "image" or "clean_image".

        Returns:
            A text that changes whenever an image changes; None for no caching.

        Raises:
            UnreadableImage: If a file can't be read.
        """

    def check(self, candidate_texts: CandidateTexts, loss_types: Collection[str], name: str) -> None:
        """Raise if the texts of the rows don't suit the losses or the candidate texts.

        Args:
            candidate_texts: The candidate texts of every row, if any.
            loss_types: Names of the losses.
            name: Name of the preferences in messages.

        Raises:
            ValueError: If they don't.
        """


class DatasetRows:
    """Rows of a `datasets.Dataset` in a preference format.

    Args:
        dataset: Image-preferences or class-preferences. Its format, such as "torch", does not apply.
        candidate_texts: The candidate texts of every row, if any.
        name: Name of the dataset in messages.
    """

    redrawn = False

    def __init__(self, dataset: Dataset, candidate_texts: CandidateTexts, name: str) -> None:
        self.dataset = dataset
        self.candidate_texts = candidate_texts
        self.name = name
        self._columns: dict[str, Dataset] = {}

    @property
    def column_names(self) -> Sequence[str]:
        """The columns of the dataset."""
        return self.dataset.column_names

    @property
    def transformed(self) -> bool:
        """Whether a transform of the user, which may be random, changes rows as they are read."""
        return is_transformed(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int, epoch: int) -> Row:
        """Return a row with its images decoded.

        Args:
            index: Number of the row.
            epoch: Not used: rows are the same in every epoch, except for a transform of the user.

        Returns:
            The row as an image-preference, with all columns of the dataset; `image` and `clean_image` are RGB.

        Raises:
            UnreadableImage: If an image is missing or can't be read; the message names row and column.
        """
        return to_texts(read_row(self.dataset, index, self.name), self.candidate_texts.texts)

    def texts(self, index: int, epoch: int) -> Row:
        """Return a row without its images. A transform of the user does not apply.

        Args:
            index: Number of the row.
            epoch: Not used: texts are the same in every epoch.

        Returns:
            The row as an image-preference, without `image` and `clean_image`.
        """
        return to_texts(dict(self._texts[index]), self.candidate_texts.texts)

    @functools.cached_property
    def _texts(self) -> list[Row]:
        columns = [column for column in self.dataset.column_names if column not in IMAGE_COLUMNS]
        return self.dataset.select_columns(columns).to_list()

    def image(self, name: str, index: int) -> Image.Image:
        """Return one image of a row. The other one is not decoded.

        Args:
            name: "image" or "clean_image".
            index: Number of the row.

        Returns:
            RGB image.

        Raises:
            UnreadableImage: If it is missing or can't be read; the message names row and column.
            ValueError: If the dataset has no such column.
        """
        if name not in self._columns:
            self._columns[name] = self.dataset.select_columns([name])
        return read_row(self._columns[name], index, self.name)[name]

    def digest(self, name: str) -> str:
        """Return a digest of the images of a column as they are stored.

        Args:
            name: "image" or "clean_image".

        Returns:
            The `image_digest` of the column. A transform of the user has no effect on it.

        Raises:
            UnreadableImage: If a file can't be read; the message names the row.
            ValueError: If the dataset has no such column.
        """
        return image_digest(self.dataset, name)

    def check(self, candidate_texts: CandidateTexts, loss_types: Collection[str], name: str) -> None:
        """Raise if columns, texts, labels or weights of the rows can't be used; see `check_preferences`.

        Args:
            candidate_texts: The candidate texts of every row, if any.
            loss_types: Names of the losses.
            name: Name of the dataset in messages.

        Raises:
            ValueError: If they can't, or the dataset is empty; the message names row and column.
            TypeError: If an entry of a row's `candidates` is not a string.
        """
        check_preferences(self.dataset, candidate_texts.texts, loss_types, name)
        check_row_texts(self.dataset, candidate_texts, name)


def as_rows(preferences: Any, candidate_texts: CandidateTexts, name: str) -> PreferenceRows:
    """Return preferences of any kind as rows.

    Args:
        preferences: A `datasets.Dataset` in a preference format, or an implementation of `PreferenceRows`.
        candidate_texts: The candidate texts of every row, if any.
        name: Name of the preferences in messages.

    Returns:
        `AnchoredRows` of a dataset with rows of two images or unpaired feedback, `DatasetRows` of another one; an
        implementation of the protocol as it is.

    Raises:
        TypeError: If `preferences` is neither.
    """
    if isinstance(preferences, Dataset):
        anchored = has_kinds(preferences.column_names, preferences.features)
        return (AnchoredRows if anchored else DatasetRows)(preferences, candidate_texts, name)
    if isinstance(preferences, PreferenceRows):
        return preferences
    raise TypeError(
        f"{name} must be a datasets.Dataset or TypographicPreferences, got {type(preferences).__name__}. "
        f"{dataset_remedy(preferences, name)}"
    )
