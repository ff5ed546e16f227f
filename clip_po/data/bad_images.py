"""Unreadable images: replaced by a blank one, and their rows skipped and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from clip_po.data.images import blank_image
from clip_po.validation import UnreadableImage

logger = logging.get_logger(__name__)

OnBadImage = Literal["raise", "skip"]

MOST_NAMED = 3
"""Number of skipped rows for which a process logs the reason. Further rows are only counted."""


def read_or_blank(read: Callable[[], Image.Image], on_bad_image: OnBadImage) -> tuple[Image.Image, str]:
    """Read an image, or replace it by a blank one where it can't be read.

    Args:
        read: Reads the image.
        on_bad_image: "raise" re-raises, "skip" replaces the image.

    Returns:
        The image and ""; or a blank image and the reason.

    Raises:
        UnreadableImage: If the image can't be read and `on_bad_image` is "raise".
    """
    try:
        return read(), ""
    except UnreadableImage as error:
        if on_bad_image == "raise":
            raise
        return blank_image(), str(error)


class SkippedRows:
    """Count of skipped rows. The first few are named in warnings."""

    def __init__(self) -> None:
        self._since, self._skipped, self._seen, self._first = 0, 0, 0, ""

    def add(self, reasons: Sequence[str]) -> None:
        """Add rows.

        Args:
            reasons: Why each row was skipped; "" for a row that was not.
        """
        self._seen += len(reasons)
        for reason in filter(None, reasons):
            self._first = self._first or reason
            self._since += 1
            self._skipped += 1
            if self._skipped <= MOST_NAMED:
                more = " Further rows are only counted." * (self._skipped == MOST_NAMED)
                logger.warning(f"Skipped, by on_bad_image='skip': {reason}{more}")

    def pop(self, reduce: Callable[[Tensor], Tensor], device: torch.device, fewest: int) -> int:
        """Return the number of rows skipped since the last call. All processes must call this method together.

        Args:
            reduce: Sums a tensor over processes, such as `accelerator.reduce`.
            device: Device of the tensor.
            fewest: Number of rows from which on it is an error if all were skipped.

        Returns:
            The number, summed over all processes.

        Raises:
            ValueError: If all rows added so far, by all processes, were skipped, and there are at least `fewest`.
        """
        counts = torch.tensor([self._since, self._skipped, self._seen], device=device)
        since, skipped, seen = reduce(counts).tolist()
        self._since = 0
        if skipped == seen >= fewest:
            raise ValueError(
                f"All {seen} rows so far were skipped (on_bad_image='skip'), so nothing is left to train or evaluate "
                f"on. {self._first or 'The logs of other processes say why.'} Check what the rows share, such as the "
                "folder of their paths."
            )
        return int(since)
