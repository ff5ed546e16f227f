"""The row protocol: what the trainer needs of preferences, and its adapter for a `datasets.Dataset`."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable

from datasets import Dataset
from PIL import Image

from clip_po.candidates import CandidateTexts
from clip_po.data.embedding_cache import image_digest
from clip_po.data.formats import IMAGE_COLUMNS, Row, check_preferences, read_row, to_texts


@runtime_checkable
class PreferenceRows(Protocol):
    """Numbered preferences. Whatever implements this protocol can be given to the trainer.

    A row holds `image`, `chosen` (a text), `rejected` (a list of texts) and optionally `clean_image`, `candidates` and
    `weight`, as an image-preference of `clip_po.data.formats`.
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
        """Return a row of an epoch. Raise `UnreadableImage` if one of its images can't be read."""

    def texts(self, index: int, epoch: int) -> Row:
        """Return a row of an epoch without its images, which are not read."""

    def image(self, name: str, index: int) -> Image.Image:
        """Return one image of a row of epoch 0. Raise `UnreadableImage` if it can't be read."""

    def digest(self, name: str) -> str | None:
        """Return a digest of all images of a column in epoch 0, for the embedding cache; None for no caching."""

    def check(self, candidate_texts: CandidateTexts, loss_types: Collection[str], name: str) -> None:
        """Raise if the texts of the rows don't suit the losses or the candidate texts."""


class DatasetRows:
    """Rows of a `datasets.Dataset` in a preference format.

    Args:
        dataset: Image-preferences or class-preferences.
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
        """Return a row, which is the same in every epoch."""
        return to_texts(read_row(self.dataset, index, self.name), self.candidate_texts.texts)

    def texts(self, index: int, epoch: int) -> Row:
        """Return a row without its images."""
        return to_texts(dict(self._texts[index]), self.candidate_texts.texts)

    @functools.cached_property
    def _texts(self) -> list[Row]:
        columns = [column for column in self.dataset.column_names if column not in IMAGE_COLUMNS]
        return self.dataset.select_columns(columns).to_list()

    def image(self, name: str, index: int) -> Image.Image:
        """Return one image of a row. The other one is not decoded."""
        if name not in self._columns:
            self._columns[name] = self.dataset.select_columns([name])
        return read_row(self._columns[name], index, self.name)[name]

    def digest(self, name: str) -> str:
        """Return a digest of the images of a column as they are stored."""
        return image_digest(self.dataset, name)

    def check(self, candidate_texts: CandidateTexts, loss_types: Collection[str], name: str) -> None:
        """Raise if columns, texts, labels or weights of the rows can't be used; see `check_preferences`."""
        check_preferences(self.dataset, candidate_texts.texts, loss_types, name)


def as_rows(preferences: Any, candidate_texts: CandidateTexts, name: str) -> PreferenceRows:
    """Return preferences of any kind as rows.

    Args:
        preferences: A `datasets.Dataset` in a preference format, or an implementation of `PreferenceRows`.
        candidate_texts: The candidate texts of every row, if any.
        name: Name of the preferences in messages.

    Raises:
        TypeError: If `preferences` is neither.
    """
    if isinstance(preferences, Dataset):
        return DatasetRows(preferences, candidate_texts, name)
    if isinstance(preferences, PreferenceRows):
        return preferences
    raise TypeError(
        f"{name} must be a datasets.Dataset or TypographicPreferences, got {type(preferences).__name__}. "
        "Convert a list of dicts with Dataset.from_list(rows)."
    )


def is_transformed(dataset: Dataset) -> bool:
    """Return whether a transform of the user, which may be random, changes the rows as they are read."""
    return dataset.format["type"] == "custom"
