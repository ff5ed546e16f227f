"""Measure and choose the scale t of a concept: answers that follow the word, right answers, and clean accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from clip_po.concept.transform import ConceptTransform, ScalePath
from clip_po.encoding import encode_images, evaluating
from clip_po.evaluation.bootstrap import Estimate, Statistic, bootstrap_interval
from clip_po.evaluation.bounds import check_bound, within
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.tables import format_table
from clip_po.evaluation.zero_shot import class_embeddings, collect_answers

SCALES = (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0)
"""Default scales. 0 is the original model, 1 the trained transformation; negative scales strengthen the concept."""

VARIANTS = ("clean", "typographic")
"""The two variants of each image that a sweep measures: as it is, and with a word on it."""


@dataclass(frozen=True)
class VariantEmbeddings:
    """Embeddings of the images of a `RobustnessImages` and of the prompts. A scale t changes nothing else.

    Attributes:
        images: For each of `VARIANTS`, Tensor[N, D], float32, unit-norm.
        texts: Tensor[T, C, D], prompts of C classes in T templates, float32, unit-norm.
        label: Array [N] of true classes.
        word: Array [N], the class that the written word names, or -1 if it names none.
        cluster: Array [N] of cluster numbers.
    """

    images: Mapping[str, Tensor]
    texts: Tensor
    label: np.ndarray
    word: np.ndarray
    cluster: np.ndarray

    def answers(self, transform: ConceptTransform | None = None) -> dict[str, np.ndarray]:
        """Classify the images as the folded model (`ConceptTransform.fold_into`) would.

        Args:
            transform: A transformation of D-dimensional embeddings. None for the original model.

        Returns:
            For each of `VARIANTS`, an array [N] of classes.
        """
        device = self.texts.device if transform is None else transform.image_weight.device
        found = {}
        with torch.no_grad():
            for name, images in self.images.items():
                embeds, texts = images.to(device), self.texts.flatten(0, 1).to(device)
                if transform is not None:
                    embeds, texts = transform(embeds, texts)
                classes = F.normalize(texts.view(*self.texts.shape[:2], -1).mean(dim=0), dim=-1)
                found[name] = (embeds @ classes.T).argmax(dim=1).cpu().numpy()
        return found


def embed_variants(
    model: nn.Module,
    images: RobustnessImages,
    templates: Sequence[str],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
) -> VariantEmbeddings:
    """Embed images and prompts once, for all scales. Measuring a scale then needs no tower.

    Args:
        model: Two-tower model, or PeftModel around one, which W was trained on.
        images: The images.
        templates: Prompts with one `{}`, as in `class_embeddings`.
        batch_size: Items per batch and process, >= 1.
        num_workers: As in `evaluate_robustness`.
        accelerator: As in `evaluate_robustness`.
        disable_tqdm: Whether to hide the progress bar.

    Returns:
        Embeddings on the CPU, the same in every process.

    Raises:
        ValueError: If no written word names a class, and as in `evaluate_robustness`.
        TypeError: As in `clip_po.encoding.dual_encoder`.
    """
    if not (images.word >= 0).any():
        raise ValueError(
            "None of the written words names a class, so no answer can follow the word. Draw words from the class "
            "names: TypographicAttack(words=class_names)."
        )
    texts = torch.stack([class_embeddings(model, images.processor, images.class_names, [t]) for t in templates])
    dim, device, dtype = texts.shape[-1], texts.device, next(model.parameters()).dtype

    def embeds(batch: dict[str, Tensor]) -> Tensor:
        return torch.cat([encode_images(model, batch[name].to(device, dtype)) for name in VARIANTS], dim=1)

    with evaluating(model):
        table = torch.from_numpy(
            collect_answers(
                images,
                embeds,
                len(VARIANTS) * dim,
                batch_size,
                num_workers,
                accelerator,
                disable_tqdm,
                "Embeddings",
                torch.float32,
            )
        )
    parts = (F.normalize(part, dim=-1) for part in table.split(dim, dim=1))
    return VariantEmbeddings(
        dict(zip(VARIANTS, parts, strict=True)), texts.cpu(), images.label, images.word, images.cluster
    )


@dataclass(frozen=True)
class ScalePoint:
    """Measurements at one scale, with 95% intervals.

    Attributes:
        t: The scale.
        reading: Share of the typographic images answered by the written word's class, among those whose word names
            a class, 0..1.
        right: Share of the typographic images answered by their own class, 0..1.
        difference: Right minus reading, in percentage points, paired.
        clean_accuracy: 0..1.
        clean_cost: Clean accuracy lost relative to the original model (t = 0), in percentage points, paired.
        clean_cost_upper: Upper end of the one-sided 95% interval of the clean cost.
    """

    t: float
    reading: Estimate
    right: Estimate
    difference: Estimate
    clean_accuracy: Estimate
    clean_cost: Estimate
    clean_cost_upper: float

    def metrics(self) -> dict[str, Estimate]:
        """Return the estimates under the names of `robustness_report`, plus the difference.

        Returns:
            Estimates by metric: clean_accuracy, typographic_accuracy, fooled, difference and clean_cost.
        """
        return {
            "clean_accuracy": self.clean_accuracy,
            "typographic_accuracy": self.right,
            "fooled": self.reading,
            "difference": self.difference,
            "clean_cost": self.clean_cost,
        }


_STATISTICS: dict[str, Statistic] = {
    "reading": lambda means: means["reading"] / means["word_is_class"],
    "right": lambda means: means["right"],
    "difference": lambda means: 100 * (means["right"] - means["reading"] / means["word_is_class"]),
    "clean_accuracy": lambda means: means["clean"],
    "clean_cost": lambda means: 100 * (means["base"] - means["clean"]),
}


def measure_transform(
    embeds: VariantEmbeddings, transform: ConceptTransform, t: float = 1.0, *, resamples: int = 1000, seed: int = 0
) -> ScalePoint:
    """Measure a transformation unscaled. It may have K < D rows.

    Args:
        embeds: From `embed_variants`.
        transform: The transformation.
        t: The scale to report.
        resamples: As in `bootstrap_interval`.
        seed: As in `bootstrap_interval`.

    Returns:
        The point of `t`.
    """
    said, before = embeds.answers(transform), embeds.answers()
    names_class = embeds.word >= 0
    columns = {
        "clean": said["clean"] == embeds.label,
        "base": before["clean"] == embeds.label,
        "right": said["typographic"] == embeds.label,
        "reading": names_class & (said["typographic"] == embeds.word),
        "word_is_class": names_class,
    }

    def estimate(name: str, confidence: float = 0.95) -> Estimate:
        return bootstrap_interval(_STATISTICS[name], columns, embeds.cluster, confidence, resamples, seed)

    # Each end of the 90% interval leaves out 5%, so its upper end is that of the one-sided 95% interval.
    upper = estimate("clean_cost", 0.9).high
    return ScalePoint(t, **{name: estimate(name) for name in _STATISTICS}, clean_cost_upper=upper)


def sweep_scales(
    embeds: VariantEmbeddings,
    transform: ConceptTransform,
    ts: Sequence[float] = SCALES,
    path: ScalePath = "singular",
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[ScalePoint]:
    """Measure a transformation at several scales, each relative to the original model on the same images.

    Args:
        embeds: From `embed_variants`. Use validation images to choose a scale and others to report it.
        transform: The trained transformation.
        ts: Scales, as in `ConceptTransform.at`.
        path: As in `ConceptTransform.at`.
        resamples: As in `bootstrap_interval`.
        seed: As in `bootstrap_interval`.

    Returns:
        One point per scale, in their order.

    Raises:
        ValueError: No scales; as in `ConceptTransform.at`.
    """
    if not ts:
        raise ValueError(f"ts is empty; give at least one scale, such as those of SCALES: {list(SCALES)}.")
    return [measure_transform(embeds, transform.at(t, path), t, resamples=resamples, seed=seed) for t in ts]


def choose_neutral(points: Sequence[ScalePoint]) -> ScalePoint:
    """Choose the point at which as many answers are right as follow the written word: the crossing closest to t = 0.

    Args:
        points: From `sweep_scales`, in any order.

    Returns:
        The point next to the crossing with the smaller absolute difference.

    Raises:
        ValueError: If there is no crossing between the lowest and the highest t.
    """
    ordered = sorted(points, key=lambda point: point.t)
    crossings = [
        (low, high) for low, high in itertools.pairwise(ordered) if low.difference.value * high.difference.value <= 0
    ]
    if not crossings:
        nearest = min(ordered, key=lambda point: abs(point.difference.value), default=None)
        hint = (
            "" if nearest is None else f" They are closest at t={nearest.t:g}, {nearest.difference.value:.1f} points."
        )
        raise ValueError(
            "The share of right answers and the share that follow the written word don't cross at any of the "
            f"{len(points)} scales.{hint} Sweep a wider range, train longer, or train with a smaller "
            "penalty_weight or reg_weight."
        )
    around = min(crossings, key=lambda pair: min(abs(point.t) for point in pair))
    return min(around, key=lambda point: abs(point.difference.value))


def choose_within(points: Sequence[ScalePoint], max_clean_cost: float) -> ScalePoint:
    """Choose the point with the lowest reading among those whose clean cost is within a bound with 95% confidence.

    A point qualifies if its one-sided 95% interval ends at or below the bound. The original model always does.
    `clip_po.evaluation.interpolation.choose_alpha` describes what such an interval does not cover.

    Args:
        points: From `sweep_scales`.
        max_clean_cost: Clean accuracy that may be lost, in percentage points, >= 0.

    Returns:
        The point. Ties go to the higher share of right answers.

    Raises:
        ValueError: If the bound is negative, or no point is within it and t = 0 was not measured.
    """
    check_bound(max_clean_cost)
    sure = [point for point in points if point.t == 0 or within(point.clean_cost_upper, max_clean_cost)]
    if not sure:
        raise ValueError(
            f"None of the {len(points)} scales costs at most {max_clean_cost!r} points of clean accuracy with 95% "
            "confidence. Measure t = 0 too, the original model, which costs nothing."
        )
    return min(sure, key=lambda point: (point.reading.value, -point.right.value))


def scale_table(points: Mapping[str, ScalePoint]) -> str:
    """Format points as a Markdown table, with intervals in brackets.

    Args:
        points: By the heading of their row, such as "0.5".

    Returns:
        The table, one row per point.
    """
    columns = ["t", "reading", "right", "right - reading (points)", "clean", "clean cost (points)", "at most (95%)"]
    rows: list[list[Estimate | str | float | None]] = [
        [name, p.reading, p.right, p.difference, p.clean_accuracy, p.clean_cost, p.clean_cost_upper]
        for name, p in points.items()
    ]
    return format_table(columns, rows)
