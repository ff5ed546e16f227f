"""The inputs of a fairness report: how well images match queries, and the group of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from clip_po.data.class_labels import column_texts
from clip_po.encoding import encode_images, evaluating
from clip_po.evaluation.fairness.metrics import number_groups
from clip_po.evaluation.zero_shot import collect_answers, embed_classes
from clip_po.models import dual_encoder


def query_scores(
    models: Mapping[str, Any],
    processor: Any,
    images: torch.utils.data.Dataset,
    queries: Sequence[str],
    templates: Sequence[str],
    *,
    pixels: str = "pixel_values",
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
    title: str = "Fairness",
) -> dict[str, np.ndarray]:
    """Score images against queries with several models; each image is read and processed once.

    Args:
        models: Two-tower models, or PeftModels around one, by name. They share the processor.
        processor: Processor of the models.
        images: N items that contain pixels Tensor[3, H, W], such as `CleanImages` or `RobustnessImages`.
        queries: Q different texts or class names.
        templates: Prompts with one `{}` for the query, averaged as in `class_embeddings`; "{}" uses the query
            unchanged.
        pixels: Name of the pixels in an item, such as "typographic" for the attacked images of `RobustnessImages`.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        accelerator: Divides the images among its processes; every process gets the whole result.
        disable_tqdm: Whether to hide the progress bar.
        title: Label of the progress bar.

    Returns:
        Cosine similarities by model, arrays [Q, N].

    Raises:
        ValueError: If there are no models, or as for `class_embeddings` and `collect_answers`.
        TypeError: As for `class_embeddings` and `collect_answers`.
    """
    if not models:
        raise ValueError("models is empty. Give at least one model by name.")
    texts = embed_classes(models, processor, queries, templates)

    def cosines(batch: dict[str, Tensor]) -> Tensor:
        found = []
        for name, model in models.items():
            clip = dual_encoder(model)
            embeds = encode_images(clip, batch[pixels].to(clip.device, clip.dtype)).float()
            found.append((embeds @ texts[name].to(embeds).T).cpu())
        return torch.cat(found, dim=1)

    with evaluating(*models.values()):
        table = collect_answers(
            images,
            cosines,
            len(models) * len(queries),
            batch_size,
            num_workers,
            accelerator,
            disable_tqdm,
            title,
            torch.float32,
        )
    return dict(zip(models, np.split(table.T, len(models)), strict=True))


def read_attribute(dataset: Dataset, attribute_column: str) -> np.ndarray:
    """Return the attribute of every image as text: class names, truth values, numbers or texts.

    Args:
        dataset: One split.
        attribute_column: Name of the column with the group of each image.

    Returns:
        Array [N] of texts.

    Raises:
        ValueError: If the column is missing, contains lists, or has fewer than two groups, or if a row is empty.
    """
    if attribute_column not in dataset.column_names:
        raise ValueError(
            f"attribute_column={attribute_column!r} is not a column of the dataset, which has {dataset.column_names}."
        )
    values = column_texts(dataset, attribute_column)
    if any(isinstance(value, (list, dict)) for value in dataset.with_format(None)[attribute_column][:1]):
        raise ValueError(f"Column {attribute_column!r} holds {values[0]}, expected one text or number per image.")
    if "" in values:
        raise ValueError(
            f"Row {values.index('')}: {attribute_column!r} is empty, as in {values.count('')} rows (None, nan and "
            "the class -1 are empty). Remove them with dataset.filter."
        )
    number_groups(values)
    return np.array(values)
