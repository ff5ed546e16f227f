"""How often a model agrees with preferences: between texts for an image, and between images for a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from clip_po.evaluation.bootstrap import Estimate, Statistic
from clip_po.evaluation.calibration import ReliabilityBin, calibration_error, gap_columns, reliability
from clip_po.evaluation.differences import estimates_against_base
from clip_po.evaluation.embeddings import pair_logits
from clip_po.evaluation.feedback_embeddings import Measuring, embed_feedback
from clip_po.evaluation.preference_pairs import IMAGE_TO_TEXT, TEXT_TO_IMAGE, preference_pairs

_SHARES = frozenset({"pairwise_accuracy", "calibration_error"})


@dataclass(frozen=True)
class PreferenceMargins:
    """How strongly one model prefers the chosen candidate of each pair.

    Attributes:
        margin: Array [P], log pi(chosen) - log pi(rejected) in nats: the difference of their logits.
        row: Array [P], as for `PreferencePairs`.
        direction: Array [P], as for `PreferencePairs`.
        doubt: Array [P], as for `PreferencePairs`.
        weight: Array [P], as for `PreferencePairs`.
        cluster: Array [P], the cluster of each pair, as for `bootstrap_interval`.
        skipped_rows: Number of rows left out because an image can't be read.
    """

    margin: np.ndarray
    row: np.ndarray
    direction: np.ndarray
    doubt: np.ndarray
    weight: np.ndarray
    cluster: np.ndarray
    skipped_rows: int = 0

    def of(self, direction: str) -> PreferenceMargins:
        """Return the pairs of one direction."""
        own = self.direction == direction
        names = ("margin", "row", "direction", "doubt", "weight", "cluster")
        return replace(self, **{name: getattr(self, name)[own] for name in names})

    @property
    def confidence(self) -> np.ndarray:
        """Array [P]: the probability of the candidate that the model prefers, sigmoid(|margin|), 0.5..1."""
        return 1 / (1 + np.exp(-np.abs(self.margin.astype(np.float64))))

    @property
    def agreement(self) -> np.ndarray:
        """Array [P]: the share of annotators with the preference of the model; 0.5 if it prefers none."""
        return np.where(self.margin > 0, 1 - self.doubt, np.where(self.margin < 0, self.doubt, 0.5))

    def reliability(self) -> list[ReliabilityBin]:
        """Return the reliability diagram of the preferences: confidence and agreement in bins."""
        return reliability(self.confidence, self.agreement, self.weight)


def evaluate_preferences(
    models: Mapping[str, Any],
    processor: Any,
    dataset: Dataset,
    how: Measuring,
    cluster_column: str | None = None,
) -> dict[str, PreferenceMargins]:
    """Measure the margins of preferences with several models; each image is read once.

    Args:
        models: Two-tower models, or PeftModels around one, by name. They share the processor.
        processor: Processor of the models.
        dataset: As for `preference_pairs`.
        how: Batches, processes and unreadable images.
        cluster_column: Column that says which rows belong together, such as the photo; None if only the pairs of a row
            do.

    Returns:
        Margins by model, of the same pairs.

    Raises:
        ValueError: As for `preference_pairs` and `embed_feedback`, or if there is no such `cluster_column`.
        TypeError: As for `embed_feedback`.
    """
    pairs = preference_pairs(dataset)
    cluster = cluster_of(dataset, pairs.row, cluster_column)
    embeds = embed_feedback(models, processor, dataset, pairs.places, pairs.texts, how)
    unreadable = [pairs.places[number][1] for number in np.flatnonzero(~embeds.readable)]
    kept = ~np.isin(pairs.row, unreadable)

    def logits(model: str, which: np.ndarray) -> np.ndarray:
        image, text = embeds.images[model], embeds.texts[model]
        return pair_logits(models[model], image[which[:, 0]], text[which[:, 1]].to(image.device)).cpu().numpy()

    return {
        name: PreferenceMargins(
            logits(name, pairs.chosen[kept]) - logits(name, pairs.rejected[kept]),
            pairs.row[kept],
            pairs.direction[kept],
            pairs.doubt[kept],
            pairs.weight[kept],
            cluster[kept],
            len(set(unreadable)),
        )
        for name in models
    }


def cluster_of(dataset: Dataset, rows: np.ndarray, cluster_column: str | None) -> np.ndarray:
    """Return the clusters of rows.

    Args:
        dataset: One split.
        rows: Array [P] of row numbers.
        cluster_column: Column of the clusters; None if each row is one.

    Returns:
        Array [P].

    Raises:
        ValueError: If there is no such column.
    """
    if cluster_column is None:
        return rows
    if cluster_column not in dataset.column_names:
        raise ValueError(
            f"cluster_column={cluster_column!r} is not a column of the dataset, which has {dataset.column_names}."
        )
    return np.array(list(map(str, dataset.with_format(None)[cluster_column])))[rows]


def preference_report(
    margins: PreferenceMargins, base: PreferenceMargins | None = None, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Compute the agreement of a model with preferences, with intervals over rows.

    - pairwise_accuracy: the share of pairs of which the model prefers the chosen candidate, 0..1. Of a pair on which
      annotators disagree, the share of those with the preference of the model. A pair with equal logits counts half.
    - margin: the mean of log pi(chosen) - log pi(rejected), in nats.
    - calibration_error: expected calibration error of sigmoid(margin), the probability that the model gives to its own
      preference, 0..1.
    - <metric>_difference: against the base, paired on the same rows; percentage points, nats for the margin.
    - With preferences of both directions also image_to_text_<metric> and text_to_image_<metric>.

    Args:
        margins: From `evaluate_preferences`.
        base: Margins of the model before alignment; None for no differences.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        Estimates by metric.

    Raises:
        ValueError: If `base` has other pairs, or as for `bootstrap_interval`.
    """
    if base is not None and not (
        np.array_equal(base.row, margins.row) and np.array_equal(base.direction, margins.direction)
    ):
        raise ValueError("margins and base have different pairs. Measure both on the same dataset.")
    statistics: dict[str, Statistic] = {
        "pairwise_accuracy": lambda means: means["agreement"] / means["weight"],
        "margin": lambda means: means["margin"] / means["weight"],
        "calibration_error": calibration_error,
    }

    def report(own: PreferenceMargins, other: PreferenceMargins | None) -> dict[str, Estimate]:
        before = None if other is None else _columns(other)
        return estimates_against_base(statistics, _columns(own), before, own.cluster, _SHARES, resamples, seed)

    found = report(margins, base)
    directions = [name for name in (IMAGE_TO_TEXT, TEXT_TO_IMAGE) if (margins.direction == name).any()]
    for name in directions if len(directions) > 1 else ():
        part = report(margins.of(name), None if base is None else base.of(name))
        found |= {f"{name}_{metric}": estimate for metric, estimate in part.items()}
    return found


def _columns(margins: PreferenceMargins) -> dict[str, np.ndarray]:
    return {
        "weight": margins.weight,
        "agreement": margins.weight * margins.agreement,
        "margin": margins.weight * margins.margin,
        **gap_columns(margins.confidence, margins.agreement, margins.weight),
    }
