"""Retrieval between images and captions: recall and NDCG at k in both directions."""

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
from clip_po.encoding import encode_texts, evaluating
from clip_po.evaluation.bootstrap import Estimate, Statistic, bootstrap_interval
from clip_po.evaluation.embeddings import embed_batch, embedding_sizes, split_by_model
from clip_po.evaluation.zero_shot import CleanImages, collect_answers
from clip_po.models import check_processor
from clip_po.text_identity import TextTokens

KS = (1, 5, 10)
_CELLS_AT_ONCE = 16_000_000  # similarities held in memory together: 64 MB
_ABSENT = 2**31  # rank of an item that an image with fewer texts than others doesn't have


@dataclass(frozen=True)
class RetrievalHits:
    """Hits and gains among the k nearest, for N images and M texts.

    Attributes:
        image_to_text: Arrays [N] of truth values by k: whether a text of the image is among the k nearest.
        text_to_image: Arrays [M] of truth values by k: whether the image of the text is among the k nearest.
        image_of_text: Array [M], the image of each text.
        image_to_text_gain: Arrays [N] by k: NDCG at k of the texts of the image, in [0, 1].
        text_to_image_gain: Arrays [M] by k: NDCG at k of the image of the text, in [0, 1].
    """

    image_to_text: Mapping[int, np.ndarray]
    text_to_image: Mapping[int, np.ndarray]
    image_of_text: np.ndarray
    image_to_text_gain: Mapping[int, np.ndarray]
    text_to_image_gain: Mapping[int, np.ndarray]


def recall_at_k(
    image_embeds: Tensor, text_embeds: Tensor, image_of_text: Sequence[int] | np.ndarray, ks: Sequence[int] = KS
) -> RetrievalHits:
    """Compute which images have a text of theirs among the k nearest, which texts have their image, and the NDCG.

    Ties count against the model: an item of another image that is equally near is ranked first. The result therefore
    does not depend on the order of the rows, and embeddings that collapsed to one point have no hits. Similarities are
    computed in blocks, never all at once.

    Args:
        image_embeds: Tensor[N, D], unit-norm.
        text_embeds: Tensor[M, D], unit-norm, on the same device.
        image_of_text: M numbers in 0..N-1, the image of each text; every image has at least one text.
        ks: Ranks k, each >= 1.

    Returns:
        Hits by k in both directions; `retrieval_report` computes recalls from them.

    Raises:
        ValueError: If shapes do not match, an embedding is not finite, an image has no text, an image number is out of
            range, or a k is below 1.

    Source: Karpathy and Fei-Fei 2015, arXiv 1412.2306, Sec. 4.1 (recall at K among all test images and texts);
    Järvelin and Kekäläinen 2002, ACM TOIS 20(4) (discounted cumulative gain, with gains 0 and 1 and log2(1 + rank)).
    """
    owner = np.asarray(image_of_text)
    images, texts = len(image_embeds), len(text_embeds)
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"Expected embeddings [N, D] of images and [M, D] of texts, got shapes {tuple(image_embeds.shape)} and "
            f"{tuple(text_embeds.shape)}."
        )
    if owner.shape != (texts,) or not np.isin(owner, np.arange(images)).all():
        raise ValueError(
            f"image_of_text must name one of the {images} images for each of the {texts} texts, got shape "
            f"{owner.shape} and values {sorted(set(owner.ravel().tolist()))[:5]}..."
        )
    without = np.setdiff1d(np.arange(images), owner)
    if len(without):
        raise ValueError(f"Image {without[0]} has no text ({len(without)} images have none). Remove these images.")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be numbers >= 1, got {list(ks)}.")
    if not (torch.isfinite(image_embeds).all() and torch.isfinite(text_embeds).all()):
        raise ValueError(
            "The embeddings contain nan or infinity: the model is broken, or its precision is too low. Load an "
            "earlier checkpoint, or use float32."
        )

    numbers = torch.as_tensor(owner, device=image_embeds.device)
    own = torch.arange(images, device=image_embeds.device)
    of_images = _own_ranks(image_embeds, text_embeds, own, numbers, max(ks))
    of_texts = _own_ranks(text_embeds, image_embeds, numbers, own, max(ks))
    counts = np.bincount(owner, minlength=images)
    return RetrievalHits(
        {k: of_images[:, 0] <= k for k in ks},
        {k: of_texts[:, 0] <= k for k in ks},
        owner,
        {k: _ndcg(of_images, counts, k) for k in ks},
        {k: _ndcg(of_texts, np.ones_like(owner), k) for k in ks},
    )


def _own_ranks(queries: Tensor, gallery: Tensor, query_owner: Tensor, gallery_owner: Tensor, most: int) -> np.ndarray:
    """Return the ranks from 1 of each query's own items, [N, S], the best first, with `_ABSENT` after the last one.

    At most `most` items are ranked: the next one can't be among the `most` nearest.
    """
    wide = min(most, int(torch.bincount(gallery_owner).max()))
    parts = []
    at_once = max(1, _CELLS_AT_ONCE // len(gallery))
    for start in range(0, len(queries), at_once):
        similarity = queries[start : start + at_once] @ gallery.T
        own = query_owner[start : start + at_once, None] == gallery_owner
        nearest = similarity.masked_fill(~own, -torch.inf).topk(wide, dim=1).values
        others = similarity.masked_fill_(own, -torch.inf)
        ranks = [(others >= nearest[:, n : n + 1]).sum(dim=1) + n + 1 for n in range(wide)]
        parts.append(torch.stack(ranks, dim=1).masked_fill(nearest == -torch.inf, _ABSENT).cpu())
    return torch.cat(parts).numpy()


def _ndcg(ranks: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """Return the normalized discounted cumulative gain at k of queries with `counts` own items at `ranks`, [N]."""
    gains = np.where(ranks <= k, 1 / np.log2(ranks + 1.0), 0).sum(axis=1)
    ideal = np.cumsum(1 / np.log2(np.arange(2, k + 2)))
    return gains / ideal[np.minimum(counts, k) - 1]


def retrieval_report(
    hits: RetrievalHits,
    base: RetrievalHits | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Compute recalls and gains with intervals over images; an image is resampled with all its texts.

    - image_to_text_recall@k, text_to_image_recall@k: shares of hits, 0..1.
    - mean_recall: the mean of these recalls.
    - image_to_text_ndcg@k, text_to_image_ndcg@k: means of the normalized discounted cumulative gain, 0..1.
    - <metric>_difference: 100 (metric - base metric), in percentage points, paired on the same images.

    Args:
        hits: From `recall_at_k`.
        base: Hits of the model before alignment; None for recalls only.
        confidence: As for `bootstrap_interval`.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        Estimates by metric, in the order above.

    Raises:
        ValueError: If `base` has other texts or other k.
    """
    if base is not None and (
        not np.array_equal(base.image_of_text, hits.image_of_text)
        or set(base.image_to_text) != set(hits.image_to_text)
    ):
        raise ValueError("hits and base have other texts or other k. Measure both on the same dataset.")
    columns = _columns(hits, "")
    recalls = [name for name in columns if "recall" in name]
    statistics: dict[str, Statistic] = {name: partial(_recall, name=name) for name in recalls}
    statistics["mean_recall"] = partial(_mean_recall, names=recalls)
    statistics |= {name: partial(_recall, name=name) for name in columns if "ndcg" in name}
    if base is not None:
        columns |= _columns(base, "base_")
        statistics |= {f"{name}_difference": partial(_difference, statistic=s) for name, s in statistics.items()}
    return {
        name: bootstrap_interval(statistic, columns, None, confidence, resamples, seed)
        for name, statistic in statistics.items()
    }


def _columns(hits: RetrievalHits, prefix: str) -> dict[str, np.ndarray]:
    """Return one row per image: its hits and gains, the sums of those of its texts, and its number of texts."""
    images = len(next(iter(hits.image_to_text.values())))
    found: dict[str, np.ndarray] = {}
    for metric, of_images, of_texts in (
        ("recall", hits.image_to_text, hits.text_to_image),
        ("ndcg", hits.image_to_text_gain, hits.text_to_image_gain),
    ):
        found |= {f"{prefix}image_to_text_{metric}@{k}": hit.astype(float) for k, hit in of_images.items()}
        for k, hit in of_texts.items():
            found[f"{prefix}text_to_image_{metric}@{k}"] = np.bincount(hits.image_of_text, hit, images)
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
    """Measure retrieval with several models on a captioned dataset; each image is read and processed once.

    Args:
        models: Two-tower models, or PeftModels around one, by name. They share the processor.
        processor: Processor of the models.
        dataset: One split with images and captions.
        templates: One prompt with one `{}` for the caption; "{}" uses the caption unchanged.
        image_column: Name of the image column.
        caption_column: Name of the column of captions, each a text or a list of texts.
        ks: As for `recall_at_k`.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        accelerator: Divides the images among its processes; every process gets the whole result.
        disable_tqdm: Whether to hide the progress bar.
        title: Label of the progress bar.

    Returns:
        Hits by model.

    Raises:
        ValueError: If there are no models or several templates, or as for `check_processor`, `read_captions` and
            `recall_at_k`.
        TypeError: As for `clip_po.models.check_processor` and `collect_answers`.
    """
    if not models:
        raise ValueError("models is empty. Give at least one model by name.")
    if len(templates) != 1:
        raise ValueError(f"Retrieval needs exactly one template, got {list(templates)}: a caption has one embedding.")
    captions, image_of_text = read_captions(dataset, caption_column)
    texts = [templates[0].replace("{}", caption) for caption in captions]
    for model in models.values():
        check_processor(processor, model)
    tokens = TextTokens.of(processor, next(iter(models.values())))
    tokens.warn_of_cut(tokens.learn(texts), "the captions")

    images = CleanImages(read_images(dataset, image_column), image_column, processor)
    with evaluating(*models.values()):
        table = collect_answers(
            images,
            lambda batch: embed_batch(models, batch["pixel_values"]),
            sum(embedding_sizes(models)),
            batch_size,
            num_workers,
            accelerator,
            disable_tqdm,
            title,
            torch.float32,
        )
    return {
        name: recall_at_k(embeds, encode_texts(models[name], processor, texts).float(), image_of_text, ks)
        for name, embeds in split_by_model(models, table).items()
    }


def read_captions(dataset: Dataset, caption_column: str) -> tuple[list[str], np.ndarray]:
    """Return all captions of a dataset, and the row of each.

    Args:
        dataset: One split.
        caption_column: Name of the column of captions, each a text or a list of texts.

    Returns:
        M captions, and an array [M] of row numbers.

    Raises:
        ValueError: If the column is missing, or a row has no caption or one that is not a text; the message names the
            row.
    """
    if caption_column not in dataset.column_names:
        raise ValueError(
            f"caption_column={caption_column!r} is not a column of the dataset, which has {dataset.column_names}."
        )
    captions: list[str] = []
    rows: list[int] = []
    for row, value in enumerate(dataset.with_format(None)[caption_column]):
        own = [value] if isinstance(value, str) else value
        if not isinstance(own, list) or not own or not all(isinstance(caption, str) and caption for caption in own):
            raise ValueError(
                f"Row {row}: {caption_column!r} is {value!r}, expected a caption or a list of captions. Drop the row, "
                "or choose another caption_column."
            )
        captions += own
        rows += [row] * len(own)
    return captions, np.array(rows, dtype=np.int64)
