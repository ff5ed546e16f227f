"""Typographic attacks: which word is written on which image, and how."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageColor

from clip_po.data.attacks.drawing import (
    SMALLEST_TEXT,
    TextStyle,
    draw_blank,
    draw_text,
    enlarge,
    ink_and_width,
)
from clip_po.data.attacks.fonts import PILLOW_FONT, load_font
from clip_po.data.attacks.glyphs import fonts_for, missing_letters
from clip_po.data.attacks.words import spelling
from clip_po.data.images import middle, to_rgb
from clip_po.validation import COUNT, FINITE, check_number

Range = tuple[float, float]

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
"""Positions of a word within the free width and height: (0, 0) is top left, None is anywhere."""

_CONSONANTS = "bcdfghjklmnpqrstvwxz"
_CONTROLS = 64  # candidate strings, of which the most similar to the word becomes the control
_MOST_TRIES = 1000


def _consonant(letter: str, rng: random.Random) -> str:
    """Return a consonant in the case of a letter or digit; any other character unchanged."""
    if not letter.isalnum():
        return letter
    consonant = rng.choice(_CONSONANTS)
    return consonant.upper() if letter.isupper() else consonant


def _check_colour(colour: str, name: str) -> None:
    try:
        ImageColor.getrgb(colour)
    except ValueError as error:
        raise ValueError(
            f"{name}: {colour!r} is not a colour; give a name such as 'red' or a code such as '#ff0000'."
        ) from error


@dataclass(frozen=True)
class TypographicAttack:
    """Typographic attack: writes words on images, with the same pixels for the same (seed, epoch, index) anywhere.

    The style (font, size, place, ...) does not depend on the word, so that `draw_control` can replace the word by a
    meaningless string in the same font, size and number of lines, with about as much ink.

    Args:
        words: Attack words, at least two; usually the class names.
        other_words: Words that are not classes, such as `EVERYDAY_WORDS`, for `other_share` of the written words.
            Words that name a class, in any spelling, are left out.
        other_share: Share of the written words that are drawn from `other_words`, 0..1.
        count: Lowest and highest number of different words on an image, >= 1.
        fonts: Names of fonts, as for `load_font`. A font that lacks a letter of a word is left out for that word.
        size: Lowest and highest height of the text as a share of the image's short side, in (0, 1].
        places: Names of `PLACES`.
        colours: Fill colours, names or hex codes as Pillow reads them.
        outline: Lowest and highest width of the outline as a share of the text height.
        rotation: Lowest and highest angle in degrees, counter-clockwise.
        opacity: Lowest and highest opacity, in (0, 1].
        sticker: Share of the attacks on a sticker, a box of its own colour, 0..1.
        sticker_colours: Colours of stickers.
        min_contrast: Contrast ratio of the text to its background, 1..21, as for `draw_text`.
        min_side: Images with a shorter side, in pixels, are enlarged to it first. Give the model's input size.
        crop: Side of the central square that the model sees, in pixels. The image is resized and cropped to it first,
            so that no word is cut off later and drawing is faster. None writes on the whole image.
        redraw: "every_epoch" draws words and styles again each epoch; "never" keeps both from epoch 0, so that the
            reference policy sees each image only once.
        seed: Seed of all draws.

    Raises:
        ValueError, TypeError: If an argument is out of range or of the wrong type; the message names it.

    Source: the attack of Afzali et al. 2025, arXiv 2411.08923, with its parameters opened.
    """

    words: Sequence[str]
    other_words: Sequence[str] = ()
    other_share: float = 0.0
    count: tuple[int, int] = (1, 1)
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
    crop: int | None = None
    redraw: str = "every_epoch"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every argument."""
        self._check_types()
        words = {spelling(word) for word in self.words}
        if isinstance(self.words, str) or len(words) < 2 or not all(w.strip() for w in self.words):
            raise ValueError(
                f"words must be a list of at least two different words, none empty, got {self.words!r}. "
                "With a single word, no wrong word is left for the images of its class."
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
        if not 0 <= self.other_share <= 1 or (self.other_share > 0 and not self.other_words):
            raise ValueError(
                f"other_share must be the share of the {len(self.other_words)} other_words among written words, 0 to "
                f"1, got {self.other_share!r}; above 0 it needs other_words."
            )
        if self.other_share > 0 and words.issuperset(map(spelling, self.other_words)):
            raise ValueError(f"other_words are all among words: {list(self.other_words)!r}. Give words of no class.")
        if not 1 <= self.count[0] <= self.count[1] <= len(words) - 1:
            raise ValueError(
                f"count must be (lowest, highest) number of words on an image, from 1 to {len(words) - 1}, "
                f"one less than there are words, got {self.count!r}."
            )
        if not 0 <= self.sticker <= 1:
            raise ValueError(f"sticker must be the share of attacks on a sticker, 0 to 1, got {self.sticker!r}.")
        if self.redraw not in ("every_epoch", "never"):
            raise ValueError(f"redraw must be 'every_epoch' or 'never', got {self.redraw!r}.")
        if not 1 <= self.min_contrast <= 21:
            raise ValueError(f"min_contrast must be a contrast ratio, 1 to 21, got {self.min_contrast!r}.")
        for name in ("places", "fonts", "colours", "sticker_colours"):
            values = getattr(self, name)
            if isinstance(values, str) or not values:
                raise ValueError(f"{name} must be a list that is not empty, got {values!r}.")
        wrong = [place for place in self.places if place not in PLACES]
        if wrong:
            raise ValueError(f"places: unknown {wrong}; known are {sorted(PLACES)}.")
        for font in self.fonts:
            load_font(font, SMALLEST_TEXT)
        for word in self.vocabulary:
            fonts_for(word, self.fonts)
        if self.count[1] > 1:  # any of them may share an image, and an image has one font
            fonts_for("".join(sorted(set("".join(self.vocabulary)))), self.fonts)
        for name in ("colours", "sticker_colours"):
            for colour in getattr(self, name):
                _check_colour(colour, name)

    def _check_types(self) -> None:
        for name in ("words", "other_words", "places", "fonts", "colours", "sticker_colours"):
            texts = getattr(self, name)
            wrong = [text for text in texts if not isinstance(text, str)] if isinstance(texts, Sequence) else [texts]
            if wrong or (name == "other_words" and isinstance(texts, str)):
                raise TypeError(
                    f"{name} must be a list of texts, got {wrong[0] if wrong else texts!r} in it or for it."
                )
        for name in ("size", "outline", "rotation", "opacity", "count"):
            pair = getattr(self, name)
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(f"{name} must be two numbers, (lowest, highest), got {pair!r}.")
            for number in pair:
                check_number(name, number, COUNT if name == "count" else FINITE)
        for name in ("other_share", "sticker", "min_contrast"):
            check_number(name, getattr(self, name), FINITE)
        check_number("min_side", self.min_side, COUNT, "Give the model's input size in pixels.")
        if self.crop is not None:
            check_number("crop", self.crop, COUNT, "Give the side of the model's input in pixels, or None.")

    def _random(self, purpose: str, index: int, epoch: int) -> random.Random:
        return random.Random(f"{purpose}/{self.seed}/{0 if self.redraw == 'never' else epoch}/{index}")

    @property
    def vocabulary(self) -> list[str]:
        """Every word that may be written, without repetition."""
        if not self.other_share:
            return list(dict.fromkeys(self.words))
        known = {spelling(word) for word in self.words}
        return list(dict.fromkeys([*self.words, *(w for w in self.other_words if spelling(w) not in known)]))

    @functools.cached_property
    def _pools(self) -> tuple[tuple[list[str], dict[str, list[int]]], ...]:
        """Attack words and other words, each with the positions of a word by its `spelling`."""
        pools = []
        for words in (list(self.words), self.vocabulary[len(set(self.words)) :]):
            places: dict[str, list[int]] = {}
            for place, word in enumerate(words):
                places.setdefault(spelling(word), []).append(place)
            pools.append((words, places))
        return tuple(pools)

    def check_words_left(self, exclude: Collection[str]) -> None:
        """Raise if a row could run out of words to draw.

        Args:
            exclude: Words that must not be written on the row, such as its class.

        Raises:
            ValueError: If fewer than `count[1]` words are left of those that may be drawn.
        """
        excluded = {spelling(word) for word in exclude}
        for share, (words, places) in zip((1 - self.other_share, self.other_share), self._pools, strict=True):
            if share > 0 and len(places.keys() - excluded) < self.count[1]:
                raise ValueError(
                    f"words: of {words[:5]}{'...' if len(words) > 5 else ''}, too few are left for images of "
                    f"{', '.join(map(repr, exclude))}: up to {self.count[1]} are written on an image, and never its "
                    "class. Give more words."
                )

    def written(self, index: int, epoch: int = 0, exclude: Collection[str] = ()) -> tuple[str, ...]:
        """Draw the attack words of a row.

        Args:
            index: Row of the dataset.
            epoch: Epoch, counted from 0.
            exclude: Words that must not be written in any spelling, such as the row's true class.

        Returns:
            The words in the order in which they are written, `count[0]` to `count[1]` of them. No two are equal, even
            in upper or lower case. The first is the same for any `count`.

        Raises:
            ValueError: If `exclude` and the words drawn so far leave none to draw from `words`, or from `other_words`
                where one of these is drawn.
        """
        excluded = {spelling(word) for word in exclude}
        rng = self._random("word", index, epoch)
        chosen: list[str] = []
        # The number is drawn last, so that the first word is the same for any `count`.
        while len(chosen) < self.count[1]:
            others = self.other_share > 0 and rng.random() < self.other_share
            pool, places = self._pools[others]
            gone = sorted(place for word in excluded for place in places.get(word, ()))
            if len(gone) == len(pool):
                raise ValueError(f"words: all of {pool!r} are excluded for row {index}; give more words.")
            place = rng.choice(range(len(pool) - len(gone)))  # among the remaining words, without listing them
            for missing in gone:
                place += missing <= place
            chosen.append(pool[place])
            excluded.add(spelling(chosen[-1]))
        return tuple(chosen[: rng.randint(*self.count)])

    def word(self, index: int, epoch: int = 0, exclude: Collection[str] = ()) -> str:
        """Return the attack words of a row as one text, separated by spaces.

        Args:
            index: Row of the dataset.
            epoch: Epoch, counted from 0.
            exclude: Words that must not be written, as for `written`.

        Returns:
            The words of `written`, in the same order.

        Raises:
            ValueError: If no word is left, as for `written`.
        """
        return " ".join(self.written(index, epoch, exclude))

    def meaningless(self, word: str, index: int, epoch: int = 0) -> str:
        """Return a string of consonants as long as a word that spells no attack word: the control for occlusion.

        Of several strings, it is the one whose ink and width in the row's font are closest to the word's.

        Args:
            word: The attack word; not empty.
            index: Row of the dataset.
            epoch: Epoch, counted from 0.

        Returns:
            The string: each letter or digit of the word becomes a consonant in the same case. Other characters, such
            as spaces, stay. Neither the string nor a part of it between spaces is an attack word.

        Raises:
            ValueError: If every string that was tried is an attack word, or `word` is empty.
        """
        if not word.strip():
            raise ValueError(f"An attack word must not be empty, got {word!r}.")
        rng = self._random("meaningless", index, epoch)
        known = {spelling(known) for known in self.vocabulary}
        drawn = ("".join(_consonant(letter, rng) for letter in word) for _ in range(_MOST_TRIES))
        free = (string for string in drawn if not known & {spelling(part) for part in (string, *string.split())})
        strings = list(itertools.islice(free, _CONTROLS))
        if not strings:
            raise ValueError(
                f"Every string of consonants as long as {word!r} that was tried is one of the {len(known)} attack "
                "words. Give longer words, or measure without the control."
            )
        font = self._style_of(word, index, epoch).font
        ink, width = ink_and_width(word, font)

        def distance(string: str) -> float:
            other_ink, other_width = ink_and_width(string, font)
            return abs(other_ink - ink) / max(ink, 1) + abs(other_width - width) / max(width, 1)

        return min(strings, key=distance)

    def style(self, index: int, epoch: int = 0) -> TextStyle:
        """Draw the style of a row.

        Args:
            index: Row of the dataset.
            epoch: Epoch, counted from 0. It changes nothing if `redraw` is "never".

        Returns:
            The style, with all `colours` in random order.
        """
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

    def _style_of(self, text: str, index: int, epoch: int) -> TextStyle:
        """Return the style of a row, in another font if its own lacks letters of a text."""
        style = self.style(index, epoch)
        if not missing_letters(text, style.font):
            return style
        return replace(style, font=self._random("font", index, epoch).choice(fonts_for(text, self.fonts)))

    def canvas(self, image: Image.Image) -> Image.Image:
        """Return the image that words are written on: cropped to `crop`, or enlarged to `min_side`.

        Args:
            image: PIL image of any mode.

        Returns:
            RGB image: `crop` by `crop` pixels, or without `crop` of the same aspect ratio and with a short side >=
            `min_side`.

        Raises:
            TypeError: If `image` is not a PIL image.
            ValueError: If it can't be converted; see `to_rgb`.
        """
        return enlarge(image, self.min_side) if self.crop is None else middle(to_rgb(image), self.crop)

    def draw(self, image: Image.Image, text: str, index: int, epoch: int = 0) -> Image.Image:
        """Write a text on an image in the row's style.

        Args:
            image: The clean image; the text is written on its `canvas`.
            text: The text to write.
            index: Row of the dataset.
            epoch: Epoch, counted from 0.

        Returns:
            The attacked image, RGB.
        """
        return draw_text(self.canvas(image), text, self._style_of(text, index, epoch), self.min_contrast)

    def draw_control(self, image: Image.Image, word: str, index: int, epoch: int = 0) -> Image.Image:
        """Write `meaningless(word)` on an image as `draw` writes the word, with the same style, font size and lines.

        Args:
            image: The clean image; the string is written on its `canvas`.
            word: The attack word that the string replaces.
            index: Row of the dataset.
            epoch: Epoch, counted from 0.

        Returns:
            The occluded image, RGB.
        """
        text, style = self.meaningless(word, index, epoch), self._style_of(word, index, epoch)
        return draw_text(self.canvas(image), text, style, self.min_contrast, sized_for=word)

    def draw_blank(self, image: Image.Image, word: str, index: int, epoch: int = 0) -> Image.Image:
        """Cover the place where `draw` writes a word with an empty box: pure occlusion, an upper bound.

        Args:
            image: The clean image; the box is drawn on its `canvas`.
            word: The attack word to cover.
            index: Row of the dataset.
            epoch: Epoch, counted from 0.

        Returns:
            The covered image, RGB.
        """
        return draw_blank(self.canvas(image), word, self._style_of(word, index, epoch))
