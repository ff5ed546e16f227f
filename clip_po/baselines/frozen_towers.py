"""What methods with frozen towers share: images are encoded once, and batches of rows are drawn without end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets.utils import tqdm
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from clip_po.data.images import to_pixels
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.encoding import encode_images, evaluating

_ENCODING_BATCH = 64


def encode_rows(
    encoder: PreTrainedModel,
    processor: Any,
    image_of: Callable[[int], Image.Image],
    rows: int,
    title: str,
    disable_tqdm: bool = False,
) -> Tensor:
    """Encode one image per row, in evaluation mode and without gradients.

    Args:
        encoder: The model.
        processor: Its processor.
        image_of: Function that returns the image of a row.
        rows: N, the number of rows.
        title: Label of the progress bar.
        disable_tqdm: Whether to hide the progress bar.

    Returns:
        Tensor[N, D], unit-norm, on the device of the model.
    """
    embeds = []
    with evaluating(encoder):
        for start in tqdm(range(0, rows, _ENCODING_BATCH), desc=title, disable=disable_tqdm):
            images = [image_of(row) for row in range(start, min(start + _ENCODING_BATCH, rows))]
            embeds.append(encode_images(encoder, to_pixels(processor, images).to(encoder.device, encoder.dtype)))
    return torch.cat(embeds)


def encode_drawings(
    encoder: PreTrainedModel,
    processor: Any,
    preferences: TypographicPreferences,
    drawings: int,
    disable_tqdm: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Encode the clean images of typographic preferences, and the images as drawn in the first epochs.

    Args:
        encoder: The model.
        processor: Its processor.
        preferences: N labelled images with a typographic attack.
        drawings: Number of epochs.
        disable_tqdm: Whether to hide progress bars.

    Returns:
        Tensor[N, D] of the clean images, and one Tensor[N, D] per epoch, unit-norm.
    """

    def drawn(epoch: int) -> Tensor:
        title = f"Typographic images, drawing {epoch + 1}"
        return encode_rows(
            encoder, processor, lambda row: preferences.row(row, epoch)["image"], rows, title, disable_tqdm
        )

    rows = len(preferences)
    clean = encode_rows(
        encoder, processor, lambda row: preferences.image("clean_image", row), rows, "Clean images", disable_tqdm
    )
    return clean, [drawn(epoch) for epoch in range(drawings)]


def epoch_batches(rows: int, batch_size: int, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """Draw one batch of rows after another, without end, in a new order in each epoch.

    Args:
        rows: Number of rows.
        batch_size: Largest size of a batch. The last one of an epoch may be smaller.
        generator: Draws the order.

    Yields:
        Epoch, counted from 0, and the rows of a batch, Tensor[B].
    """
    for epoch in itertools.count():
        for batch in torch.randperm(rows, generator=generator).split(batch_size):
            yield epoch, batch
