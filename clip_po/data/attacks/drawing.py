"""Draw words on images: fonts, legible colours, and sizes that fit."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from clip_po.data.attacks.fonts import Font, load_font
from clip_po.data.attacks.glyphs import fonts_for
from clip_po.data.images import to_rgb

Colour = tuple[int, int, int]

SMALLEST_TEXT = 6  # pixels of height; smaller text is illegible in any font
_MEASURED_AT = 24  # pixels of height at which ink is compared


@functools.lru_cache(maxsize=4096)
def relative_luminance(colour: Colour) -> float:
    """Return the perceived brightness of a colour.

    Args:
        colour: Red, green, blue in 0..255.

    Returns:
        Relative luminance in 0..1.

    Source: WCAG 2.2, "relative luminance".
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast_ratio(first: Colour, second: Colour) -> float:
    """Return the contrast ratio of two colours.

    Args:
        first: Red, green, blue in 0..255.
        second: Red, green, blue in 0..255. The order of the colours does not matter.

    Returns:
        The ratio, from 1 (equal) to 21 (black on white).

    Source: WCAG 2.2, "contrast ratio".
    """
    high, low = sorted((relative_luminance(first), relative_luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def enlarge(image: Image.Image, min_side: int) -> Image.Image:
    """Enlarge an image if its short side has fewer than `min_side` pixels.

    Args:
        image: PIL image of any mode.
        min_side: Smallest short side in pixels, >= 1.

    Returns:
        RGB image of the same aspect ratio, up to rounding. The same object if it already is RGB and large enough.

    Raises:
        TypeError: If `image` is not a PIL image.
        ValueError: If it can't be converted; see `to_rgb`.
    """
    image = to_rgb(image)
    short = min(image.size)
    if short >= min_side:
        return image
    scale = min_side / short
    width, height = (max(min_side, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class TextStyle:
    """The style of one attack, drawn by `TypographicAttack.style` and independent of the word.

    Attributes:
        font: Name of the font, as for `load_font`.
        size: Height of the text as a share of the image's short side.
        place: Position (x, y) of the text within the free width and height, each 0 (left, top) to 1 (right, bottom).
        colours: Fill colours in order of preference; the first legible one is used.
        outline: Width of the outline as a share of the text height.
        rotation: Degrees, counter-clockwise.
        opacity: 0 (invisible) to 1.
        sticker: Colour of the box behind the text, or None for bare text.
    """

    font: str
    size: float
    place: tuple[float, float]
    colours: tuple[Colour, ...]
    outline: float
    rotation: float
    opacity: float
    sticker: Colour | None


def _fit(text: str, style: TextStyle, width: int, height: int, padding: int) -> tuple[int, int, int] | None:
    """Return the number of lines, the largest font size and the outline width, both in pixels, at which a text fits.

    None if it does not fit even at the smallest legible size, whatever the number of lines.
    """

    def measure(lines: str, pixels: int) -> tuple[float, float, int]:
        stroke = round(style.outline * pixels)
        left, top, right, bottom = _box(lines, style.font, pixels, stroke)
        return *_turned(right - left + 2 * padding, bottom - top + 2 * padding, style), stroke

    cosine, sine = _turned(1, 0, style)
    wanted = max(SMALLEST_TEXT, round(style.size * min(width, height)))
    # Upper bounds of the length of a rotated line and the height of a rotated block.
    longest, highest = (
        min(side / max(cosine, 1e-9), other / max(sine, 1e-9)) for side, other in ((width, height), (height, width))
    )
    while True:
        least = max(SMALLEST_TEXT, wanted // 2)
        # For a text of thousands of letters, skip numbers of lines that are certainly too few or too many.
        left, _, right, _ = _box("".join(text.split()), style.font, least, 0)
        fewest, most = int(0.9 * (right - left) / max(longest, 1)), int(highest / (least / 2 + _LEADING)) + 1
        for count in range(max(1, fewest), min(len(text), most) + 1):
            lines = _break(text, count)
            pixels = wanted
            while True:
                text_width, text_height, stroke = measure(lines, pixels)
                if text_width <= width and text_height <= height:
                    return count, pixels, stroke
                if pixels <= least:
                    break
                pixels = max(least, min(pixels - 1, int(pixels * min(width / text_width, height / text_height))))
        if wanted <= SMALLEST_TEXT:
            return None
        wanted = least


def _turned(across: float, down: float, style: TextStyle) -> tuple[float, float]:
    """Return the width and height of the bounding box of a rotated box."""
    sine, cosine = abs(math.sin(math.radians(style.rotation))), abs(math.cos(math.radians(style.rotation)))
    return across * cosine + down * sine, across * sine + down * cosine


_CANVAS = ImageDraw.Draw(Image.new("RGB", (1, 1)))
_LEADING = 4  # pixels between lines in Pillow


@functools.lru_cache(maxsize=4096)
def _box(lines: str, font: str, pixels: int, stroke: int) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of lines set at the origin. Cached for choosing a size and drawing."""
    return _CANVAS.multiline_textbbox((0, 0), lines, font=load_font(font, pixels), stroke_width=stroke)


def _break(text: str, count: int) -> str:
    """Break a text into `count` lines of about equal length, at spaces if it has enough of them."""
    words = text.split()
    if 1 < count <= len(words):
        target, lines = len(text) / count, [""]
        for position, word in enumerate(words):
            left = len(words) - position
            room = count - len(lines)
            if lines[-1] and room and (len(lines[-1]) + len(word) / 2 >= target or left <= room):
                lines.append(word)
            else:
                lines[-1] = f"{lines[-1]} {word}".strip()
        return "\n".join(lines)
    step = -(-len(text) // count)
    return "\n".join(text[start : start + step] for start in range(0, len(text), step))


def draw_text(
    image: Image.Image, text: str, style: TextStyle, min_contrast: float = 7.0, sized_for: str | None = None
) -> Image.Image:
    """Write a text on a copy of an image.

    A text that is too wide first shrinks to half its size, then breaks into lines, and so on until it fits. A text
    that is too long for any legible size is cut off.

    Args:
        image: Any PIL image; the result is RGB of the same size.
        text: The text to write; not empty.
        style: Font, size, place, colours, outline, rotation, opacity, sticker.
        min_contrast: Contrast ratio (1..21) that the fill must have to its background. If no colour of the style
            reaches it, the fill is black or white. The outline is black or white.
        sized_for: The text for which font size and number of lines are chosen; `text` by default.

    Returns:
        The image with the text.

    Raises:
        ValueError: If the text is empty, or the font lacks one of its letters.
    """
    fonts_for(text, [style.font])
    image = to_rgb(image)
    block = _set(text, style, image.size, sized_for or text)
    behind = style.sticker or _colour_behind(image, block.size, style)
    fill = _legible(style.colours, behind, min_contrast)
    edge = _legible((), fill, 1.0)

    layer = Image.new("RGBA", block.size, (*(style.sticker or fill), 255 if style.sticker else 0))
    ImageDraw.Draw(layer).multiline_text(
        block.origin,
        block.lines,
        fill=fill,
        font=block.font,
        align="center",
        stroke_width=block.stroke,
        stroke_fill=edge,
    )
    return _stick(image, layer, style)


def draw_blank(image: Image.Image, text: str, style: TextStyle) -> Image.Image:
    """Draw an empty box in place of a text, where `draw_text` writes it and as large as the text with its sticker.

    Args:
        image: Any PIL image; the result is RGB of the same size.
        text: The text to cover; not empty.
        style: As for `draw_text`. Without a sticker, the box has the first colour of the style.

    Returns:
        The image with the box.

    Raises:
        TypeError: If `image` is not a PIL image.
        ValueError: If the text is empty, or the image can't be converted; see `to_rgb`.
    """
    fonts_for(text, [style.font])
    image = to_rgb(image)
    style = replace(style, sticker=style.sticker or style.colours[0])
    size = _set(text, style, image.size, text).size
    return _stick(image, Image.new("RGBA", size, (*(style.sticker or style.colours[0]), 255)), style)


@dataclass(frozen=True)
class _Block:
    """A typeset text: lines, font, outline, origin in its box, and size of the box."""

    lines: str
    font: Font
    stroke: int
    origin: tuple[float, float]
    size: tuple[int, int]


def _set(text: str, style: TextStyle, image_size: tuple[int, int], sized_for: str) -> _Block:
    margin, padding = _margin(image_size), 0
    if style.sticker:
        padding = max(1, round(0.04 * min(image_size)))
    width, height = (side - 2 * margin for side in image_size)
    fitted = _fit(sized_for, style, width, height, padding)
    if fitted is None:
        text, sized_for = text.strip(), sized_for.strip()
        style = replace(style, size=0.0)
        # As much of its beginning as fits. If not even one letter does, the edge of the image cuts it off.
        letters = bisect.bisect_left(
            range(2, len(sized_for)), True, key=lambda n: _fit(sized_for[:n], style, width, height, padding) is None
        )
        text, sized_for = text[: letters + 1], sized_for[: letters + 1]
        smallest = (1, SMALLEST_TEXT, round(style.outline * SMALLEST_TEXT))
        fitted = _fit(sized_for, style, width, height, padding) or smallest
    count, pixels, stroke = fitted
    lines = _break(text, count)
    while True:
        left, top, right, bottom = _box(lines, style.font, pixels, stroke)
        size = (round(right - left) + 2 * padding, round(bottom - top) + 2 * padding)
        # Sized for another text, this one may be slightly wider and would lose its last letter at the edge.
        inside = all(taken < side - 2 for taken, side in zip(_turned(*size, style), image_size, strict=True))
        if inside or pixels <= SMALLEST_TEXT:
            break
        pixels -= 1
    return _Block(lines, load_font(style.font, pixels), stroke, (padding - left, padding - top), size)


def _margin(image_size: tuple[int, int]) -> int:
    return max(1, round(0.02 * min(image_size)))


def _corner(size: tuple[int, int], image_size: tuple[int, int], style: TextStyle) -> tuple[int, int]:
    """Return the position of the upper left corner of a box in the image."""
    margin = _margin(image_size)
    free = (side - 2 * margin - box for side, box in zip(image_size, size, strict=True))
    x, y = (
        margin + round(share * max(0, space)) if -space < margin else max(0, margin + space // 2)
        for share, space in zip(style.place, free, strict=True)
    )
    return x, y


def _colour_behind(image: Image.Image, size: tuple[int, int], style: TextStyle) -> Colour:
    """Return the mean colour of the area that a box will cover."""
    covered = Image.new("L", size, 255).rotate(style.rotation, expand=True)
    x, y = _corner(covered.size, image.size, style)
    inside = (min(covered.width, image.width - x), min(covered.height, image.height - y))
    seen = image.crop((x, y, x + inside[0], y + inside[1]))
    histogram = np.array(seen.histogram(covered.crop((0, 0, *inside)))).reshape(3, 256)
    means = histogram @ np.arange(256) / histogram.sum(axis=1).clip(min=1)  # a tiny image may have no pixel behind it
    red, green, blue = (round(mean) for mean in means.tolist())
    return red, green, blue


def _stick(image: Image.Image, layer: Image.Image, style: TextStyle) -> Image.Image:
    """Return a copy of the image with a layer pasted on it, rotated and placed by the style."""
    if style.rotation:
        *colours, alpha = layer.split()
        if len({band.tobytes() for band in colours}) == 1:  # black and white: rotate two bands instead of four
            layer = Image.merge("LA", (colours[0], alpha))
        layer = layer.rotate(style.rotation, Image.Resampling.BICUBIC, expand=True)
    if style.opacity < 1:
        layer.putalpha(layer.getchannel("A").point([round(a * style.opacity) for a in range(256)]))
    result = image.copy()
    result.paste(layer, _corner(layer.size, image.size, style), layer)
    return result


def _legible(colours: Sequence[Colour], behind: Colour, min_contrast: float) -> Colour:
    for colour in colours:
        if contrast_ratio(colour, behind) >= min_contrast:
            return colour
    return max((0, 0, 0), (255, 255, 255), key=lambda colour: contrast_ratio(colour, behind))


@functools.lru_cache(maxsize=4096)
def _letter_ink(letter: str, font: str) -> tuple[float, float]:
    """Return the ink and the width of a letter, in pixels."""
    loaded = load_font(font, _MEASURED_AT)
    return sum(loaded.getmask(letter)) / 255, loaded.getlength(letter)


def ink_and_width(text: str, font: str) -> tuple[float, float]:
    """Return the ink and the width of a text at one size, 24 pixels, for all texts.

    Args:
        text: The text; not empty.
        font: Name of the font, as for `load_font`.

    Returns:
        ink: Area that the letters cover, in pixels; 0 if the font draws none of them.
        width: Sum of the letters' widths, in pixels.

    Raises:
        ValueError: If the text is empty, or Pillow can't read the font.
    """
    inks, widths = zip(*(_letter_ink(letter, font) for letter in text), strict=True)
    return sum(inks), sum(widths)
