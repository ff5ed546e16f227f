"""Images as a dataset stores them: read one at a time, and told apart without decoding."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Image, List, Value
from PIL import Image as Pillow

from clip_po.data.images import to_rgb
from clip_po.validation import unreadable_image


def image_feature(feature: Any) -> Image | None:
    """Return how a column stores images.

    Args:
        feature: Feature of a column of images, of lists of images, or of the bytes of files.

    Returns:
        The feature of one image, which decodes; None if the column holds anything else.
    """
    if isinstance(feature, List):
        return image_feature(feature.feature)
    if isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"):
        return Image()
    return dataclasses.replace(feature, decode=True) if isinstance(feature, Image) else None


def decode_stored(value: Any, feature: Image, column: str, where: str) -> Pillow.Image:
    """Read an image.

    Args:
        value: The bytes of a file, a mapping with `bytes` and `path`, or a PIL image; None if there is none.
        feature: How the column stores images.
        column: Name of the column in messages.
        where: The row in messages, such as "train_dataset row 3".

    Returns:
        RGB image.

    Raises:
        UnreadableImage: If there is no image, or it can't be read or converted.
    """
    try:
        if value is None:
            raise ValueError("there is none")
        if isinstance(value, bytes):
            value = {"bytes": value, "path": None}
        return to_rgb(value if isinstance(value, Pillow.Image) else feature.decode_example(value))
    except Exception as error:  # decoders of broken files raise anything from OSError to SyntaxError
        path = value.get("path") if isinstance(value, Mapping) else None
        raise unreadable_image(error, repr(column), where, path) from error


def stored_bytes(value: Any) -> bytes:
    """Return the bytes of a stored image.

    Args:
        value: As for `decode_stored`, but no PIL image.

    Returns:
        The bytes of the file; none if there is no image.

    Raises:
        OSError: If the file can't be read.
    """
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return value["bytes"]
        return Path(value["path"]).read_bytes() if value.get("path") else b""
    return value or b""


def image_identity(value: Any) -> int:
    """Return a number that is the same for two images if they are stored as the same bytes or the same path.

    Args:
        value: As for `stored_bytes`, or a PIL image, whose pixels count. A file is not read.

    Returns:
        A number of 63 bits.
    """
    stored = value.tobytes() if isinstance(value, Pillow.Image) else value
    if isinstance(value, Mapping):
        stored = value["bytes"] if value.get("bytes") is not None else str(value.get("path")).encode()
    return int.from_bytes(hashlib.blake2b(stored or b"", digest_size=8).digest(), "big") >> 1
