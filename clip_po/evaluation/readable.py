"""The rows of a dataset that an evaluation can measure: those whose images can be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers.utils import logging

from clip_po.data.bad_images import OnBadImage, SkippedRows, read_or_blank
from clip_po.data.images import read_image, read_images
from clip_po.evaluation.zero_shot import collect_answers

logger = logging.get_logger(__name__)

_READ_AT_ONCE = 64


def readable_rows(
    dataset: Dataset,
    image_column: str = "image",
    on_bad_image: OnBadImage = "skip",
    *,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
) -> Dataset:
    """Return the rows whose images can be read. An evaluation of them skips the others, for all models alike.

    Every image is read once for this, and again by the evaluation. Warnings name the first skipped rows with the
    reason, and give the number of all.

    Args:
        dataset: One split with images.
        image_column: Name of the image column.
        on_bad_image: "skip" leaves out rows whose image can't be read. "raise" reads no image and returns the dataset
            as it is, so that the evaluation stops at the first such row.
        num_workers: Number of worker processes that read images, >= 0.
        accelerator: Divides the rows among its processes; every process gets the same rows. None reads all of them in
            this process.
        disable_tqdm: Whether to hide the progress bar.

    Returns:
        The rows in their order; the dataset itself if no row is left out.

    Raises:
        ValueError: If `on_bad_image` is unknown, the column is missing, there are no rows, or no image can be read.
        TypeError: If `dataset` is not a single split.
    """
    if on_bad_image == "raise":
        return dataset
    if on_bad_image != "skip":
        raise ValueError(f"on_bad_image must be 'raise' or 'skip', got {on_bad_image!r}.")
    skipped = SkippedRows()

    def answers(batch: dict[str, Any]) -> Tensor:
        skipped.add(batch["reason"])
        return torch.tensor([[not reason] for reason in batch["reason"]])

    readings = _Readings(read_images(dataset, image_column), image_column)
    can_be_read = collect_answers(
        readings, answers, 1, _READ_AT_ONCE, num_workers, accelerator, disable_tqdm, "Reading images"
    )
    kept = np.flatnonzero(can_be_read)
    if not len(kept):
        raise ValueError(f"None of the {len(dataset)} images can be read. {readings[0]['reason']}")
    if len(kept) == len(dataset):
        return dataset
    logger.warning(f"{len(dataset) - len(kept)} of {len(dataset)} rows are skipped: their images can't be read.")
    return dataset.select(kept)


class _Readings(torch.utils.data.Dataset):
    """Why each image can't be read; "" if it can."""

    def __init__(self, images: Dataset, image_column: str) -> None:
        self.images, self.image_column = images, image_column

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, str]:
        _, reason = read_or_blank(lambda: read_image(self.images, self.image_column, row), "skip")
        return {"reason": reason}
