"""Retrieval between images and their captions: recall at k both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from clip_po.data.images import read_images
from clip_po.evaluation.bootstrap import Estimate, Statistic, bootstrap_interval
from clip_po.evaluation.zero_shot import CleanImages, collect_answers
from clip_po.policy import dual_encoder, encode_images, encode_texts, evaluating

KS = (1, 5, 10)
_CELLS_AT_ONCE = 16_000_000  # similarities held in memory together: 64 MB


@dataclass(frozen=True)
class RetrievalHits:
    """What was found among the first k, for N images and M texts.

    Attributes:
        image_to_text: By k, array [N] of truth values: one of the image's own texts is among the k nearest.
        text_to_image: By k, array [M] of truth values: the text's image is among the k nearest.
        image_of_text: Array [M], the image that each text belongs to.
    """

    image_to_text: Mapping[int, np.ndarray]
    text_to_image: Mapping[int, np.ndarray]
    image_of_text: np.ndarray


def recall_at_k(
    image_embeds: Tensor, text_embeds: Tensor, image_of_text: Sequence[int] | np.ndarray, ks: Sequence[int] = KS
) -> RetrievalHits:
    """Which images find a text of theirs among the k nearest, and which texts their image.

    Ties count against the model: whatever belongs to another and is as near as the own is ranked before it. So
    the result depends on no order, and embeddings that have collapsed to one point find nothing. Similarities
    are computed in blocks, never all at once.

    Args:
        image_embeds: Tensor[N, D], unit-norm.
        text_embeds: Tensor[M, D], unit-norm, on the same device.
        image_of_text: M numbers in 0..N-1, the image of each text; every image has at least one.
        ks: Numbers k, each >= 1.

    Returns:
        Hits by k, both ways; `retrieval_report` makes recalls of them.

    Raises:
        ValueError: Shapes that don't fit, embeddings that are not finite, an image without a text, an image
            number out of range, or a k below 1.

    Source: Karpathy and Fei-Fei 2015, arXiv 1412.2306, Sec. 4.1 (recall at K among all test images and texts).
    """
    owner = np.asarray(image_of_text)
    images, texts = len(image_embeds), len(text_embeds)
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"Expected embeddings [N, D] of images and [M, D] of texts, got {tuple(image_embeds.shape)} and "
            f"{tuple(text_embeds.shape)}."
        )
    if owner.shape != (texts,) or not np.isin(owner, np.arange(images)).all():
        raise ValueError(
            f"image_of_text must name one of the {images} images for each of the {texts} texts, got shape "
            f"{owner.shape} and values {sorted(set(owner.ravel().tolist()))[:5]}..."
        )
    without = np.setdiff1d(np.arange(images), owner)
    if len(without):
        raise ValueError(f"Image {without[0]} has no text ({len(without)} have none); take such images out.")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be numbers of at least 1, got {list(ks)}.")
    if not (torch.isfinite(image_embeds).all() and torch.isfinite(text_embeds).all()):
        raise ValueError("The embeddings hold nan or infinity: the model is broken, or ran in too low a precision.")

    numbers = torch.as_tensor(owner, device=image_embeds.device)
    own = torch.arange(images, device=image_embeds.device)
    of_images = _before_the_own(image_embeds, text_embeds, own, numbers)
    of_texts = _before_the_own(text_embeds, image_embeds, numbers, own)
    return RetrievalHits({k: of_images < k for k in ks}, {k: of_texts < k for k in ks}, owner)


def _before_the_own(queries: Tensor, gallery: Tensor, query_owner: Tensor, gallery_owner: Tensor) -> np.ndarray:
    """For each query, how many of the gallery that are not its own are as near as the nearest of its own."""
    parts = []
    at_once = max(1, _CELLS_AT_ONCE // len(gallery))
    for start in range(0, len(queries), at_once):
        similarity = queries[start : start + at_once] @ gallery.T
        own = query_owner[start : start + at_once, None] == gallery_owner
        nearest = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        parts.append(((similarity >= nearest) & ~own).sum(dim=1).cpu())
    return torch.cat(parts).numpy()


def retrieval_report(
    hits: RetrievalHits,
    base: RetrievalHits | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Recalls with intervals over images: an image is drawn with all its texts.

    - image_to_text_recall@k, text_to_image_recall@k: shares of hits, 0..1.
    - mean_recall: the mean of all of them.
    - <metric>_difference: 100 (recall - base recall), in percentage points, paired on the same images.

    Args:
        hits: From `recall_at_k`.
        base: The same of the model before alignment; None for recalls only.
        confidence: As for `bootstrap_interval`.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        Estimates by metric, in the order above.

    Raises:
        ValueError: `base` is of other texts or other k.
    """
    if base is not None and (
        not np.array_equal(base.image_of_text, hits.image_of_text)
        or set(base.image_to_text) != set(hits.image_to_text)
    ):
        raise ValueError("hits and base are of other texts, or of other k; measure both on the same data set.")
    columns = _columns(hits, "")
    recalls = [name for name in columns if name != "texts"]
    statistics: dict[str, Statistic] = {name: partial(_recall, name=name) for name in recalls}
    statistics["mean_recall"] = partial(_mean_recall, names=recalls)
    if base is not None:
        columns |= _columns(base, "base_")
        statistics |= {f"{name}_difference": partial(_difference, statistic=s) for name, s in statistics.items()}
    return {
        name: bootstrap_interval(statistic, columns, None, confidence, resamples, seed)
        for name, statistic in statistics.items()
    }


def _columns(hits: RetrievalHits, prefix: str) -> dict[str, np.ndarray]:
    """One row an image: its own hits, the sum of its texts' hits, and how many texts it has."""
    images = len(next(iter(hits.image_to_text.values())))
    found = {f"{prefix}image_to_text_recall@{k}": hit.astype(float) for k, hit in hits.image_to_text.items()}
    for k, hit in hits.text_to_image.items():
        found[f"{prefix}text_to_image_recall@{k}"] = np.bincount(hits.image_of_text, hit, images)
    return {**found, f"{prefix}texts": np.bincount(hits.image_of_text, minlength=images)}


def _recall(means: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return means[name] / means["texts"] if "text_to_image" in name else means[name]


def _mean_recall(means: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    return np.mean([_recall(means, name) for name in names], axis=0)


def _difference(means: Mapping[str, np.ndarray], statistic: Statistic) -> np.ndarray:
    before = {name.removeprefix("base_"): mean for name, mean in means.items() if name.startswith("base_")}
    return 100 * (statistic(means) - statistic(before))


def evaluate_retrieval(
    models: Mapping[str, Any],
    processor: Any,
    dataset: Dataset,
    templates: Sequence[str] = ("{}",),
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    ks: Sequence[int] = KS,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
    title: str = "Retrieval",
) -> dict[str, RetrievalHits]:
    """Retrieval by several models on one captioned data set: each image is read and processed once.

    Args:
        models: CLIPModels, or PeftModels around one, by name. They share the processor.
        processor: Their CLIPProcessor.
        dataset: One split with images and captions.
        templates: One prompt with one `{}` for the caption; "{}" for the caption as it is.
        image_column: Column of images.
        caption_column: Column of texts, or of lists of texts.
        ks: As for `recall_at_k`.
        batch_size: Images per batch and process, >= 1.
        num_workers: Processes that read images.
        accelerator: Shares the images out among its processes; every process gets the whole result.
        disable_tqdm: Shows no progress bar.
        title: Words before the progress bar.

    Returns:
        Hits by model.

    Raises:
        ValueError: No models, several templates, or captions as for `read_captions`; as for `recall_at_k`.
    """
    if not models:
        raise ValueError("models is empty; give at least one model by its name.")
    if len(templates) != 1:
        raise ValueError(f"Retrieval takes one template, got {list(templates)}: a caption has one embedding.")
    captions, image_of_text = read_captions(dataset, caption_column)
    texts = [templates[0].replace("{}", caption) for caption in captions]

    def embed(batch: dict[str, Tensor]) -> Tensor:
        found = []
        for model in models.values():
            clip = dual_encoder(model)
            found.append(encode_images(clip, batch["pixel_values"].to(clip.device, clip.dtype)).float())
        return torch.cat([embeds.cpu() for embeds in found], dim=1)

    widths = [dual_encoder(model).config.projection_dim for model in models.values()]
    images = CleanImages(read_images(dataset, image_column), image_column, processor)
    with evaluating(*models.values()):
        table = collect_answers(
            images,
            embed,
            sum(widths),
            batch_size,
            num_workers,
            accelerator,
            disable_tqdm,
            title,
            torch.float32,
        )
    split = torch.from_numpy(table).split(widths, dim=1)
    return {
        name: recall_at_k(embeds.to(text.device), text, image_of_text, ks)
        for (name, model), embeds in zip(models.items(), split, strict=True)
        for text in [encode_texts(model, processor, texts).float()]
    }


def read_captions(dataset: Dataset, caption_column: str) -> tuple[list[str], np.ndarray]:
    """All captions of a data set, and the row of each.

    Args:
        dataset: One split.
        caption_column: Column of texts, or of lists of texts.

    Returns:
        M captions, and an array [M] of row numbers.

    Raises:
        ValueError: The column is missing, or a row has no caption or none that is a text; the message names it.
    """
    if caption_column not in dataset.column_names:
        raise ValueError(
            f"caption_column={caption_column!r} is no column of the data set; it has {dataset.column_names}."
        )
    captions: list[str] = []
    rows: list[int] = []
    for row, value in enumerate(dataset.with_format(None)[caption_column]):
        own = [value] if isinstance(value, str) else value
        if not isinstance(own, list) or not own or not all(isinstance(caption, str) and caption for caption in own):
            raise ValueError(
                f"Row {row}: {caption_column!r} is {value!r}, expected a caption or a list of captions. Take the row "
                "out, or give --caption_column."
            )
        captions += own
        rows += [row] * len(own)
    return captions, np.array(rows, dtype=np.int64)
