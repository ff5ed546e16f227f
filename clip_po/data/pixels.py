"""Images to the numbers that a model reads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, ProcessorMixin

from clip_po.data.images import middle


def to_pixels(processor: ProcessorMixin, images: Sequence[Image.Image]) -> Tensor:
    """Images as the model reads them, the same bits as from the processor itself.

    Args:
        processor: The model's processor.
        images: At least one.

    Returns:
        Tensor[B, C, H, W].
    """
    maker = processor.image_processor
    side = _short_side(maker)
    if side is None or any(image.mode != "RGB" for image in images):
        return maker(list(images), return_tensors="pt")["pixel_values"]
    height, width = maker.crop_size["height"], maker.crop_size["width"]
    table = _table(
        *(maker.do_rescale, maker.rescale_factor, maker.do_normalize),
        *(tuple(np.broadcast_to(np.asarray(v, float), 3).tolist()) for v in (maker.image_mean, maker.image_std)),
    )
    pixels = np.empty((len(images), 3, height, width), table.dtype)
    for image, planes in zip(images, pixels, strict=True):
        read = np.asarray(middle(image, side, (width, height), maker.resample))
        for channel, plane in enumerate(planes):
            np.take(table[channel], read[..., channel], out=plane, mode="clip")  # "raise" would copy the result
    return torch.from_numpy(pixels)


Channels = tuple[float, float, float]


@functools.lru_cache(maxsize=16)
def _table(do_rescale: bool, factor: float, do_normalize: bool, mean: Channels, std: Channels) -> np.ndarray:
    """What a processor makes of each value in each channel, [3, 256]: to look it up takes half the time."""
    maker = CLIPImageProcessorPil(
        do_resize=False,
        do_center_crop=False,
        do_rescale=do_rescale,
        rescale_factor=factor,
        do_normalize=do_normalize,
        image_mean=list(mean),
        image_std=list(std),
    )
    values = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 3))
    return np.asarray(maker([Image.fromarray(values[None])], return_tensors="np")["pixel_values"][0])[:, 0]


def _short_side(maker: Any) -> int | None:
    """The short side to which a processor resizes before it cuts the middle out; None where it does anything else."""
    if type(maker) is not CLIPImageProcessorPil or not (maker.do_resize and maker.do_center_crop) or maker.do_pad:
        return None
    size, cut = (
        {name: value for name, value in dict(sides).items() if value} for sides in (maker.size, maker.crop_size)
    )
    if set(size) != {"shortest_edge"} or set(cut) != {"height", "width"} or max(cut.values()) > size["shortest_edge"]:
        return None
    return size["shortest_edge"]
