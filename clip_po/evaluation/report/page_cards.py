"""The images of a report's page, with the answers before and after alignment."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from clip_po.data.attacks.words import spelling
from clip_po.evaluation.report.before_after import Example, Gallery

_SIDE = 384  # Longest side of a thumbnail, in pixels.
_SMALL = 96  # Images up to this side, in pixels, are embedded without loss and shown enlarged.


@dataclass(frozen=True)
class ExampleCard:
    """An example with its image.

    Attributes:
        example: The answers before and after alignment.
        image: The image as a data URI.
        pixelated: Whether the image is enlarged without smoothing.
    """

    example: Example
    image: str
    pixelated: bool = False

    def verdict(self, answer: str) -> str:
        """Classify an answer.

        Args:
            answer: Name of the predicted class.

        Returns:
            "right" for the true class, "word" for the written word, "other" for any other answer.
        """
        if answer == self.example.truth:
            return "right"
        return "word" if spelling(answer) == spelling(self.example.word) else "other"


@dataclass(frozen=True)
class CardGallery:
    """The cards of a gallery.

    Attributes:
        title: Heading.
        note: A line below it, such as the number of images per kind of change.
        cards: The cards by kind of change.
        with_words: Whether a word is written on the images.
    """

    title: str
    note: str
    cards: Mapping[str, Sequence[ExampleCard]]
    with_words: bool


def card_gallery(gallery: Gallery) -> CardGallery:
    """Embed the images of a gallery.

    Args:
        gallery: The gallery.

    Returns:
        Its cards.
    """
    cards: dict[str, list[ExampleCard]] = {}
    for example in gallery.examples:
        cards.setdefault(example.change, []).append(_card(example, gallery.picture(example.index)))
    return CardGallery(gallery.title, gallery.note, cards, any(example.word for example in gallery.examples))


def _card(example: Example, image: Image.Image) -> ExampleCard:
    image = image.convert("RGB")
    file, kind = io.BytesIO(), "png"
    pixelated = max(image.size) <= _SMALL
    if pixelated:
        image.save(file, format="PNG", optimize=True)
    else:
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        image.save(file, format="JPEG", quality=88, subsampling=0)
        kind = "jpeg"
    return ExampleCard(example, f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", pixelated)
