"""Which words a font can draw: a missing letter would be a box on the image, and the attack would carry no word."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

from PIL import features

from clip_po.data.attacks.fonts import load_font, training_fonts

_UNASSIGNED = "\U000f0000"
"""A code point for private use. A font draws it as it draws any letter that it lacks."""

_NOT_IN_TEX = frozenset('"<>\\^_`{|}~')
"""ASCII characters that fonts in TeX's encoding, such as Computer Modern, draw as other signs."""

_PACKAGES = {
    "CJK": "fonts-noto-cjk",
    "HIRAGANA": "fonts-noto-cjk",
    "KATAKANA": "fonts-noto-cjk",
    "HANGUL": "fonts-noto-cjk",
}
"""Debian packages of fonts by the first word of a character's Unicode name."""


@functools.lru_cache(maxsize=65_536)  # asked more than once for each image that is drawn
def missing_letters(text: str, font: str) -> str:
    """Return the characters of a text that a font does not draw as what they are.

    A character is missing if it looks like an unassigned code point, or is invisible though it should not be.

    Args:
        text: Any text.
        font: Name of the font, as for `load_font`.

    Returns:
        The characters, each once, in order; "" if the font draws the text.
    """
    letters = dict.fromkeys(unicodedata.normalize("NFC", text))
    return "".join(letter for letter in letters if not _draws(letter, font))


@functools.lru_cache(maxsize=65_536)
def _draws(letter: str, font: str) -> bool:
    if _is_blank(letter):
        return True
    (width, height), _ = _mask("|", font)
    if width > height and (letter in _NOT_IN_TEX or not letter.isascii()):  # TeX has a dash in its place
        return False
    size, ink = _mask(letter, font)
    return any(ink) and (size, ink) != _mask(_UNASSIGNED, font)


def _is_blank(letter: str) -> bool:
    """Return whether a character is to draw nothing: a space, a joiner, or a mark of direction."""
    return letter.isspace() or unicodedata.category(letter) == "Cf"


@functools.lru_cache(maxsize=1024)
def _mask(letter: str, font: str) -> tuple[tuple[int, int], bytes]:
    mask = load_font(font, 24).getmask(letter)
    return mask.size, bytes(mask)


def fonts_for(text: str, fonts: Sequence[str]) -> list[str]:
    """Return the fonts that draw every character of a text.

    Args:
        text: The text.
        fonts: Names of fonts, as for `load_font`.

    Returns:
        The fonts, in their order; not empty.

    Raises:
        ValueError: If there is none, the text is empty, or it holds line breaks or other control characters.
    """
    if all(map(_is_blank, text)):
        raise ValueError(f"An attack word must not be empty, got {text!r}.")
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise ValueError(f"words: {text!r} holds a line break or another control character. Remove it.")
    leftwards = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text)
    if leftwards and not (features.check("raqm") and features.check("fribidi")):
        raise ValueError(
            f"words: {text!r} is written from right to left, which this installation of Pillow does not support. "
            "Install libraqm and fribidi (Debian: libraqm0 libfribidi0), or leave the word out."
        )
    found = [font for font in fonts if not missing_letters(text, font)]
    if not found:
        fewest = min((missing_letters(text, font) for font in fonts), key=len)
        raise ValueError(
            f"words: none of the {len(fonts)} fonts can draw {text!r}; even the best one lacks {fewest!r} and would "
            f"draw boxes or other signs. Give a font that has its letters with fonts=[PATH] (--attack_fonts PATH), "
            f"for example {_source(text, fewest[0])}, or leave the word out."
        )
    return found


def _source(text: str, letter: str) -> str:
    """Return an installed font that draws a text, else a Debian package that may have one for a letter."""
    installed = [font for font in training_fonts() if not missing_letters(text, font)]
    if installed:
        return installed[0]
    return f"one from the Debian package {_package(letter)}"


def _package(letter: str) -> str:
    if unicodedata.category(letter) == "So":  # emoji and other symbols, in one colour
        return "fonts-symbola"
    return _PACKAGES.get(unicodedata.name(letter, "").split(" ")[0].split("-")[0], "fonts-noto-core")
