"""How unevenly a CLIP treats groups of images, measured on data with attribute labels, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from clip_po.data.images import read_images
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.fairness.metrics import (
    Desired,
    Rankings,
    answer_counts,
    desired_shares,
    divergence,
    mean,
    number_groups,
    rank_images,
    rate_gaps,
    skews,
    top_k,
)
from clip_po.evaluation.suites.layouts import column_texts
from clip_po.evaluation.zero_shot import CleanImages, class_embeddings, collect_answers
from clip_po.policy import dual_encoder, encode_images, evaluating

RESAMPLES = 200
_CELLS_AT_ONCE = 4_000_000  # counts held in memory together: 32 MB


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
    """How well images fit queries, by several models: each image is read, processed and embedded once.

    Args:
        models: CLIPModels, or PeftModels around one, by name. They share the processor.
        processor: Their CLIPProcessor.
        images: N items that hold pixels Tensor[3, H, W], such as `CleanImages` or `RobustnessImages`.
        queries: Q different texts or class names.
        templates: Prompts with one `{}` for the query, averaged as in `class_embeddings`; "{}" for it as it is.
        pixels: Name of the pixels in an item: "typographic" for images with words of `RobustnessImages`.
        batch_size: Images per batch and process, >= 1.
        num_workers: Processes that read images.
        accelerator: Shares the images out among its processes; every process gets the whole result.
        disable_tqdm: Shows no progress bar.
        title: Words before the progress bar.

    Returns:
        By model an array [Q, N] of cosines.

    Raises:
        ValueError: No models, or as for `class_embeddings` and `collect_answers`.
    """
    if not models:
        raise ValueError("models is empty; give at least one model by its name.")
    texts = {name: class_embeddings(model, processor, queries, templates) for name, model in models.items()}

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
    """The attribute of every image as text, array [N]: class names, truth values, numbers or texts.

    Raises:
        ValueError: The column is missing, holds lists, or has fewer than two groups; or a row says nothing.
    """
    if attribute_column not in dataset.column_names:
        raise ValueError(
            f"attribute_column={attribute_column!r} is no column of the data set; it has {dataset.column_names}."
        )
    values = column_texts(dataset, attribute_column)
    if any(isinstance(value, (list, dict)) for value in dataset.with_format(None)[attribute_column][:1]):
        raise ValueError(f"Column {attribute_column!r} holds {values[0]}, expected one text or number an image.")
    if "" in values:
        raise ValueError(
            f"Row {values.index('')}: {attribute_column!r} is empty ({values.count('')} rows are); take them out by "
            "dataset.filter."
        )
    number_groups(values)
    return np.array(values)


def evaluate_fairness(
    models: Mapping[str, Any],
    processor: Any,
    dataset: Dataset,
    attribute_column: str,
    queries: Sequence[str],
    templates: Sequence[str] = ("{}",),
    ks: Sequence[float] = (1000,),
    *,
    base: str | None = None,
    labels: np.ndarray | None = None,
    image_column: str = "image",
    clusters: np.ndarray | None = None,
    desired: Desired = "dataset",
    zero_count: float = 1.0,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """Bias of several models on one data set: `query_scores` of its images, and `fairness_report` of these.

    Args:
        models: CLIPModels, or PeftModels around one, by name. They share the processor.
        processor: Their CLIPProcessor.
        dataset: One split with images and an attribute.
        attribute_column: Column of the groups, as for `read_attribute`.
        queries: As for `query_scores`.
        templates: As for `query_scores`.
        ks: As for `fairness_report`.
        base: As for `fairness_report`.
        labels: As for `fairness_report`.
        image_column: Column of images.
        clusters: As for `fairness_report`.
        desired: As for `fairness_report`.
        zero_count: As for `fairness_report`.
        batch_size: As for `query_scores`.
        num_workers: As for `query_scores`.
        accelerator: As for `query_scores`.
        disable_tqdm: As for `query_scores`.
        resamples: As for `fairness_report`.
        seed: As for `fairness_report`.

    Returns:
        Estimates by model and metric, as `fairness_report` names them.

    Raises:
        ValueError: As for `read_attribute`, `query_scores` and `fairness_report`.
    """
    groups = read_attribute(dataset, attribute_column)
    for k in ks:  # before the models run
        top_k(k, len(groups), desired)
    images = CleanImages(read_images(dataset, image_column), image_column, processor)
    scores = query_scores(
        models,
        processor,
        images,
        queries,
        templates,
        batch_size=batch_size,
        num_workers=num_workers,
        accelerator=accelerator,
        disable_tqdm=disable_tqdm,
    )
    return fairness_report(
        scores,
        groups,
        ks,
        base=base,
        labels=labels,
        clusters=clusters,
        desired=desired,
        zero_count=zero_count,
        resamples=resamples,
        seed=seed,
    )


class _Measure:
    """All metrics of a model on images that are there any number of times."""

    def __init__(
        self,
        scores: np.ndarray,
        group: np.ndarray,
        shares: Callable[[np.ndarray], np.ndarray],
        groups: int,
        ks: Sequence[int],
        labels: np.ndarray | None,
        zero_count: float,
    ) -> None:
        self.group, self.shares, self.groups, self.ks = group, shares, groups, ks
        self.labels, self.zero_count, self.classes = labels, zero_count, len(scores)
        at_once = max(1, _CELLS_AT_ONCE // (groups * len(group)))
        self.rankings: list[tuple[Rankings, Rankings | None]] = []
        for start in range(0, len(scores), at_once):
            part = scores[start : start + at_once]
            relevant = None
            if labels is not None:
                own = labels == np.arange(start, start + len(part))[:, None]
                relevant = rank_images(part, np.where(own, group, groups), groups)
            self.rankings.append((rank_images(part, group, groups), relevant))
        self.answers = scores.argmax(axis=0)

    def __call__(self, weights: np.ndarray | None = None) -> dict[str, float]:
        sizes = np.bincount(self.group, weights, self.groups)
        share = self.shares(sizes)
        found: dict[str, list[np.ndarray]] = {}
        for rankings, relevant in self.rankings:
            counts = rankings.counts(weights)
            asked = None if relevant is None else relevant.counts(weights)
            for k in self.ks:
                # A resample of clusters may hold fewer images than k.
                last = min(k, counts.shape[1]) - 1
                skew = skews(counts[:, last], share, self.zero_count)
                found.setdefault(f"max_skew@{k}", []).append(np.nanmax(skew, axis=1))
                found.setdefault(f"min_skew@{k}", []).append(np.nanmin(skew, axis=1))
                found.setdefault(f"retrieval_parity_gap@{k}", []).append(rate_gaps(counts[:, last], sizes))
                if asked is not None:
                    gaps = rate_gaps(asked[:, last], asked[:, -1])
                    found.setdefault(f"retrieval_opportunity_gap@{k}", []).append(gaps)
            found.setdefault("ndkl", []).append(divergence(counts, share))
        means = {name: mean(np.concatenate(parts)) for name, parts in found.items()}
        return means | self._classification(weights, sizes)

    def _classification(self, weights: np.ndarray | None, sizes: np.ndarray) -> dict[str, float]:
        count = partial(answer_counts, group=self.group, classes=self.classes, groups=self.groups, weights=weights)
        answered = count(self.answers)
        found = {"demographic_parity_gap": mean(rate_gaps(answered[answered.any(axis=1)], sizes))}
        if self.labels is not None:
            right = np.where(self.answers == self.labels, self.labels, -1)
            found["equal_opportunity_gap"] = mean(rate_gaps(count(right), count(self.labels)))
        return found


def fairness_report(
    scores: Mapping[str, np.ndarray],
    groups: Sequence[Any] | np.ndarray,
    ks: Sequence[float],
    *,
    base: str | None = None,
    labels: np.ndarray | None = None,
    clusters: np.ndarray | None = None,
    desired: Desired = "dataset",
    zero_count: float = 1.0,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """Bias of several models with intervals over images, in nats or as a difference of probabilities.

    - max_skew@k, min_skew@k, ndkl: of retrieval, averaged over queries.
    - retrieval_parity_gap@k: largest difference between groups of P(in the top k | group).
    - retrieval_opportunity_gap@k: the same of relevant images alone; with `labels`.
    - demographic_parity_gap: largest difference of P(answer | group), where each image is given the query that fits
      it best, averaged over queries.
    - equal_opportunity_gap: the same of images for which that answer is right; with `labels`.
    - <metric>_difference: metric - base metric, paired on the same images.
    - <metric>_reduction: 100 (1 - metric / base metric), in percent; every metric is 0 where groups are treated alike.

    None of them is a mean over images, so every resample of the images (or clusters) is ranked anew; the desired share
    "dataset" is then that of the resample. A largest skew or gap is higher in a resample than in the data, by noise
    alone. The interval leaves that out: it is the spread of the resamples, put around the value. How much of the value
    itself is noise, `chance_level` says.

    Args:
        scores: By model an array [Q, N], as `query_scores` makes them; all of the same queries and images.
        groups: N groups, as for `skew_at_k`.
        ks: Numbers of images, or shares of them below 1.
        base: Name of the model that the others are compared with; None for no differences.
        labels: Array [N], the query 0..Q-1 that is right for each image, -1 for none; None where no query is right.
        clusters: Array [N], what images have in common (subject, scene); None for every image on its own.
        desired: As for `skew_at_k`.
        zero_count: As for `skew_at_k`.
        confidence: Probability that an interval is to cover, in (0, 1).
        resamples: Number of resamples; 0 for no intervals.
        seed: Seed of the draws.

    Returns:
        Estimates by model and metric.

    Raises:
        ValueError: No models or ks, an unknown `base`, scores, labels or clusters of unequal lengths, or as for
            `skew_at_k`.
    """
    names, group = number_groups(groups)
    numbers = [top_k(k, len(group), desired) for k in ks]
    shapes = {np.shape(table) for table in scores.values()}
    if not numbers or len(shapes) != 1 or any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"Expected at least one k, and scores [Q, N] of each model, got {list(ks)} and {shapes}.")
    if base is not None and base not in scores:
        raise ValueError(f"base is {base!r}, which is none of the models {list(scores)}.")
    for called, rows in (("labels", labels), ("clusters", clusters)):
        if rows is not None and np.shape(rows) != group.shape:
            raise ValueError(
                f"{called} must have one entry for each of the {len(group)} images, got {np.shape(rows)}."
            )
    if resamples < 0 or not 0 < confidence < 1:
        raise ValueError(f"Expected resamples >= 0 and a confidence in (0, 1), got {resamples} and {confidence}.")
    shares = partial(desired_shares, desired, names)
    measures = {
        name: _Measure(table, group, shares, len(names), numbers, labels, zero_count) for name, table in scores.items()
    }
    value = _compared({name: measure() for name, measure in measures.items()}, base)
    drawn: dict[str, dict[str, list[float]]] = {name: {metric: [] for metric in value[name]} for name in value}
    for weights in _resampled(len(group), clusters, resamples, seed):
        for name, metrics in _compared({name: measure(weights) for name, measure in measures.items()}, base).items():
            for metric, number in metrics.items():
                drawn[name][metric].append(number)
    return {
        name: {
            metric: _estimate(metric, number, np.array(drawn[name][metric]), confidence)
            for metric, number in metrics.items()
        }
        for name, metrics in value.items()
    }


def _resampled(images: int, clusters: np.ndarray | None, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, `resamples` times."""
    _, member = np.unique(np.arange(images) if clusters is None else clusters, return_inverse=True)
    total = int(member.max()) + 1
    rng = np.random.default_rng(seed)
    for _ in range(resamples if total > 1 else 0):
        yield np.bincount(rng.integers(0, total, total), minlength=total)[member]


def _compared(found: Mapping[str, dict[str, float]], base: str | None) -> dict[str, dict[str, float]]:
    """The metrics of each model and, for all but the base, their difference and reduction."""
    result = {name: dict(metrics) for name, metrics in found.items()}
    for name, metrics in found.items():
        if base is None or name == base:
            continue
        before = found[base]
        result[name] |= {f"{metric}_difference": now - before[metric] for metric, now in metrics.items()}
        result[name] |= {
            f"{metric}_reduction": 100 * (1 - now / before[metric]) if before[metric] else math.nan
            for metric, now in metrics.items()
        }
    return result


def _estimate(metric: str, value: float, drawn: np.ndarray, confidence: float) -> Estimate:
    defined = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or not len(defined) or len(defined) < confidence * len(drawn):
        return Estimate(value if math.isfinite(value) else math.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined - defined.mean() + value, [tail, 1 - tail])
    if not metric.endswith(("_difference", "_reduction")):
        low, high = (low, min(high, 0)) if metric.startswith("min_skew") else (max(low, 0), high)
    return Estimate(value, float(low), float(high))


def chance_level(
    groups: Sequence[Any] | np.ndarray,
    ks: Sequence[float],
    *,
    desired: Desired = "dataset",
    zero_count: float = 1.0,
    rankings: int = 200,
    seed: int = 0,
) -> dict[str, float]:
    """What a model that ranks images at random gets: the noise in metrics whose ideal is 0.

    Args:
        groups: As for `fairness_report`.
        ks: As for `fairness_report`.
        desired: As for `fairness_report`.
        zero_count: As for `fairness_report`.
        rankings: Number of random rankings that are averaged.
        seed: Seed of the rankings.

    Returns:
        max_skew@k, min_skew@k, retrieval_parity_gap@k and ndkl.
    """
    scores = np.random.default_rng(seed).random((rankings, len(groups)))
    found = fairness_report({"chance": scores}, groups, ks, desired=desired, zero_count=zero_count, resamples=0)[
        "chance"
    ]
    return {metric: e.value for metric, e in found.items() if metric != "demographic_parity_gap"}
