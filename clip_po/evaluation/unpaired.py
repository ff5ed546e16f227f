"""How well a model tells right texts of images from wrong ones: feedback of thumbs up and down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from clip_po.data.column_images import Place
from clip_po.data.row_kinds import kind_of, standard_row
from clip_po.dual_encoder import as_dual_encoder
from clip_po.evaluation.bootstrap import Estimate, Statistic
from clip_po.evaluation.calibration import ReliabilityBin, calibration_error, gap_columns, reliability
from clip_po.evaluation.differences import estimates_against_base
from clip_po.evaluation.embeddings import pair_logits
from clip_po.evaluation.feedback_embeddings import Measuring, embed_feedback
from clip_po.evaluation.preferences import cluster_of
from clip_po.policy import candidate_logps
from clip_po.validation import check_row_weight, check_text

_SHARES = frozenset({"pairwise_accuracy", "calibration_error"})
_CELLS_AT_ONCE = 16_000_000  # logits held in memory together: 64 MB


@dataclass(frozen=True)
class UnpairedScores:
    """What one model gives to each image and its text.

    Attributes:
        logit: Array [N], logit_scale * cos(image, text).
        probability: Array [N], pi(text | image) among all texts of the dataset; for a model that is trained by a
            sigmoid of each pair, the sigmoid of the logit.
        label: Array [N] of truth values: whether the text is right.
        weight: Array [N] of weights >= 0.
        row: Array [N] of row numbers.
        cluster: Array [N], the cluster of each row, as for `bootstrap_interval`.
        texts: Number of different texts.
        skipped_rows: Number of rows left out because their image can't be read.
    """

    logit: np.ndarray
    probability: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    row: np.ndarray
    cluster: np.ndarray
    texts: int
    skipped_rows: int = 0

    def reliability(self) -> list[ReliabilityBin]:
        """Return the reliability diagram of the probabilities."""
        return reliability(self.probability, self.label.astype(np.float64), self.weight)


def evaluate_unpaired(
    models: Mapping[str, Any],
    processor: Any,
    dataset: Dataset,
    how: Measuring,
    cluster_column: str | None = None,
) -> dict[str, UnpairedScores]:
    """Score the texts of images with several models; each image is read once.

    Args:
        models: Two-tower models, or PeftModels around one, by name. They share the processor.
        processor: Processor of the models.
        dataset: As for `unpaired_rows`. An optional column is `weight`.
        how: Batches, processes and unreadable images.
        cluster_column: As for `evaluate_preferences`.

    Returns:
        Scores by model, of the same rows.

    Raises:
        ValueError: If a column is missing, or as for `unpaired_rows`, `embed_feedback` and `cluster_of`.
        TypeError: As for `embed_feedback`.
    """
    if missing := [column for column in ("image", "text", "label") if column not in dataset.column_names]:
        raise ValueError(f"The dataset has no column {missing[0]!r}, only {dataset.column_names}.")
    rows = unpaired_rows(dataset)
    row_numbers = np.array([number for number, _ in rows])
    place = {text: position for position, text in enumerate(dict.fromkeys(row["text"] for _, row in rows))}
    text = np.array([place[row["text"]] for _, row in rows])
    label = np.array([row["label"] for _, row in rows])
    weight = np.array([row.get("weight", 1.0) for _, row in rows], dtype=np.float64)
    cluster = cluster_of(dataset, row_numbers, cluster_column)
    images: list[Place] = [("image", number, 0) for number, _ in rows]
    embeds = embed_feedback(models, processor, dataset, images, [*place], how)
    kept = embeds.readable
    found = {}
    for name, model in models.items():
        image, known = embeds.images[name][kept], embeds.texts[name]
        own = torch.from_numpy(text[kept]).to(known.device)
        found[name] = UnpairedScores(
            pair_logits(model, image, known[own].to(image.device)).cpu().numpy(),
            _probabilities(model, image, known.to(image.device), own.to(image.device)),
            label[kept],
            weight[kept],
            row_numbers[kept],
            cluster[kept],
            len(place),
            int((~kept).sum()),
        )
    return found


def unpaired_rows(dataset: Dataset) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of unpaired feedback in a dataset, without images.

    Args:
        dataset: Rows with image, text and label (bool). Rows of other kinds of `clip_po.data.row_kinds` among them are
            left out.

    Returns:
        Number and values of each row, at least one.

    Raises:
        ValueError: If a text, label or weight can't be used (the message names the row), or there is no such row.
    """
    used = [name for name in ("text", "label", "chosen", "rejected_label", "weight") if name in dataset.column_names]
    rows = []
    for number, values in enumerate(dataset.with_format(None).select_columns(used)):
        row = standard_row(values)
        if kind_of(row) != "unpaired":
            continue
        check_text(row.get("text"), f"Row {number}: column 'text'", "Fill it in or drop the row.")
        check_row_weight(row.get("weight", 1.0), f"Row {number}: column 'weight'")
        if not isinstance(row["label"], bool):
            raise ValueError(f"Row {number}: column 'label' is {row['label']!r}, expected True or False.")
        rows.append((number, row))
    if not rows:
        raise ValueError("The dataset has no row with a text and a label. Fill in the column 'label'.")
    return rows


def _probabilities(model: Any, image_embeds: Tensor, text_embeds: Tensor, own: Tensor) -> np.ndarray:
    """Return pi(own text | image) among all texts, or the sigmoid of their logit, [N]."""
    encoder = as_dual_encoder(model)
    if encoder.pairwise:
        return pair_logits(model, image_embeds, text_embeds[own]).sigmoid().cpu().double().numpy()
    scale = encoder.scale.detach().float()
    at_once = max(1, _CELLS_AT_ONCE // len(text_embeds))
    parts = []
    for start in range(0, len(image_embeds), at_once):
        logps = candidate_logps(image_embeds[start : start + at_once], text_embeds, scale)
        parts.append(logps.gather(1, own[start : start + at_once, None])[:, 0].exp().cpu())
    return torch.cat(parts).double().numpy()


def unpaired_report(
    scores: UnpairedScores, base: UnpairedScores | None = None, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Compute how well a model tells right from wrong texts, with intervals over rows.

    - pairwise_accuracy: the share of pairs of a right and a wrong row of which the right one has the higher logit,
      0..1; equal logits count half. This is the area under the ROC curve. Its interval is that of DeLong's placements.
    - margin: mean logit of the right rows less that of the wrong ones.
    - calibration_error: expected calibration error of `probability`, 0..1. It is missing for a single text, whose
      probability among all texts is always 1.
    - <metric>_difference: against the base, paired on the same rows; percentage points, logits for the margin.

    Args:
        scores: From `evaluate_unpaired`.
        base: Scores of the model before alignment; None for no differences.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        Estimates by metric.

    Raises:
        ValueError: If `base` has other rows, or as for `bootstrap_interval`.

    Source: DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44(3) (placements of the area under the ROC curve).
    """
    if base is not None and not (np.array_equal(base.row, scores.row) and np.array_equal(base.label, scores.label)):
        raise ValueError("scores and base have different rows. Measure both on the same dataset.")
    statistics: dict[str, Statistic] = {"pairwise_accuracy": _accuracy, "margin": _margin}
    if scores.texts > 1:
        statistics["calibration_error"] = calibration_error
    before = None if base is None else _columns(base)
    return estimates_against_base(statistics, _columns(scores), before, scores.cluster, _SHARES, resamples, seed)


def placements(logit: np.ndarray, other: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the weighted share of other logits that lie below each logit; equal ones count half.

    Args:
        logit: Array [N].
        other: Array [M].
        weight: Array [M] of weights of the others.

    Returns:
        Array [N] in [0, 1]; nan without others.
    """
    order = np.argsort(other)
    below = np.concatenate([[0.0], np.cumsum(weight[order])])
    sorted_other = other[order]
    left, right = (below[np.searchsorted(sorted_other, logit, side)] for side in ("left", "right"))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (left + right) / 2 / below[-1]


def _columns(scores: UnpairedScores) -> dict[str, np.ndarray]:
    right, weight = scores.label, scores.weight
    above, logit = np.zeros(len(right)), scores.logit.astype(np.float64)
    above[right] = placements(logit[right], logit[~right], weight[~right])
    above[~right] = 1 - placements(logit[~right], logit[right], weight[right])
    area = np.average(above[right], weights=weight[right]) if weight[right].sum() else np.nan
    return {
        "weight": weight,
        "right": weight * right,
        "wrong": weight * ~right,
        "above of right": weight * right * above,
        "above of wrong": weight * ~right * above,
        "area": np.full(len(right), area),
        "logit of right": weight * right * logit,
        "logit of wrong": weight * ~right * logit,
        **gap_columns(scores.probability, right.astype(np.float64), weight),
    }


def _accuracy(means: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the area under the ROC curve, linear in the placements of the rows."""
    return means["above of right"] / means["right"] + means["above of wrong"] / means["wrong"] - means["area"]


def _margin(means: Mapping[str, np.ndarray]) -> np.ndarray:
    return means["logit of right"] / means["right"] - means["logit of wrong"] / means["wrong"]
