"""Images for a model: any Pillow mode to RGB, a dataset's column to images, images to pixel values."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, ProcessorMixin
from transformers.image_transforms import convert_to_rgb
from transformers.utils import logging

from clip_po.data.patches import pack_patches
from clip_po.validation import UnreadableImage, check_column, check_image, unreadable_image

logger = logging.get_logger(__name__)

WHITE = (255, 255, 255, 255)
"""Background of transparent pixels, as viewers and the image processors of transformers draw it."""

MOST_ELONGATED = 200
"""Largest accepted ratio of long side to short side. Resizing a longer image for a model would exhaust the memory."""

_SIXTEEN_BITS = 65_535


# ---- Any mode to RGB ---------------------------------------------------------------------------------------


def to_rgb(image: Any) -> Image.Image:
    """Convert an image of any mode to RGB, as a viewer shows it.

    Pillow's own conversion clips 16-bit greys at 255 (white), reads floats in 0..1 as black, and shows the hidden
    colour of transparent pixels, which is mostly black.

    Args:
        image: PIL image: palette, CMYK, greys of 1, 8, 16 and 32 bits (integers up to 65,535, floats of 0..1 too), all
            with or without transparency. Transparent pixels become white. An animation gives its current frame.

    Returns:
        The image in RGB; the same object if it already is.

    Raises:
        TypeError: If `image` is not a PIL image.
        ValueError: If it is more than `MOST_ELONGATED` times as long as wide, or its greys are in no known range.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"expected a PIL image, got {type(image).__name__}. Paths become images by "
            "dataset.cast_column(column, datasets.Image()), arrays by PIL.Image.fromarray"
        )
    width, height = image.size
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise ValueError(
            f"{width} x {height} pixels are more than {MOST_ELONGATED} times as long as wide; resized for a model, "
            "the image would exhaust the memory. Crop the image"
        )
    if image.mode[0] in "IF":
        logger.warning_once(
            f"Images have greys of more than 8 bits (mode {image.mode!r}). They are scaled to 8 bits here, but the "
            "processors of transformers clip them at 255. Wherever the model is used later, convert such images with "
            "clip_po.data.to_rgb first, or save them with 8 bits."
        )
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        if not _processors_show_white():
            logger.warning_once(
                "Images have transparent pixels. They are white here, but the processors of this version of "
                "transformers show the hidden colour. Wherever the model is used later, convert such images with "
                "clip_po.data.to_rgb first, or install a newer transformers."
            )
        shown = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, WHITE), shown).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.cache
def _processors_show_white() -> bool:
    """Return whether the image processors of the installed transformers draw transparent pixels on white."""
    # Newer versions warn about images of Pillow as a result and will return arrays only.
    wanted = {"return_numpy": True} if "return_numpy" in inspect.signature(convert_to_rgb).parameters else {}
    drawn = convert_to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0)), **wanted)
    return bool((np.asarray(drawn) == WHITE[:3]).all())


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Convert greys of 16 bits, 32 bits or floats to 8 bits."""
    lowest, highest = float(values.min()), float(values.max())
    if values.dtype.itemsize == 2:
        white = _SIXTEEN_BITS
    elif values.dtype.kind == "f":
        white = 1 if highest <= 1 else 255
    else:
        white = 255 if highest <= 255 else _SIXTEEN_BITS
    if not 0 <= lowest <= highest <= white:
        raise ValueError(
            f"its greys run from {lowest:g} to {highest:g}, which is neither 0..1, 0..255 nor 0..{_SIXTEEN_BITS}. "
            "Scale them to 0..255 and save it with 8 bits"
        )
    return np.rint(values * (255 / white)).astype(np.uint8)


# ---- A column of a dataset ---------------------------------------------------------------------------------


def is_transformed(dataset: Dataset) -> bool:
    """Return whether a transform of the user, which may be random, changes the rows as they are read.

    Args:
        dataset: The rows.

    Returns:
        True after `dataset.set_transform` or `dataset.with_transform`.
    """
    return dataset.format["type"] == "custom"


def unformatted(dataset: Dataset) -> Dataset:
    """Return a dataset whose rows are Python values and PIL images, in all columns.

    A format such as "torch" turns images into arrays, and a palette image into positions in its palette.

    Args:
        dataset: The rows.

    Returns:
        The dataset without its format; as it is if it has none, or a transform of the user, which applies.
    """
    plain = dataset.format["type"] is None and dataset.format["columns"] == dataset.column_names
    return dataset if plain or is_transformed(dataset) else dataset.with_format(None)


def check_index(dataset: Dataset, index: int, name: str) -> None:
    """Raise if a dataset has no row of a number: that is no fault of an image.

    Args:
        dataset: The rows.
        index: Number of the row; negative numbers count from the end.
        name: Name of the dataset in messages.

    Raises:
        IndexError: If there is no such row.
    """
    if not -len(dataset) <= index < len(dataset):
        raise IndexError(f"{name} has {len(dataset)} rows, so there is no row {index}.")


def image_path(dataset: Dataset, column: str, index: int) -> str | None:
    """Return the path of an image as the dataset knows it.

    Args:
        dataset: The rows.
        column: Name of the image column.
        index: Number of the row.

    Returns:
        The path of its file, or the name that is stored with its bytes; None if there is neither, or if the column is
        no `datasets.Image`.
    """
    if not isinstance(dataset.features.get(column), ImageFeature):
        return None
    stored = dataset.with_format(None).select_columns([column]).cast_column(column, ImageFeature(decode=False))
    return (stored[index][column] or {}).get("path")


def read_images(dataset: Dataset, image_column: str) -> Dataset:
    """Return the image column of a dataset alone, unformatted, so that reading a row decodes one image only.

    Args:
        dataset: One split.
        image_column: Name of the image column.

    Returns:
        The same rows with this column alone. A transform of the user no longer applies.

    Raises:
        ValueError: If the column is missing.
        TypeError: If `dataset` is not a single split.
    """
    check_column(dataset, image_column, "image_column")
    return dataset.with_format(None).select_columns([image_column])


def read_image(images: Dataset, image_column: str, row: int) -> Image.Image:
    """Read the image of a row.

    Args:
        images: As returned by `read_images`.
        image_column: Name of the image column.
        row: Number of the row.

    Returns:
        RGB image; transparent pixels are white, as in `to_rgb`.

    Raises:
        UnreadableImage: If the image can't be read or converted, or there is none; the message names row, column and,
            where it is known, the file.
        IndexError: If there is no such row.
    """
    check_index(images, row, "The dataset")
    try:
        image = images[row][image_column]
        check_image(image, image_column, f"Row {row}")
        return to_rgb(image)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders of broken files raise anything from OSError to SyntaxError
        path = image_path(images, image_column, row)
        raise unreadable_image(error, repr(image_column), f"Row {row}", path) from error


def blank_image() -> Image.Image:
    """Return the image that replaces an unreadable one, so that batches keep their shape.

    Returns:
        Black RGB image, 32 by 32 pixels.
    """
    return Image.new("RGB", (32, 32))


def probe_image() -> Image.Image:
    """Make the image whose embedding tells models and processors apart.

    Returns:
        320 x 240 random pixels in RGB, always the same.
    """
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8))


# ---- RGB to pixel values -----------------------------------------------------------------------------------


def middle(image: Image.Image, side: int, size: tuple[int, int] | None = None, resample: int = 3) -> Image.Image:
    """Resize an image and crop its centre, as CLIP's processors do.

    Args:
        image: RGB image.
        side: Short side after resizing, in pixels.
        size: Width and height of the crop, each at most `side`; a square of that side by default.
        resample: Pillow's number of the resampling filter; 3 is bicubic.

    Returns:
        The crop, with the same pixels as `CLIPImageProcessorPil` produces.
    """
    width, height = size or (side, side)
    short, long = sorted(image.size)
    resized = (side, int(side * long / short))
    if image.width > image.height:
        resized = resized[::-1]
    if image.size != resized:  # at its own size Pillow would copy the image
        image = image.resize(resized, Image.Resampling(resample))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_pixels(processor: ProcessorMixin, images: Sequence[Image.Image]) -> Tensor:
    """Convert images to pixel values, bit for bit as the processor does, faster where it is CLIP's own.

    Args:
        processor: The model's processor.
        images: B images, B >= 1.

    Returns:
        Tensor[B, C, H, W], or the packed patches of `pack_patches`.
    """
    maker = processor.image_processor
    side = _short_side(maker)
    if side is None or any(image.mode != "RGB" for image in images):
        if not getattr(maker, "do_convert_rgb", False):
            images = [to_rgb(image) for image in images]
        made = maker(list(images), return_tensors="pt")
        return pack_patches(made) if "spatial_shapes" in made else made["pixel_values"]
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
    """Return a processor's output for each value of each channel, float[3, 256]. A lookup takes half the time."""
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
    """Return the short side to which a processor resizes before its centre crop; None if it does anything else."""
    if type(maker) is not CLIPImageProcessorPil or not (maker.do_resize and maker.do_center_crop) or maker.do_pad:
        return None
    size, cut = (
        {name: value for name, value in dict(sides).items() if value} for sides in (maker.size, maker.crop_size)
    )
    if set(size) != {"shortest_edge"} or set(cut) != {"height", "width"} or max(cut.values()) > size["shortest_edge"]:
        return None
    return size["shortest_edge"]
