"""Attack words: everyday words that are not classes, and which words are spellings of one."""

import re
import unicodedata
from importlib.resources import files

EVERYDAY_WORDS = tuple(files("clip_po").joinpath("assets", "everyday_words.txt").read_text().split())
"""Common English nouns in alphabetical order, without animals and vehicles."""

_SEPARATORS = re.compile(r"[\s_-]+")
_EDGES = " .,;:!?'\""


def spelling(word: str) -> str:
    """Return what all spellings of a word have in common, so that "Polar bear" and "polar_bear" are one word.

    Case, repeated and outer spaces, invisible characters and punctuation at the ends don't count. Underscores and
    hyphens count as spaces. Texts with the same token ids are spellings of one word; the reverse need not hold.

    Args:
        word: A class name or an attack word.

    Returns:
        The word in lower case, with single spaces between its parts; never empty if `word` has a visible letter.
    """
    composed = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())
    visible = "".join(letter for letter in composed if unicodedata.category(letter) != "Cf")
    return _SEPARATORS.sub(" ", visible).strip(_EDGES) or visible
