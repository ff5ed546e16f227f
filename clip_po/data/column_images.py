"""The images of several columns of a dataset, one by one. A column may hold an image or a list of images."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow.compute as pc
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image

from clip_po.data.images import read_image, read_images
from clip_po.data.stored_images import decode_stored
from clip_po.validation import check_column

Place = tuple[str, int, int]
"""Column, row, and position in the list, which is 0 for a single image."""

_ROWS_AT_ONCE = 1000


def is_list(dataset: Dataset, column: str) -> bool:
    """Return whether a column holds lists of images."""
    feature = dataset.features[column]
    return isinstance(feature, List) and isinstance(feature.feature, ImageFeature)


def image_counts(dataset: Dataset, column: str) -> list[int]:
    """Return the number of images in each row of a column, without reading them.

    Args:
        dataset: One split.
        column: A column of images or of lists of images.

    Returns:
        1 for each row of a column of images; 0 for a list that is missing.

    Raises:
        ValueError: If the column is missing.
    """
    check_column(dataset, column, "column")
    if not is_list(dataset, column):
        return [1] * len(dataset)
    tables = dataset.with_format("arrow").select_columns([column]).iter(batch_size=_ROWS_AT_ONCE)
    return [count or 0 for table in tables for count in pc.list_value_length(table[column]).to_pylist()]


class ColumnImages:
    """Images of several columns, which are read when they are asked for.

    Args:
        dataset: One split.
        places: Where the images are.

    Raises:
        ValueError: If a column is missing, or holds neither images nor lists of images.
        TypeError: If `dataset` is not a single split.
    """

    def __init__(self, dataset: Dataset, places: Sequence[Place]) -> None:
        self.places = places
        self._columns: dict[str, Dataset] = {}
        for column in dict.fromkeys(column for column, _, _ in places):
            rows = read_images(dataset, column)
            if is_list(dataset, column):
                rows = rows.cast_column(column, List(ImageFeature(decode=False)))
            elif not isinstance(dataset.features[column], ImageFeature):
                raise ValueError(
                    f"Column {column!r} is {dataset.features[column]}, expected images or lists of images. Cast it: "
                    f"dataset.cast_column({column!r}, datasets.Image())."
                )
            self._columns[column] = rows

    def __len__(self) -> int:
        return len(self.places)

    def read(self, number: int) -> Image.Image:
        """Read an image.

        Args:
            number: Its position in `places`.

        Returns:
            RGB image; transparent pixels are white, as in `to_rgb`.

        Raises:
            UnreadableImage: As for `read_image`.
        """
        column, row, position = self.places[number]
        rows = self._columns[column]
        if not isinstance(rows.features[column], List):
            return read_image(rows, column, row)
        return decode_stored(rows[row][column][position], ImageFeature(), column, f"Row {row}")
