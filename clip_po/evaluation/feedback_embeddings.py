"""Embeddings of the images and texts of feedback by several models; rows with unreadable images are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from clip_po.data.bad_images import OnBadImage, SkippedRows, read_or_blank
from clip_po.data.column_images import ColumnImages, Place
from clip_po.data.images import to_pixels
from clip_po.encoding import encode_texts, evaluating
from clip_po.evaluation.embeddings import embed_batch, embedding_sizes, split_by_model
from clip_po.evaluation.zero_shot import collect_answers
from clip_po.models import check_processor, dual_encoder
from clip_po.text_identity import TextTokens


@dataclass(frozen=True)
class Measuring:
    """How an evaluation of feedback runs.

    Attributes:
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        on_bad_image: "raise" stops at an image that can't be read, "skip" leaves its row out.
        accelerator: Divides the images among its processes; every process gets the whole result. None runs in this
            process alone.
        disable_tqdm: Whether to hide the progress bar.
        title: Label of the progress bar.
    """

    batch_size: int = 64
    num_workers: int = 0
    on_bad_image: OnBadImage = "raise"
    accelerator: Accelerator | None = None
    disable_tqdm: bool = False
    title: str = "Feedback"


@dataclass(frozen=True)
class FeedbackEmbeddings:
    """Embeddings of I images and M texts.

    Attributes:
        images: Tensor[I, D] by model, unit-norm.
        texts: Tensor[M, D] by model, unit-norm.
        readable: Array [I] of truth values: whether each image could be read.
    """

    images: Mapping[str, Tensor]
    texts: Mapping[str, Tensor]
    readable: np.ndarray


def embed_feedback(
    models: Mapping[str, Any],
    processor: Any,
    dataset: Dataset,
    places: Sequence[Place],
    texts: Sequence[str],
    how: Measuring,
) -> FeedbackEmbeddings:
    """Embed images and texts with several models. Each image is read once.

    Args:
        models: Two-tower models, or PeftModels around one, by name. They share the processor.
        processor: Processor of the models.
        dataset: One split.
        places: Where the images are.
        texts: M texts.
        how: Batches, processes and unreadable images.

    Returns:
        The embeddings.

    Raises:
        ValueError: If there are no models, no images, or no image can be read; as for `check_processor` and
            `collect_answers`; or for an unreadable image with "raise".
        TypeError: As for `check_processor`.
    """
    if not models:
        raise ValueError("models is empty. Give at least one model by name.")
    for model in models.values():
        check_processor(processor, model)
    tokens = TextTokens.of(processor, dual_encoder(next(iter(models.values()))))
    tokens.warn_of_cut(tokens.learn(texts), "the dataset")
    skipped = SkippedRows()

    def embed(batch: dict[str, Any]) -> Tensor:
        skipped.add(batch["reason"])
        readable = torch.tensor([[float(not reason)] for reason in batch["reason"]])
        return torch.cat([embed_batch(models, batch["pixel_values"]), readable], dim=1)

    items = _Items(ColumnImages(dataset, places), processor, how.on_bad_image)
    with evaluating(*models.values()):
        table = collect_answers(
            items,
            embed,
            sum(embedding_sizes(models)) + 1,
            how.batch_size,
            how.num_workers,
            how.accelerator,
            how.disable_tqdm,
            how.title,
            torch.float32,
        )
    readable = table[:, -1] > 0
    if not readable.any():
        raise ValueError(f"None of the {len(places)} images can be read. {items[0]['reason']}")
    return FeedbackEmbeddings(
        split_by_model(models, np.ascontiguousarray(table[:, :-1])),
        {name: encode_texts(model, processor, texts).float() for name, model in models.items()},
        readable,
    )


class _Items(torch.utils.data.Dataset):
    """Pixels of the images, and why one can't be read; "" if it can."""

    def __init__(self, images: ColumnImages, processor: Any, on_bad_image: OnBadImage) -> None:
        self.images, self.processor, self.on_bad_image = images, processor, on_bad_image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> dict[str, Any]:
        image, reason = read_or_blank(lambda: self.images.read(number), self.on_bad_image)
        return {"pixel_values": to_pixels(self.processor, [image])[0], "reason": reason}
