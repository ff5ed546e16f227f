"""What models keep of other tasks: accuracy and drift on a set of images, in one pass over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from clip_po.data.class_labels import read_labels
from clip_po.evaluation.class_doubles import first_alike
from clip_po.evaluation.drift import DriftEvaluator, Embeddings, compare_embeddings
from clip_po.evaluation.retention import RetentionSet, answer_scores
from clip_po.evaluation.zero_shot import embed_classes


@dataclass(frozen=True)
class SetResult:
    """What one model does on the images of one set.

    Attributes:
        embeddings: The embeddings of the images and of the open vocabulary.
        predicted: Array [N] of predicted classes; None if the images have no labels.
    """

    embeddings: Embeddings
    predicted: np.ndarray | None


def measure_set(
    models: Mapping[str, Any],
    processor: Any,
    dataset: Dataset,
    labelled: RetentionSet | None,
    texts: Sequence[str],
    *,
    image_column: str = "image",
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
    title: str = "Retention",
) -> dict[str, SetResult]:
    """Embed and, if they have labels, classify the images of a set.

    Args:
        models: As for `DriftEvaluator.measure`.
        processor: Processor of the models.
        dataset: The images.
        labelled: The same images with labels and prompts; None if they have none.
        texts: The open vocabulary.
        image_column: Name of the image column.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        accelerator: Divides the images among its processes; every process gets the whole result.
        disable_tqdm: Whether to hide the progress bar.
        title: Label of the progress bar.

    Returns:
        The result of each model.

    Raises:
        ValueError, TypeError: As for `DriftEvaluator` and `class_embeddings`.
    """
    evaluator = DriftEvaluator(
        dataset,
        processor,
        texts,
        image_column=image_column,
        batch_size=batch_size,
        num_workers=num_workers,
        title=title,
    )
    embeddings = evaluator.measure(models, accelerator=accelerator, disable_tqdm=disable_tqdm)
    if labelled is None:
        return {name: SetResult(found, None) for name, found in embeddings.items()}
    names, _ = read_labels(labelled.dataset, labelled.label_column, labelled.class_names)
    classes = embed_classes(models, processor, names, labelled.templates)
    return {
        name: SetResult(found, nearest_classes(found.image_embeds, classes[name]))
        for name, found in embeddings.items()
    }


def nearest_classes(image_embeds: np.ndarray, class_embeds: Tensor) -> np.ndarray:
    """Return the class whose embedding is nearest to that of each image.

    Args:
        image_embeds: Array [N, D], unit-norm.
        class_embeds: Tensor[C, D], unit-norm, on any device.

    Returns:
        Array [N] of classes. Of classes with the same embedding it is the first one.
    """
    texts = class_embeds.cpu().float()
    return first_alike(texts)[(torch.from_numpy(image_embeds) @ texts.T).argmax(dim=1)].numpy()


def set_scores(label: np.ndarray | None, result: SetResult, base: SetResult | None = None) -> dict[str, np.ndarray]:
    """Score a model on each image of a set.

    Args:
        label: Array [N] of true classes; None if the images have no labels.
        result: The result of the model.
        base: That of the base; None for the base itself, or without one.

    Returns:
        Arrays [N] by metric: those of `answer_scores` if there are labels, and those of `compare_embeddings` if there
        is a base.
    """
    scores: dict[str, np.ndarray] = {}
    if label is not None and result.predicted is not None:
        scores |= answer_scores(label, result.predicted, None if base is None else base.predicted)
    if base is not None:
        scores |= compare_embeddings(base.embeddings, result.embeddings)
    return scores
