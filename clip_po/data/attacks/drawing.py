"""Words drawn on images: fonts, legible colours, sizes that fit."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clip_po.data.images import to_rgb

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PILLOW_FONT = "pillow"
"""The name of the font that Pillow carries itself."""

SMALLEST_TEXT = 6  # pixels of height; below it no font is legible
_MEASURED_AT = 24  # pixels of height at which inks are compared


@functools.lru_cache(maxsize=4096)
def relative_luminance(colour: Colour) -> float:
    """Brightness of a colour as an eye sees it.

    Args:
        colour: Red, green, blue in 0..255.

    Returns:
        Relative luminance in 0..1.

    Source: WCAG 2.2, "relative luminance".
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast_ratio(first: Colour, second: Colour) -> float:
    """Contrast of two colours, 1 (equal) to 21 (black on white).

    Source: WCAG 2.2, "contrast ratio".
    """
    high, low = sorted((relative_luminance(first), relative_luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@functools.lru_cache(maxsize=512)
def load_font(name: str, pixels: int) -> Font:
    """The font `name` at a size in pixels.

    Args:
        name: "pillow" for the font that Pillow carries, else the path of a TrueType or OpenType file.
        pixels: Size of the font's em square, >= 1.

    Raises:
        ValueError: The file is no font that Pillow can read.
    """
    if name == PILLOW_FONT:
        return ImageFont.load_default(pixels)
    try:
        return ImageFont.truetype(name, pixels)
    except OSError as error:
        raise ValueError(
            f"fonts: {name!r} can't be read as a font ({error}). Give the path of a .ttf or .otf file, "
            f"or {PILLOW_FONT!r} for the font that Pillow carries."
        ) from error


def enlarge(image: Image.Image, min_side: int) -> Image.Image:
    """The image with a short side of at least `min_side` pixels, in RGB; a larger one is given back as it is."""
    image = to_rgb(image)
    short = min(image.size)
    if short >= min_side:
        return image
    scale = min_side / short
    width, height = (max(min_side, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class TextStyle:
    """How one word is drawn; drawn by `TypographicAttack.style`, the same for any word.

    Attributes:
        font: As for `load_font`.
        size: Height of the text as a share of the image's short side.
        place: Shares (x, y) of the free width and height to the left of and above the text, each 0..1.
        colours: Colours of the fill in order of preference; the first legible one is taken.
        outline: Width of the outline as a share of the text's height.
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
    """How many lines the text needs, the largest font at which it fits and its outline, both in pixels.

    None where it does not fit at the smallest legible size either, whatever its lines.
    """

    def measure(lines: str, pixels: int) -> tuple[float, float, int]:
        stroke = round(style.outline * pixels)
        left, top, right, bottom = _box(lines, style.font, pixels, stroke)
        return *_turned(right - left + 2 * padding, bottom - top + 2 * padding, style), stroke

    cosine, sine = _turned(1, 0, style)
    wanted = max(SMALLEST_TEXT, round(style.size * min(width, height)))
    # What no turned line can be longer than, and no turned block higher.
    longest, highest = (
        min(side / max(cosine, 1e-9), other / max(sine, 1e-9)) for side, other in ((width, height), (height, width))
    )
    while True:
        least = max(SMALLEST_TEXT, wanted // 2)
        # A text of thousands of letters is not tried in numbers of lines that are sure to be too few or too many.
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
    """Width and height of what a box takes up when it is rotated."""
    sine, cosine = abs(math.sin(math.radians(style.rotation))), abs(math.cos(math.radians(style.rotation)))
    return across * cosine + down * sine, across * sine + down * cosine


_CANVAS = ImageDraw.Draw(Image.new("RGB", (1, 1)))
_LEADING = 4  # pixels that Pillow puts between lines


@functools.lru_cache(maxsize=4096)
def _box(lines: str, font: str, pixels: int, stroke: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of lines set at the origin, asked for to choose a size and again to draw."""
    return _CANVAS.multiline_textbbox((0, 0), lines, font=load_font(font, pixels), stroke_width=stroke)


def _break(text: str, count: int) -> str:
    """The text in `count` lines of about equal length, at spaces where it has enough of them."""
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

    A text that is too wide first shrinks to half its size, then breaks into lines, and so on until it fits. One that
    is too long for any legible size ends where the image does.

    Args:
        image: Any PIL image; the result is RGB of the same size.
        text: What is written; not empty.
        style: Font, size, place, colours, outline, rotation, opacity, sticker.
        min_contrast: Contrast ratio (1..21) that the fill must have to what lies behind it; black or white
            stands in where no colour of the style reaches it. The outline is black or white.
        sized_for: The text that font size and number of lines are chosen for; `text` itself by default.

    Returns:
        The image with the text.

    Raises:
        ValueError: The text is empty, or the font has none of its letters.
    """
    check_visible(text, style.font)
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
    """Put a box without a word where `draw_text` writes the text, as large as the text with its sticker.

    Args:
        image: Any PIL image; the result is RGB of the same size.
        text: The text whose place is covered; not empty.
        style: As for `draw_text`; bare text is covered by a box of the style's first colour.
    """
    image = to_rgb(image)
    style = replace(style, sticker=style.sticker or style.colours[0])
    size = _set(text, style, image.size, text).size
    return _stick(image, Image.new("RGBA", size, (*(style.sticker or style.colours[0]), 255)), style)


@dataclass(frozen=True)
class _Block:
    """A text as it is set: its lines, font and outline, where it starts in its box, and the size of the box."""

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
        # Its beginning, as much of it as fits; where not even a letter does, the image's edge cuts that.
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
        # Sized for another text, this one may be a little wider, and would lose its last letter at the edge.
        inside = all(taken < side - 2 for taken, side in zip(_turned(*size, style), image_size, strict=True))
        if inside or pixels <= SMALLEST_TEXT:
            break
        pixels -= 1
    return _Block(lines, load_font(style.font, pixels), stroke, (padding - left, padding - top), size)


def _margin(image_size: tuple[int, int]) -> int:
    return max(1, round(0.02 * min(image_size)))


def _corner(size: tuple[int, int], image_size: tuple[int, int], style: TextStyle) -> tuple[int, int]:
    """Where the upper left corner of a box stands in the image."""
    margin = _margin(image_size)
    free = (side - 2 * margin - box for side, box in zip(image_size, size, strict=True))
    x, y = (
        margin + round(share * max(0, space)) if -space < margin else max(0, margin + space // 2)
        for share, space in zip(style.place, free, strict=True)
    )
    return x, y


def _colour_behind(image: Image.Image, size: tuple[int, int], style: TextStyle) -> Colour:
    """The mean colour of what a box will cover."""
    covered = Image.new("L", size, 255).rotate(style.rotation, expand=True)
    x, y = _corner(covered.size, image.size, style)
    inside = (min(covered.width, image.width - x), min(covered.height, image.height - y))
    seen = image.crop((x, y, x + inside[0], y + inside[1]))
    histogram = np.array(seen.histogram(covered.crop((0, 0, *inside)))).reshape(3, 256)
    means = histogram @ np.arange(256) / histogram.sum(axis=1).clip(min=1)  # a tiny image may have nothing behind
    red, green, blue = (round(mean) for mean in means.tolist())
    return red, green, blue


def _stick(image: Image.Image, layer: Image.Image, style: TextStyle) -> Image.Image:
    """A copy of the image with a layer on it, turned and placed as the style says."""
    if style.rotation:
        *colours, alpha = layer.split()
        if len({band.tobytes() for band in colours}) == 1:  # black and white: two bands to turn and not four
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
    """Ink in pixels, and width, of a letter."""
    loaded = load_font(font, _MEASURED_AT)
    return sum(loaded.getmask(letter)) / 255, loaded.getlength(letter)


def check_visible(text: str, font: str) -> None:
    """Refuse a text of which nothing would be seen, so that an image without a word never passes for an attack.

    Args:
        text: What is to be written.
        font: As for `load_font`.

    Raises:
        ValueError: The text is empty, or the font draws none of its letters.
    """
    if not text.strip():
        raise ValueError(f"A word to write must not be empty, got {text!r}.")
    if not ink_and_width(text, font)[0]:
        raise ValueError(
            f"The font {font!r} draws nothing for the word {text!r}: it has none of its letters. Give fonts that have "
            "them, or another word."
        )


def ink_and_width(text: str, font: str) -> tuple[float, float]:
    """How much ink a text has and how wide it is, in pixels, at one size for all texts.

    Args:
        text: Not empty.
        font: As for `load_font`.
    """
    inks, widths = zip(*(_letter_ink(letter, font) for letter in text), strict=True)
    return sum(inks), sum(widths)
