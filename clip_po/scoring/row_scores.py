"""Scores of the candidates of rows: images read in threads, one pass of each tower for many rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from clip_po.data.candidate_rows import CandidateRow
from clip_po.scoring.ranking import Line, ranked_lines
from clip_po.scoring.scorer import Scorer
from clip_po.validation import UnreadableImage


@dataclass(frozen=True)
class PreparedRow:
    """A row whose images are read.

    Attributes:
        row: The row.
        pixels: Its readable images by position, prepared for the model.
        errors: Why the others can't be read, by position.
        refused: Why the row as a whole can't be scored; "" if it can.
    """

    row: CandidateRow
    pixels: dict[int, Tensor]
    errors: dict[int, str]
    refused: str

    def error_lines(self) -> Iterator[Line]:
        """Return a line for the row if it can't be scored, and for each image that can't be read."""
        if self.refused:
            yield {"row": self.row.number, "error": self.refused}
        for position, error in self.errors.items():
            yield {"row": self.row.number, "image": self.row.image_names[position], "error": error}


@dataclass(frozen=True)
class RowScores:
    """A row with the scores of its readable images.

    Attributes:
        prepared: The row.
        images: Names of I readable images.
        cosines: Array [I, T].
        logits: Array [I, T].
    """

    prepared: PreparedRow
    images: Sequence[str]
    cosines: np.ndarray
    logits: np.ndarray

    def lines(self, top_k: int | None) -> Iterator[Line]:
        """Return the ranking of the candidates, and what could not be scored.

        Args:
            top_k: Number of candidates; None for all.

        Yields:
            The lines, best first, and those with errors last.
        """
        row = self.prepared.row
        if len(self.images):
            yield from ranked_lines(row.number, self.images, row.texts, self.cosines, self.logits, top_k)
        yield from self.prepared.error_lines()


def prepare_row(row: CandidateRow, scorer: Scorer) -> PreparedRow:
    """Read the images of a row.

    Args:
        row: The row.
        scorer: Prepares the images.

    Returns:
        The row with its pixels, and with the reasons why it or an image of it can't be scored.
    """
    if refused := why_not(row):
        return PreparedRow(row, {}, {}, refused)
    pixels, errors = {}, {}
    for position in range(len(row.images)):
        try:
            pixels[position] = scorer.pixels(row.read_image(position))
        except UnreadableImage as error:
            errors[position] = str(error)
    return PreparedRow(row, pixels, errors, "")


def why_not(row: CandidateRow) -> str:
    """Return why a row can't be scored.

    Args:
        row: The row.

    Returns:
        The reason with a remedy; "" if it can be scored.
    """
    if not row.images or not row.texts:
        return f"Row {row.number} has no {'text' if row.images else 'image'}. Fill it in or drop the row."
    if len(row.images) > 1 and len(row.texts) > 1:
        return (
            f"Row {row.number} has {len(row.images)} images and {len(row.texts)} texts. Give one image with texts, or "
            "one text with images."
        )
    strange = [text for text in row.texts if not isinstance(text, str) or not text.strip()]
    return f"Row {row.number}: {strange[0]!r} is not a text. Fill it in or drop the row." if strange else ""


def score_rows(scorer: Scorer, rows: Sequence[PreparedRow]) -> Iterator[RowScores]:
    """Score rows, with one embedding of each image and each distinct text.

    Args:
        scorer: The checkpoint.
        rows: The rows.

    Yields:
        The rows with their scores, in their order.
    """
    pixels = [pixels for row in rows for pixels in row.pixels.values()]
    place = {
        text: number for number, text in enumerate(dict.fromkeys(t for r in rows if r.pixels for t in r.row.texts))
    }
    if pixels:
        image_embeds, text_embeds = scorer.embed_pixels(pixels), scorer.embed_texts(list(place))
        cosines = (image_embeds @ text_embeds.T).cpu().numpy()
        logits = scorer.logits(image_embeds, text_embeds).cpu().numpy()
    else:
        cosines = logits = np.empty((0, len(place)), np.float32)
    start = 0
    for prepared in rows:
        stop, names = start + len(prepared.pixels), prepared.row.image_names
        columns = [place[text] for text in prepared.row.texts] if prepared.pixels else []
        readable = [names[position] for position in prepared.pixels]
        yield RowScores(prepared, readable, cosines[start:stop, columns], logits[start:stop, columns])
        start = stop
