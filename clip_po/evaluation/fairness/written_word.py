"""Bias by the written word: class prompts as queries, the word written on an image as the protected attribute.

If the query "seven" ranks images first that say seven, whatever they show, the model treats images by the word written
on them, just as another model may treat people by a group that the query does not name. Words are drawn at random, so
a skew above these three floors comes from the model:

- clean images: the same images without ink (noise of a ranking with the same errors);
- label oracle: the true labels (a word is never the image's own class, so even a perfect ranking has a skew);
- random order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator

from clip_po.evaluation.bootstrap import Estimate, bootstrap_interval
from clip_po.evaluation.bounds import within
from clip_po.evaluation.fairness.metrics import retrieval_opportunity_gap
from clip_po.evaluation.fairness.report import RESAMPLES, chance_level, fairness_report
from clip_po.evaluation.fairness.scores import query_scores
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.tables import format_estimate, format_table

CLEAN_IMAGES, ORACLE, RANDOM = "clean images", "label oracle", "random order"
FLOORS = (CLEAN_IMAGES, ORACLE, RANDOM)
"""Rows of a report besides the models: the least skew that the same images can have."""

_RANDOM_ORDERS = 20  # for each query


def written_word_scores(
    models: Mapping[str, Any],
    images: RobustnessImages,
    templates: Sequence[str],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
) -> dict[str, dict[str, np.ndarray]]:
    """Score the images against the prompt of each class, with the attack word and without.

    Args:
        models: Two-tower models, or PeftModels around one, by name. They share the processor of `images`.
        images: The images; with `keep_bytes` each is drawn only once.
        templates: As for `query_scores`. The queries are the class names.
        batch_size: As for `query_scores`.
        num_workers: As for `query_scores`.
        accelerator: As for `query_scores`.
        disable_tqdm: Whether to hide the progress bar.

    Returns:
        For "clean" and "typographic", arrays [C, N] of cosine similarities by model.

    Raises:
        ValueError, TypeError: As for `query_scores`.
    """
    return {
        variant: query_scores(
            models,
            images.processor,
            images,
            images.class_names,
            templates,
            pixels=variant,
            batch_size=batch_size,
            num_workers=num_workers,
            accelerator=accelerator,
            disable_tqdm=disable_tqdm,
            title=f"Retrieval, {variant}",
        )
        for variant in ("clean", "typographic")
    }


def class_size(images: RobustnessImages) -> int:
    """Return the number of images of the largest class: the smallest k at which a perfect ranking has no gap.

    Args:
        images: The images. Each rendering counts.

    Returns:
        Number of items of the class.
    """
    return int(np.bincount(images.label).max())


def written_word_report(
    scores: Mapping[str, Mapping[str, np.ndarray]],
    images: RobustnessImages,
    base: str,
    k: int | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """Compute how much models and `FLOORS` rank by the written word, and what models cost on clean images.

    Each model has all metrics of `fairness_report` on the images with words, with reductions against the base, and

    - clean_accuracy, typographic_accuracy: accuracy on each variant, 0..1.
    - clean_cost: 100 (base clean - clean), in percentage points, paired on the same images; not for the base.

    The floors are the base on the images without ink; an oracle that ranks every image of the class before all others,
    in random order within both; and the mean of random rankings, without an interval. The reductions of the floors are
    the most that a model can reach.

    Args:
        scores: From `written_word_scores`.
        images: The scored images. The written words are the groups; the clusters are resampled.
        base: Name of the model that the others are compared with.
        k: Number of top-ranked images; None for `class_size(images)`.
        resamples: As for `fairness_report`.
        seed: Seed of the resamples, of the oracle's order and of the random rankings.

    Returns:
        Estimates by model or floor, and metric.

    Raises:
        ValueError: If `base` is not a model, a model has the name of a floor, or as for `fairness_report`.
    """
    clean, written = scores["clean"], scores["typographic"]
    if base not in written or set(FLOORS) & set(written):
        raise ValueError(
            f"base must be one of the models {list(written)}, got {base!r}. No model may have a name in {FLOORS}."
        )
    k = class_size(images) if k is None else k
    relevant = images.label == np.arange(len(images.class_names))[:, None]
    oracle = relevant + np.random.default_rng(seed).random(relevant.shape) / 2
    found = fairness_report(
        {**written, CLEAN_IMAGES: clean[base], ORACLE: oracle},
        images.written,
        [k],
        base=base,
        labels=images.label,
        clusters=images.cluster,
        resamples=resamples,
        seed=seed,
    )
    for name in written:
        columns = {
            "clean": clean[name].argmax(axis=0) == images.label,
            "typographic": written[name].argmax(axis=0) == images.label,
            "base": clean[base].argmax(axis=0) == images.label,
        }
        statistics = {
            "clean_accuracy": lambda means: means["clean"],
            "typographic_accuracy": lambda means: means["typographic"],
            "clean_cost": lambda means: 100 * (means["base"] - means["clean"]),
        }
        for metric, statistic in statistics.items():
            if metric != "clean_cost" or name != base:
                found[name][metric] = bootstrap_interval(
                    statistic, columns, images.cluster, resamples=max(resamples, 1), seed=seed
                )
    found[RANDOM] = _random_order(images.written, relevant, k, found[base], seed)
    return found


def _random_order(
    groups: np.ndarray, relevant: np.ndarray, k: int, before: Mapping[str, Estimate], seed: int
) -> dict[str, Estimate]:
    queries = np.tile(relevant, (_RANDOM_ORDERS, 1))
    shuffled = np.random.default_rng(seed).random(queries.shape)
    found = chance_level(groups, [k], rankings=len(queries), seed=seed)
    found[f"retrieval_opportunity_gap@{k}"] = retrieval_opportunity_gap(shuffled, queries, groups, k)
    reductions = {
        f"{name}_reduction": 100 * (1 - value / before[name].value) if before[name].value else math.nan
        for name, value in found.items()
    }
    return {name: Estimate(value) for name, value in {**found, **reductions}.items()}


def least_biased(found: Mapping[Any, Mapping[str, Estimate]], metric: str, max_clean_cost: float) -> Any:
    """Return the model with the lowest metric among those whose clean cost is within a bound.

    Args:
        found: Metrics of models by any key, as from `written_word_report`, on validation images.
        metric: Name of the metric, such as "ndkl".
        max_clean_cost: The bound on the value of the clean cost, in percentage points.

    Returns:
        The key of the model. If no model is within the bound, the key of the lowest clean cost.

    Raises:
        ValueError: If `found` is empty.
    """
    if not found:
        raise ValueError("found is empty. Give the metrics of at least one model.")
    cost = {key: metrics["clean_cost"].value for key, metrics in found.items()}
    cheap = [key for key in found if within(cost[key], max_clean_cost)]
    if not cheap:
        return min(found, key=lambda key: cost[key])
    return min(cheap, key=lambda key: found[key][metric].value)


def written_word_table(found: Mapping[str, Mapping[str, Estimate]], k: int) -> str:
    """Format a report as a Markdown table: a row for each model and floor, with intervals in brackets.

    Args:
        found: From `written_word_report`.
        k: The number of top-ranked images of the report. For another one, the cells of these metrics are "n/a".

    Returns:
        The table, without a newline at the end.
    """
    skew, gap = f"max_skew@{k}", f"retrieval_opportunity_gap@{k}"
    metrics = {
        skew: f"MaxSkew@{k}",
        f"{skew}_reduction": "less (%)",
        "ndkl": "NDKL",
        "ndkl_reduction": "less (%)",
        gap: f"opportunity gap@{k}",
        "clean_accuracy": "clean",
        "clean_cost": "clean cost (points)",
    }
    rows = [[name, *(_cell(metric, numbers.get(metric)) for metric in metrics)] for name, numbers in found.items()]
    return format_table(["", *metrics.values()], rows)


def _cell(metric: str, estimate: Estimate | None) -> Estimate | str | None:
    """Return a percentage with one decimal, other metrics unchanged."""
    if estimate is None or not metric.endswith("_reduction"):
        return estimate
    return format_estimate(estimate, 1)
