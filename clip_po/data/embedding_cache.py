"""What is computed once stays on disk: embeddings, by a fingerprint of all that they were computed from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset, Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ProcessorMixin
from transformers.utils import logging

from clip_po.validation import check_writable

logger = logging.get_logger(__name__)

_NAME = "embeds"


def fingerprint(*parts: str) -> str:
    """One name for several digests, in their order."""
    return _digest(part.encode() + b"\0" for part in parts)


def model_digest(model: nn.Module) -> str:
    """A digest of a module's parameters and buffers: names, types, shapes and every bit.

    Args:
        model: The part whose change changes what is cached, such as `model.vision_model`.
    """

    def parts() -> Iterable[bytes]:
        for name, value in sorted(model.state_dict().items()):
            yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return _digest(parts())


def processor_digest(processor: ProcessorMixin) -> str:
    """A digest of how a processor makes pixels: the image processor's class and its settings."""
    images = processor.image_processor
    return _digest([type(images).__name__.encode(), images.to_json_string().encode()])


def image_digest(dataset: Dataset, column: str) -> str:
    """A digest of the images of a column as they lie on disk, without decoding them.

    Args:
        dataset: The rows; files that they name are read.
        column: Column of `datasets.Image`.

    Raises:
        ValueError: A file can't be read; the message names the row.
    """

    def parts() -> Iterable[bytes]:
        stored = dataset.with_format(None).select_columns([column]).cast_column(column, Image(decode=False))
        for index, row in enumerate(stored):
            image = row[column] or {}
            data = image.get("bytes")
            if data is None and image.get("path"):
                try:
                    data = Path(image["path"]).read_bytes()
                except OSError as error:
                    raise ValueError(
                        f"Row {index}: the image in column {column!r} can't be read ({error}). Mend the file, or "
                        "filter the row out."
                    ) from error
            yield hashlib.sha256(data or b"").digest()

    return _digest(parts())


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


class EmbeddingCache:
    """Embeddings in a folder, each set in a safetensors file named by its fingerprint.

    A file appears whole or not at all; one that can't be read, or holds anything but so many embeddings of finite
    numbers, counts as absent and is written anew.

    Args:
        folder: Made where it is missing.

    Raises:
        OSError: The folder can't be written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        check_writable(folder, "embeddings_cache")
        self.folder = Path(folder)

    def get(self, name: str, rows: int, dim: int | None = None) -> Tensor | None:
        """The embeddings of a fingerprint, as they were put there.

        Args:
            name: The fingerprint.
            rows: How many there must be.
            dim: D, how many numbers each must have; any where it is None.

        Returns:
            Tensor[rows, D]; None where there are none such.
        """
        file = self.folder / f"{name}.safetensors"
        try:
            embeds = load_file(file)[_NAME]
        except (OSError, SafetensorError, KeyError):
            return None
        right = embeds.ndim == 2 and len(embeds) == rows and dim in (None, embeds.shape[1])
        return embeds if right and bool(embeds.isfinite().all()) else None

    def put(self, name: str, embeds: Tensor) -> None:
        """Keep embeddings, Tensor[N, D], under a fingerprint.

        Where the disk is full there is a warning and nothing is kept: they are at hand, and a run can go on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}.safetensors"
        partial = file.with_name(f".{name}.{os.getpid()}.partial")
        try:
            save_file({_NAME: embeds.contiguous()}, partial)
            os.replace(partial, file)
        except (OSError, SafetensorError) as error:
            logger.warning(
                f"The embeddings of {len(embeds)} images could not be kept in {str(self.folder)!r} ({error}): another "
                "run will compute them again. Free some space there."
            )
        finally:
            partial.unlink(missing_ok=True)
