"""Images that can't be read: what rows get in their place, and how such rows are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from clip_po.validation import UnreadableImage as UnreadableImage

logger = logging.get_logger(__name__)

MOST_NAMED = 3
"""Skipped rows that a process names with their reason; the others are only counted."""


def blank_image() -> Image.Image:
    """What stands in for an image that can't be read, so that batches keep their shape."""
    return Image.new("RGB", (32, 32))


class SkippedRows:
    """Counts the rows that were skipped and names the first few of them in warnings."""

    def __init__(self) -> None:
        self._since, self._skipped, self._seen, self._first = 0, 0, 0, ""

    def add(self, reasons: Sequence[str]) -> None:
        """Add rows: why each was skipped, "" for those that were not."""
        self._seen += len(reasons)
        for reason in filter(None, reasons):
            self._first = self._first or reason
            self._since += 1
            self._skipped += 1
            if self._skipped <= MOST_NAMED:
                more = " Further rows are only counted: skipped_rows in the logs." * (self._skipped == MOST_NAMED)
                logger.warning(f"Skipped, by on_bad_image='skip': {reason}{more}")

    def pop(self, reduce: Callable[[Tensor], Tensor], device: torch.device, fewest: int) -> int:
        """The number of rows skipped since the last call, over all processes.

        Args:
            reduce: Sums a tensor over processes, such as `accelerator.reduce`.
            device: Where the tensor is to lie.
            fewest: From so many rows on, they must not all have been skipped.

        Raises:
            ValueError: All rows were skipped.
        """
        counts = torch.tensor([self._since, self._skipped, self._seen], device=device)
        since, skipped, seen = reduce(counts).tolist()
        self._since = 0
        if skipped == seen >= fewest:
            raise ValueError(
                f"All {seen} rows so far were skipped (on_bad_image='skip'), so nothing is left to learn from or to "
                f"measure. {self._first or 'Other processes say why.'} Look at what all of them share, such as the "
                "folder that their paths lead to."
            )
        return int(since)
