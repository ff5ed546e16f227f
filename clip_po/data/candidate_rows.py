"""Rows to score: images and texts, one of them the anchor and the others its candidates."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Image as ImageFeature
from PIL import Image

from clip_po.data.formats import as_list
from clip_po.data.image_folder import find_images
from clip_po.data.images import to_rgb
from clip_po.data.path_safety import check_links, check_resolved
from clip_po.data.row_files import parse_list, read_rows
from clip_po.validation import UnreadableImage, unreadable_image


@dataclass(frozen=True)
class CandidateRow:
    """One image with candidate texts, or one text with candidate images.

    Attributes:
        number: Number of the row in its table or folder.
        images: Images as stored: paths relative to `folder`, bytes of files, or mappings with `bytes` and `path`.
        texts: Texts.
        folder: Folder of the table, to which paths are relative.
    """

    number: int
    images: Sequence[Any]
    texts: Sequence[str]
    folder: Path

    @property
    def image_names(self) -> list[str]:
        """A name of each image: its path, or its position in the row if it has none."""
        return [image_name(image) or f"image {position}" for position, image in enumerate(self.images)]

    def read_image(self, position: int) -> Image.Image:
        """Read an image.

        Args:
            position: Its position in the row.

        Returns:
            RGB image.

        Raises:
            UnreadableImage: As for `read_stored_image`.
        """
        return read_stored_image(self.images[position], self.folder, f"Row {self.number}")


def image_name(image: Any) -> str | None:
    """Return the path of a stored image, None if it has none."""
    path = image.get("path") if isinstance(image, Mapping) else image
    return path if isinstance(path, str) else None


def read_stored_image(image: Any, folder: Path, where: str) -> Image.Image:
    """Read an image as tables store it.

    Args:
        image: A path, the bytes of a file, or a mapping with `bytes` and `path`.
        folder: Folder to which a path is relative, and in which the file must be.
        where: The row in messages, such as "Row 3".

    Returns:
        RGB image; transparent pixels are white, as in `to_rgb`.

    Raises:
        UnreadableImage: If there is no image, it can't be read or converted, or its path leads out of the folder.
    """
    stored = image.get("bytes") or image.get("path") if isinstance(image, Mapping) else image
    if not isinstance(stored, (str, bytes)):
        raise UnreadableImage(f"{where}: {stored!r} is no image. Give the path or the bytes of a file.")
    try:
        if isinstance(stored, bytes):
            file: dict[str, Any] = {"bytes": stored, "path": None}
        else:
            path = os.path.join(folder, stored)
            check_resolved([path, *([os.path.realpath(path)] if os.path.islink(path) else [])], [folder], where)
            file = {"bytes": None, "path": path}
        return to_rgb(ImageFeature().decode_example(file))  # turned as its EXIF data say, as in a dataset
    except Exception as error:  # decoders of broken files raise anything from OSError to SyntaxError
        raise unreadable_image(error, "'image'", where, image_name(image)) from error


def folder_rows(folder: Path, texts: Sequence[str]) -> Iterator[CandidateRow]:
    """Return the images of a folder as rows, sorted by path.

    Args:
        folder: The folder. Its subfolders are searched too.
        texts: The texts of every row.

    Yields:
        A row for each image, whose path is relative to the folder.

    Raises:
        ValueError: If the folder has no images, or holds links that lead out of it.
    """
    check_links(folder)
    files = find_images(folder)
    if not files:
        raise ValueError(f"The folder {str(folder)!r} has no images. Give a folder of images, or a table.")
    for number, file in enumerate(files):
        yield CandidateRow(number, [str(file.relative_to(folder))], texts, folder)


def table_rows(
    file: Path, image_column: str, text_column: str, texts: Sequence[str] | None = None
) -> Iterator[CandidateRow]:
    """Read the rows of a table.

    Args:
        file: As for `read_rows`.
        image_column: Column of an image or a list of images. In CSV and TSV, a list is written in JSON.
        text_column: Column of a text or a list of texts, likewise.
        texts: The texts of every row; None for those of the column.

    Yields:
        The rows. A row without images or texts has an empty list of them.

    Raises:
        ValueError: If the table has no such column, or as for `read_rows`.
    """
    wanted = [image_column, *([text_column] if texts is None else [])]
    for number, row in enumerate(read_rows(file)):
        if number == 0 and (missing := [column for column in wanted if column not in row]):
            raise ValueError(
                f"{str(file)!r} has no column {missing[0]!r}; its columns are {list(row)}. Name the columns with "
                "--image_column and --text_column, or give the texts with --text or --texts."
            )
        own = as_list(parse_list(row.get(text_column))) if texts is None else texts
        yield CandidateRow(number, as_list(parse_list(row.get(image_column))), own, file.parent)
