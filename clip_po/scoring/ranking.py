"""Rankings of texts for an image and of images for a text, with their cosines and probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("image", pa.string()),
        ("text", pa.string()),
        ("rank", pa.int64()),
        ("cosine", pa.float64()),
        ("probability", pa.float64()),
        ("error", pa.string()),
    ]
)
"""Columns of a ranking: one line for each ranked pair, and one with `error` for what could not be scored."""

Line = dict[str, Any]


def best_first(cosines: np.ndarray, numbers: np.ndarray, top_k: int | None) -> np.ndarray:
    """Return the positions of the best candidates of each anchor. Equal ones come in the order of their numbers.

    Args:
        cosines: Array [A, N].
        numbers: Array [N] or [A, N] that orders equal candidates.
        top_k: Number of candidates to return; None for all.

    Returns:
        Array [A, min(N, top_k)] of positions.
    """
    order = np.lexsort((np.broadcast_to(numbers, cosines.shape), -cosines))
    return order[:, :top_k]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Compute the softmax over the last axis in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def line_of(row: int, image: str, text: str, rank: int, cosine: float, probability: float) -> Line:
    """Return a line of a ranking.

    Args:
        row: Number of the row of the image or, with candidates of its own, of the anchor.
        image: Name of the image.
        text: The text.
        rank: Rank among the candidates of the anchor, from 1.
        cosine: cos(image, text).
        probability: Probability of the candidate among all candidates of the anchor.

    Returns:
        The values by column of `SCHEMA`, rounded to six digits.
    """
    score = {"cosine": round(float(cosine), 6), "probability": float(f"{probability:.6g}")}
    return {"row": row, "image": image, "text": text, "rank": rank, **score}


def ranked_lines(
    row: int,
    images: Sequence[str],
    texts: Sequence[str],
    cosines: np.ndarray,
    logits: np.ndarray,
    top_k: int | None,
) -> Iterator[Line]:
    """Rank the texts for each image; if there are several images and one text, the images for the text.

    Args:
        row: Number of the row.
        images: Names of I images.
        texts: T texts. I or T is 1.
        cosines: Array [I, T].
        logits: Array [I, T].
        top_k: As for `best_first`.

    Yields:
        The lines, best first.
    """
    cosine, probability = cosines.reshape(-1), softmax(logits.reshape(-1))
    pairs = [(image, text) for image in images for text in texts]
    for rank, position in enumerate(best_first(cosine[None], np.arange(len(cosine)), top_k)[0], 1):
        image, text = pairs[position]
        yield line_of(row, image, text, rank, cosine[position], probability[position])


@dataclass
class BestImages:
    """The best images for each of several texts, over images that come in parts.

    With `top_k`, memory does not grow with the number of images: only the best ones and the normalizers of the
    probabilities are kept.

    Attributes:
        texts: T texts.
        top_k: Number of images to keep for each text; None for all.
    """

    texts: Sequence[str]
    top_k: int | None
    _parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list, init=False)
    _names: dict[int, str] = field(default_factory=dict, init=False)
    _log_sums: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        """Start without images."""
        self._log_sums = np.full(len(self.texts), -np.inf)

    def add(self, numbers: Sequence[int], names: Sequence[str], cosines: np.ndarray, logits: np.ndarray) -> None:
        """Add images.

        Args:
            numbers: Row numbers of I images, which order equal ones.
            names: Their names.
            cosines: Array [I, T].
            logits: Array [I, T].
        """
        self._log_sums = np.logaddexp(self._log_sums, np.logaddexp.reduce(logits.astype(np.float64), axis=0))
        self._names |= zip(numbers, names, strict=True)
        self._parts.append((cosines.T, logits.T, np.broadcast_to(np.asarray(numbers, np.int64), cosines.T.shape)))
        if self.top_k is not None:
            self._cut()

    def merge(self, other: BestImages) -> None:
        """Add the images of another part, such as that of another process.

        Args:
            other: The part, of the same texts.
        """
        self._log_sums = np.logaddexp(self._log_sums, other._log_sums)
        self._names |= other._names
        self._parts += other._parts

    def lines(self) -> Iterator[Line]:
        """Return the ranking of each text.

        Yields:
            The lines, text by text, best first.
        """
        if not self._parts:
            return
        self._cut()
        for text, cosines, logits, numbers, log_sum in zip(self.texts, *self._parts[0], self._log_sums, strict=True):
            shares = np.exp(logits.astype(np.float64) - log_sum)
            for rank, (number, cosine, share) in enumerate(zip(numbers.tolist(), cosines, shares, strict=True), 1):
                yield line_of(number, self._names[number], text, rank, cosine, share)

    def _cut(self) -> None:
        """Join the parts, sorted, with the best images alone."""
        cosines, logits, numbers = (np.concatenate(parts, axis=1) for parts in zip(*self._parts, strict=True))
        order = best_first(cosines, numbers, self.top_k)
        best = [np.take_along_axis(values, order, axis=1) for values in (cosines, logits, numbers)]
        self._parts = [(best[0], best[1], best[2])]
        kept = set(best[2].ravel().tolist())
        self._names = {number: name for number, name in self._names.items() if number in kept}
