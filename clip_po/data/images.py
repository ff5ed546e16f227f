"""Pictures of every kind as the RGB that a model reads."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

WHITE = (255, 255, 255, 255)
"""What lies behind transparent pixels: they are drawn for pages, and so do image processors of transformers."""

MOST_ELONGATED = 200
"""Long side over short side: a longer image, resized to what a model reads, would fill the memory."""

_SIXTEEN_BITS = 65_535


def to_rgb(image: Any) -> Image.Image:
    """An image of any mode in RGB, looking as a viewer shows it.

    Pillow's own conversion cuts greys of 16 bits off at 255, which is white, takes floats of 0..1 for black, and
    uncovers whatever colour lies under transparent pixels, which is mostly black.

    Args:
        image: A PIL image: palettes, CMYK, greys of 1, 8 and 16 bits (integers up to 65,535 and floats of 0..1 too),
            any of them with transparency, which lets white through. Of an animation it is the frame at hand.

    Returns:
        The image in RGB; the same object where it is RGB already.

    Raises:
        TypeError: No PIL image.
        ValueError: More than `MOST_ELONGATED` times as long as wide, or numbers of no known range.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"expected a PIL image, got {type(image).__name__}. Paths become images by "
            "dataset.cast_column(column, datasets.Image()), arrays by PIL.Image.fromarray"
        )
    width, height = image.size
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise ValueError(
            f"{width} x {height} pixels are more than {MOST_ELONGATED} times as long as wide: resized to what a model "
            "reads they would fill the memory. Crop the image"
        )
    if image.mode[0] in "IF":
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.mode == "La":  # which Pillow converts to no other mode
        image = image.convert("LA")
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, WHITE), shown).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def middle(image: Image.Image, side: int, size: tuple[int, int] | None = None, resample: int = 3) -> Image.Image:
    """The middle of an image, as CLIP's processors cut it out: resized, then cropped.

    Args:
        image: In RGB.
        side: Short side after the resize, in pixels.
        size: Width and height of what is cut out, at most `side`; a square of that side where it is None.
        resample: As Pillow numbers its filters; 3 is bicubic.

    Returns:
        The same pixels as a `CLIPImageProcessorPil` sees.
    """
    width, height = size or (side, side)
    short, long = sorted(image.size)
    resized = (side, int(side * long / short))
    if image.width > image.height:
        resized = resized[::-1]
    if image.size != resized:  # at its own size Pillow would copy it
        image = image.resize(resized, Image.Resampling(resample))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Greys of 16 bits, 32 bits or floats in 8 bits."""
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
