"""Embeddings cached on disk, by a fingerprint of everything they were computed from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import PIL
import torch
from datasets import Dataset, Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ProcessorMixin
from transformers.utils import logging

from clip_po.atomic_write import atomic_write
from clip_po.validation import check_writable, unreadable_image

logger = logging.get_logger(__name__)

_NAME = "embeds"


def fingerprint(*parts: str) -> str:
    """Return one digest of several texts.

    Args:
        *parts: Digests or other texts. Their order matters.

    Returns:
        SHA-256 as 64 hexadecimal digits.
    """
    return _digest(part.encode() + b"\0" for part in parts)


def model_digest(model: nn.Module) -> str:
    """Return a digest of a module's `state_dict`: names, types, shapes and every bit of parameters and buffers.

    Args:
        model: The part that the cached embeddings depend on, such as `model.vision_model`. Its configuration is not
            part of the digest.

    Returns:
        SHA-256 as 64 hexadecimal digits, the same on any device.
    """

    def parts() -> Iterable[bytes]:
        for name, value in sorted(model.state_dict().items()):
            yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return _digest(parts())


def processor_digest(processor: ProcessorMixin) -> str:
    """Return a digest of how a processor makes pixel values.

    Args:
        processor: Only the class and the settings of its image processor count.

    Returns:
        SHA-256 as 64 hexadecimal digits.
    """
    images = processor.image_processor
    return _digest([type(images).__name__.encode(), images.to_json_string().encode()])


def image_digest(dataset: Dataset, column: str) -> str:
    """Return a digest of the images of a column as they are stored and how they are decoded, without decoding them.

    Args:
        dataset: The rows; the files that they name are read.
        column: Column of `datasets.Image`. Its feature says how files become pixels, such as `Image(mode="L")`.

    Returns:
        SHA-256 as 64 hexadecimal digits. It depends on the order of the rows and the bytes of the files, but not on
        their paths. A row without an image counts as an empty file.

    Raises:
        UnreadableImage: If a file can't be read; the message names the row.
        ValueError: If the column is missing.
    """

    def parts() -> Iterable[bytes]:
        yield f"{dataset.features[column]!r} Pillow {PIL.__version__}".encode()
        stored = dataset.with_format(None).select_columns([column]).cast_column(column, Image(decode=False))
        for index, row in enumerate(stored):
            image = row[column] or {}
            data = image.get("bytes")
            if data is None and image.get("path"):
                try:
                    data = Path(image["path"]).read_bytes()
                except OSError as error:
                    raise unreadable_image(error, repr(column), f"Row {index}", image["path"]) from error
            yield hashlib.sha256(data or b"").digest()

    return _digest(parts())


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


class EmbeddingCache:
    """A folder of embeddings, one safetensors file for each fingerprint.

    A file is written whole or not at all. A file that can't be read, or does not hold the expected number of finite
    embeddings, counts as absent and is written again.

    Args:
        folder: The folder; created where it is missing.

    Raises:
        OSError: If the folder can't be written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        check_writable(folder, "embeddings_cache")
        self.folder = Path(folder)

    def get(self, name: str, rows: int, dim: int | None = None) -> Tensor | None:
        """Return the embeddings of a fingerprint.

        Args:
            name: The fingerprint.
            rows: Expected number of embeddings.
            dim: Expected dimension D; any by default.

        Returns:
            Tensor[rows, D]; None if there are no such embeddings.
        """
        file = self.folder / f"{name}.safetensors"
        try:
            embeds = load_file(file)[_NAME]
        except (OSError, SafetensorError, KeyError):
            return None
        right = embeds.ndim == 2 and len(embeds) == rows and dim in (None, embeds.shape[1])
        return embeds if right and bool(embeds.isfinite().all()) else None

    def put(self, name: str, embeds: Tensor) -> None:
        """Save embeddings under a fingerprint. On a full disk, log a warning and save nothing.

        Args:
            name: The fingerprint.
            embeds: Tensor[N, D].
        """
        try:
            with atomic_write(self.folder / f"{name}.safetensors") as partial:
                save_file({_NAME: embeds.contiguous()}, partial)
        except (OSError, SafetensorError) as error:
            logger.warning(
                f"The embeddings of {len(embeds)} images could not be saved in {str(self.folder)!r} ({error}). "
                "Another run will compute them again. Free some disk space."
            )
