"""Typographic attacks: words written on images."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageStat

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Range = tuple[float, float]

PILLOW_FONT = "pillow"
"""The name of the font that Pillow carries itself."""

PLACES = {
    "anywhere": None,
    "center": (0.5, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
    "top-left": (0.0, 0.0),
    "top-right": (1.0, 0.0),
    "bottom-left": (0.0, 1.0),
    "bottom-right": (1.0, 1.0),
}
"""Where a word may stand: shares of the free width and height to its left and above it."""

_CONSONANTS = "bcdfghjklmnpqrstvwxz"
_CONTROLS = 64  # strings of which the one most like the word is the control
_MEASURED_AT = 24  # pixels of height at which they are compared
_MOST_TRIES = 1000
_SMALLEST_TEXT = 6  # pixels of height; below it no font is legible


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
    """The image with a short side of at least `min_side` pixels, in RGB; a larger one keeps its size."""
    image = image.convert("RGB")
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


def _fit(text: str, style: TextStyle, width: int, height: int, padding: int) -> tuple[int, Font, int]:
    """How many lines the text needs, the largest font at which it fits, its outline in pixels."""

    def measure(lines: str, pixels: int) -> tuple[float, float, int]:
        font = load_font(style.font, pixels)
        stroke = round(style.outline * pixels)
        left, top, right, bottom = _CANVAS.multiline_textbbox((0, 0), lines, font=font, stroke_width=stroke)
        across, down = right - left + 2 * padding, bottom - top + 2 * padding
        return across * cosine + down * sine, across * sine + down * cosine, stroke

    sine, cosine = abs(math.sin(math.radians(style.rotation))), abs(math.cos(math.radians(style.rotation)))
    wanted = max(_SMALLEST_TEXT, round(style.size * min(width, height)))
    while True:
        least = max(_SMALLEST_TEXT, wanted // 2)
        for count in range(1, len(text) + 1):
            lines = _break(text, count)
            pixels = wanted
            while True:
                text_width, text_height, stroke = measure(lines, pixels)
                if text_width <= width and text_height <= height:
                    return count, load_font(style.font, pixels), stroke
                if pixels <= least:
                    break
                pixels = max(least, min(pixels - 1, int(pixels * min(width / text_width, height / text_height))))
        if wanted <= _SMALLEST_TEXT:
            break
        wanted = least
    # Even letter by letter it is too large: the smallest legible size on one line, cut by the image's edge.
    _, _, stroke = measure(text, _SMALLEST_TEXT)
    return 1, load_font(style.font, _SMALLEST_TEXT), stroke


_CANVAS = ImageDraw.Draw(Image.new("RGB", (1, 1)))


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

    A text that is too wide first shrinks to half its size, then breaks into lines, and so on until it fits.

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
        ValueError: The text is empty.
    """
    if not text.strip():
        raise ValueError(f"A word to write must not be empty, got {text!r}.")
    image = image.convert("RGB")
    width, height = image.size
    margin = max(1, round(0.02 * min(width, height)))
    padding = max(1, round(0.04 * min(width, height))) if style.sticker else 0
    count, font, stroke = _fit(sized_for or text, style, width - 2 * margin, height - 2 * margin, padding)
    lines = _break(text, count)
    left, top, right, bottom = _CANVAS.multiline_textbbox((0, 0), lines, font=font, stroke_width=stroke)
    box = (round(right - left) + 2 * padding, round(bottom - top) + 2 * padding)

    def corner(size: tuple[int, int]) -> tuple[int, int]:
        free = (width - 2 * margin - size[0], height - 2 * margin - size[1])
        x, y = (margin + round(share * max(0, space)) for share, space in zip(style.place, free, strict=True))
        return x, y

    if style.sticker:
        behind = style.sticker
    else:
        covered = Image.new("L", box, 255).rotate(style.rotation, expand=True)
        x, y = corner(covered.size)
        inside = (min(covered.width, width - x), min(covered.height, height - y))
        behind = _mean_colour(image.crop((x, y, x + inside[0], y + inside[1])), covered.crop((0, 0, *inside)))
    fill = _legible(style.colours, behind, min_contrast)
    edge = _legible((), fill, 1.0)

    layer = Image.new("RGBA", box, (*(style.sticker or fill), 255 if style.sticker else 0))
    draw = ImageDraw.Draw(layer)
    draw.multiline_text(
        (padding - left, padding - top),
        lines,
        fill=fill,
        font=font,
        align="center",
        stroke_width=stroke,
        stroke_fill=edge,
    )
    if style.rotation:
        layer = layer.rotate(style.rotation, Image.Resampling.BICUBIC, expand=True)
    if style.opacity < 1:
        layer.putalpha(layer.getchannel("A").point([round(a * style.opacity) for a in range(256)]))
    result = image.copy()
    result.paste(layer, corner(layer.size), layer)
    return result


def _mean_colour(image: Image.Image, mask: Image.Image) -> Colour:
    red, green, blue = (round(value) for value in ImageStat.Stat(image, mask).mean)
    return red, green, blue


def _legible(colours: Sequence[Colour], behind: Colour, min_contrast: float) -> Colour:
    for colour in colours:
        if contrast_ratio(colour, behind) >= min_contrast:
            return colour
    return max((0, 0, 0), (255, 255, 255), key=lambda colour: contrast_ratio(colour, behind))


def _consonant(letter: str, rng: random.Random) -> str:
    """A consonant in the letter's case; what is no letter or digit stays."""
    if not letter.isalnum():
        return letter
    consonant = rng.choice(_CONSONANTS)
    return consonant.upper() if letter.isupper() else consonant


@functools.lru_cache(maxsize=4096)
def _letter_ink(letter: str, font: str) -> tuple[float, float]:
    """Ink in pixels, and width, of a letter."""
    loaded = load_font(font, _MEASURED_AT)
    return sum(loaded.getmask(letter)) / 255, loaded.getlength(letter)


def _ink_and_width(text: str, font: str) -> tuple[float, float]:
    inks, widths = zip(*(_letter_ink(letter, font) for letter in text), strict=True)
    return sum(inks), sum(widths)


def _check_colour(colour: str, name: str) -> None:
    try:
        ImageColor.getrgb(colour)
    except ValueError as error:
        raise ValueError(
            f"{name}: {colour!r} is no colour; give a name such as 'red' or a code such as '#ff0000'."
        ) from error


@dataclass(frozen=True)
class TypographicAttack:
    """Writes attack words on images, the same pixels for the same (seed, epoch, index) in any process.

    The style (font, size, place, ...) does not depend on the word, so that `draw_control` can put a meaningless
    string in its place: same font, size and lines, about as much ink.

    Args:
        words: Attack words, at least two.
        fonts: Names as for `load_font`.
        size: Lowest and highest height of the text as a share of the image's short side, in (0, 1].
        places: Names of `PLACES`.
        colours: Names or hex codes of colours of the fill, as Pillow reads them.
        outline: Lowest and highest width of the outline as a share of the text's height.
        rotation: Lowest and highest angle in degrees.
        opacity: Lowest and highest opacity in (0, 1].
        sticker: Share of the attacks that stand on a sticker, a box of its own colour, 0..1.
        sticker_colours: Colours of stickers.
        min_contrast: As for `draw_text`.
        min_side: An image with a shorter side is enlarged to it first: give the model's input size.
        redraw: "every_epoch" draws word and style anew each epoch; "never" keeps those of epoch 0, which lets
            the reference policy see each image only once.
        seed: Seed of all draws.

    Raises:
        ValueError: An argument is out of range; the message says which.

    Source: the attack of Afzali et al. 2025, arXiv 2411.08923, with its parameters opened.
    """

    words: Sequence[str]
    fonts: Sequence[str] = (PILLOW_FONT,)
    size: Range = (0.3, 0.5)
    places: Sequence[str] = ("anywhere",)
    colours: Sequence[str] = ("black", "white", "red", "blue", "green", "yellow", "purple", "orange")
    outline: Range = (0.0, 0.02)
    rotation: Range = (-5.0, 5.0)
    opacity: Range = (1.0, 1.0)
    sticker: float = 0.5
    sticker_colours: Sequence[str] = ("white", "#fff4a3", "#cfe8ff", "#ffd6e0", "black")
    min_contrast: float = 7.0
    min_side: int = 224
    redraw: str = "every_epoch"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every argument before the first image is drawn."""
        if isinstance(self.words, str) or len(set(self.words)) < 2 or not all(w.strip() for w in self.words):
            raise ValueError(
                f"words must be a list of at least two different words, none empty, got {self.words!r}: "
                "with a single one no wrong word is left for the images of its class."
            )
        for name, low, high in (
            ("size", 0, 1),
            ("outline", 0, 1),
            ("rotation", -360, 360),
            ("opacity", 0, 1),
        ):
            lowest, highest = getattr(self, name)
            if not low <= lowest <= highest <= high or (highest <= 0 and name in ("size", "opacity")):
                raise ValueError(
                    f"{name} must be (lowest, highest) within [{low}, {high}], got {getattr(self, name)!r}."
                )
        if not 0 <= self.sticker <= 1:
            raise ValueError(f"sticker is the share of attacks on a sticker, 0 to 1, got {self.sticker!r}.")
        if self.redraw not in ("every_epoch", "never"):
            raise ValueError(f"redraw must be 'every_epoch' or 'never', got {self.redraw!r}.")
        if self.min_side < 1:
            raise ValueError(f"min_side is a number of pixels >= 1, got {self.min_side!r}.")
        if not 1 <= self.min_contrast <= 21:
            raise ValueError(f"min_contrast is a contrast ratio, 1 to 21, got {self.min_contrast!r}.")
        for name in ("places", "fonts", "colours", "sticker_colours"):
            values = getattr(self, name)
            if isinstance(values, str) or not values:
                raise ValueError(f"{name} must be a list that is not empty, got {values!r}.")
        wrong = [place for place in self.places if place not in PLACES]
        if wrong:
            raise ValueError(f"places: unknown {wrong}; known are {sorted(PLACES)}.")
        for font in self.fonts:
            load_font(font, _SMALLEST_TEXT)
        for name in ("colours", "sticker_colours"):
            for colour in getattr(self, name):
                _check_colour(colour, name)

    def _random(self, purpose: str, index: int, epoch: int) -> random.Random:
        return random.Random(f"{purpose}/{self.seed}/{0 if self.redraw == 'never' else epoch}/{index}")

    def word(self, index: int, epoch: int = 0, exclude: Collection[str] = ()) -> str:
        """The attack word of a row.

        Args:
            index: Row of the data set.
            epoch: Epoch, counted from 0.
            exclude: Words that must not be written, in upper or lower case: the row's true class.

        Raises:
            ValueError: No word is left.
        """
        excluded = {word.lower() for word in exclude}
        words = [word for word in self.words if word.lower() not in excluded]
        if not words:
            raise ValueError(f"words: all of {list(self.words)!r} are excluded for row {index}; give more words.")
        return self._random("word", index, epoch).choice(words)

    def meaningless(self, word: str, index: int, epoch: int = 0) -> str:
        """Consonants, as many as `word` has letters, that spell no attack word: the control of occlusion.

        Of several strings it is the one whose ink and width come nearest to the word's in the row's font.

        Raises:
            ValueError: Every such string is an attack word.
        """
        rng = self._random("meaningless", index, epoch)
        known = {known.lower() for known in self.words}
        drawn = ("".join(_consonant(letter, rng) for letter in word) for _ in range(_MOST_TRIES))
        strings = list(itertools.islice((string for string in drawn if string.lower() not in known), _CONTROLS))
        if not strings:
            raise ValueError(
                f"No string of consonants as long as {word!r} was found that is none of the {len(known)} attack "
                "words: give longer words, or measure without the control."
            )
        font = self.style(index, epoch).font
        ink, width = _ink_and_width(word, font)

        def distance(string: str) -> float:
            other_ink, other_width = _ink_and_width(string, font)
            return abs(other_ink - ink) / max(ink, 1) + abs(other_width - width) / max(width, 1)

        return min(strings, key=distance)

    def style(self, index: int, epoch: int = 0) -> TextStyle:
        """The style in which the row's word is drawn."""
        rng = self._random("style", index, epoch)
        place = PLACES[rng.choice(list(self.places))]
        anywhere = (rng.random(), rng.random())
        colours = [ImageColor.getrgb(colour)[:3] for colour in self.colours]
        rng.shuffle(colours)
        sticker = ImageColor.getrgb(rng.choice(list(self.sticker_colours)))[:3]
        return TextStyle(
            font=rng.choice(list(self.fonts)),
            size=rng.uniform(*self.size),
            place=place or anywhere,
            colours=tuple(colours),
            outline=rng.uniform(*self.outline),
            rotation=rng.uniform(*self.rotation),
            opacity=rng.uniform(*self.opacity),
            sticker=sticker if rng.random() < self.sticker else None,
        )

    def draw(self, image: Image.Image, text: str, index: int, epoch: int = 0) -> Image.Image:
        """Write `text` on the image in the row's style.

        Args:
            image: The clean image; enlarged to `min_side` where it is smaller.
            text: What is written.
            index: Row of the data set.
            epoch: Epoch, counted from 0.

        Returns:
            The attacked image, RGB.
        """
        return draw_text(enlarge(image, self.min_side), text, self.style(index, epoch), self.min_contrast)

    def draw_control(self, image: Image.Image, word: str, index: int, epoch: int = 0) -> Image.Image:
        """Write `meaningless(word)` on the image as `draw` writes the word: same style, font size and lines.

        Args:
            image: The clean image; enlarged to `min_side` where it is smaller.
            word: The attack word whose control it is.
            index: Row of the data set.
            epoch: Epoch, counted from 0.

        Returns:
            The occluded image, RGB.
        """
        text, style = self.meaningless(word, index, epoch), self.style(index, epoch)
        return draw_text(enlarge(image, self.min_side), text, style, self.min_contrast, sized_for=word)
