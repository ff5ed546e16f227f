"""Labels from the model itself: its answers on clean images, for images that nobody labelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Value
from torch import Tensor

from clip_po.data.images import read_images
from clip_po.evaluation.zero_shot import CleanImages, class_embeddings, classify, collect_answers
from clip_po.policy import evaluating

LABEL_COLUMN, WEIGHT_COLUMN = "label", "weight"
"""The columns that `pseudo_labels` adds."""


def pseudo_labels(
    model: Any,
    processor: Any,
    dataset: Dataset,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    image_column: str = "image",
    batch_size: int = 128,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
) -> Dataset:
    """Label images by what the model answers on them as they are, each weighted by its confidence.

    The rows are preferences for a label-free alignment: `TypographicPreferences(rows, attack,
    weight_column="weight")` prefers the model's own clean answer to the word that is written on the image. With
    `loss_type="distillation"` the whole distribution of answers is the target, and the labels serve only to keep the
    attack from writing what the image shows.

    Args:
        model: CLIPModel, or PeftModel around one, before its alignment.
        processor: Its CLIPProcessor.
        dataset: One split with images; a column of labels is not needed and is replaced.
        class_names: C different names.
        templates: Prompts, as for `class_embeddings`.
        image_column: Column of images.
        batch_size: Images classified together, >= 1.
        num_workers: Processes that read images.
        accelerator: Shares the rows out among its processes; every process gets them all.
        disable_tqdm: Shows no progress bar.

    Returns:
        The data set with the columns "label" (ClassLabel of the C names) and "weight" (the probability of that
        answer under the policy, 1/C..1).

    Raises:
        ValueError: A column is missing, an image can't be read (the message names the row), or as for
            `class_embeddings`.
        TypeError: `dataset` is no single split.

    Source: Lee 2013, "Pseudo-Label" (ICML workshop), with the model before alignment as the labeller.
    """
    text_embeds = class_embeddings(model, processor, class_names, templates)

    def answers(batch: dict[str, Tensor]) -> Tensor:
        weight, label = classify(model, batch["pixel_values"], text_embeds).softmax(dim=1).max(dim=1)
        return torch.stack([label.float(), weight], dim=1)

    images = CleanImages(read_images(dataset, image_column), image_column, processor)
    with evaluating(model):
        found = collect_answers(
            images, answers, 2, batch_size, num_workers, accelerator, disable_tqdm, "Own answers", torch.float32
        )
    rest = dataset.remove_columns([c for c in (LABEL_COLUMN, WEIGHT_COLUMN) if c in dataset.column_names])
    label = ClassLabel(names=list(class_names))
    labelled = rest.add_column(LABEL_COLUMN, found[:, 0].astype(int).tolist(), feature=label)
    return labelled.add_column(WEIGHT_COLUMN, found[:, 1].tolist(), feature=Value("float64"))
