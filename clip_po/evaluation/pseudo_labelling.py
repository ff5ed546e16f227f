"""Pseudo-labels: the model's own predictions on clean images, as labels for unlabelled images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Value
from torch import Tensor

from clip_po.data.class_positions import check_different_names
from clip_po.data.images import read_images
from clip_po.encoding import evaluating
from clip_po.evaluation.zero_shot import CleanImages, class_embeddings, classify, collect_answers
from clip_po.validation import check_class_names

LABEL_COLUMN, WEIGHT_COLUMN = "label", "weight"
"""Names of the columns that `pseudo_labels` adds."""


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
    """Label images with the predictions of a model on the clean images, each weighted by its confidence.

    Use the rows for an alignment without labels: `TypographicPreferences(rows, attack, weight_column="weight")`
    prefers the model's own clean prediction to the word written on the image. With `loss_type="distillation"` the
    target is the whole distribution, and the labels only keep the attack from writing the class of the image.

    Args:
        model: Two-tower model, or PeftModel around one, before alignment.
        processor: Processor of the model.
        dataset: One split with images. A label column is not needed; an existing one is replaced.
        class_names: C different names.
        templates: Prompts, as for `class_embeddings`.
        image_column: Name of the image column.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        accelerator: Divides the rows among its processes; every process gets all rows.
        disable_tqdm: Whether to hide the progress bar.

    Returns:
        The dataset with the columns "label" (ClassLabel of the C names) and "weight" (the probability of the label
        under the policy, divided by its mean over all rows: the balance of preferences and KL stays that of labels).

    Raises:
        ValueError: If a column is missing, an image is not readable (the message names the row), or as for
            `class_embeddings`.
        TypeError: If `dataset` is not a single split.

    Source: Lee 2013, "Pseudo-Label" (ICML workshop), with the model before alignment as the labeller.
    """
    check_class_names(class_names)
    check_different_names(class_names)
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
    weight = found[:, 1].astype(float)
    return labelled.add_column(WEIGHT_COLUMN, (weight / weight.mean()).tolist(), feature=Value("float64"))
