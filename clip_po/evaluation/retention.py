"""Retention: what a model still knows of tasks that its training never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset

from clip_po.data.bad_images import OnBadImage
from clip_po.data.class_labels import read_labels
from clip_po.evaluation.bootstrap import Estimate, mean_over_sets
from clip_po.evaluation.evaluator import Evaluator, Metrics, result_of
from clip_po.evaluation.readable import readable_rows
from clip_po.evaluation.zero_shot import predict_classes

PROMPTS = ("a photo of a {}",)


@dataclass(frozen=True)
class RetentionSet:
    """Labelled images of one task.

    Args:
        dataset: One split with images and labels.
        templates: Prompts with one `{}` each, as for `class_embeddings`.
        class_names: Names in the order of the labels; None for the names of the ClassLabel column.
        image_column: Name of the image column.
        label_column: Name of the label column.
    """

    dataset: Dataset
    templates: Sequence[str] = PROMPTS
    class_names: Sequence[str] | None = None
    image_column: str = "image"
    label_column: str = "label"


@dataclass
class RetentionEvaluator(Evaluator[Mapping[str, np.ndarray]]):
    """Evaluates zero-shot accuracy on several sets, and what it has lost against the base.

    - accuracy: mean of the accuracies on the sets, 0..1. Each set counts once, whatever its size.
    - retention_cost: 100 (base accuracy - accuracy), in percentage points; negative if the accuracy rose.
    - <set>: accuracy, <set>: retention_cost: the same for each set.

    The costs are missing for the base and without a base. Intervals are over images, paired within a set; the sets
    are held fixed.

    Args:
        sets: Labelled images by name, at least one set.
        processor: Processor of the models.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        resamples: Number of bootstrap resamples for the intervals, >= 1.
        seed: Seed of the resamples.
        on_bad_image: "raise" stops at an image that can't be read. "skip" leaves such rows out, as `readable_rows`
            does, in the constructor and in every process.

    Attributes:
        class_names: Class names by set.
        label: Arrays [N] of true classes by set.
        skipped_rows: Number of rows left out, of all sets.

    Raises:
        ValueError: If there are no sets, or as for `read_labels` and `readable_rows`.
        TypeError: If the dataset of a set is not a single split.
    """

    sets: Mapping[str, RetentionSet]
    processor: Any
    batch_size: int = 64
    num_workers: int = 0
    resamples: int = 1000
    seed: int = 0
    on_bad_image: OnBadImage = "raise"
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict, init=False)
    label: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    skipped_rows: int = field(default=0, init=False)
    primary_metric = "retention_cost"
    greater_is_better = False

    def __post_init__(self) -> None:
        """Read the labels, and leave out the rows whose images can't be read, if the arguments say so."""
        if not self.sets:
            raise ValueError("sets is empty. Give at least one set of labelled images by name.")
        found = {}
        for name, known in self.sets.items():
            rows = readable_rows(known.dataset, known.image_column, self.on_bad_image, num_workers=self.num_workers)
            self.skipped_rows += len(known.dataset) - len(rows)
            self.class_names[name], self.label[name] = read_labels(rows, known.label_column, known.class_names)
            found[name] = replace(known, dataset=rows)
        self.sets = found

    def measure(
        self, models: Mapping[str, Any], *, accelerator: Accelerator | None = None, disable_tqdm: bool = False
    ) -> dict[str, Mapping[str, np.ndarray]]:
        """Classify the images of all sets, each in one pass for all models.

        Args:
            models: As for `Evaluator.measure`. They share the processor.
            accelerator: As for `Evaluator.measure`.
            disable_tqdm: As for `Evaluator.measure`.

        Returns:
            Predicted classes by model and set, arrays [N].

        Raises:
            ValueError, TypeError: As for `predict_classes`.
        """
        by_set = {
            name: predict_classes(
                models,
                self.processor,
                known.dataset,
                self.class_names[name],
                known.templates,
                image_column=known.image_column,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                accelerator=accelerator,
                disable_tqdm=disable_tqdm,
                title=name,
            )
            for name, known in self.sets.items()
        }
        return {model: {name: predicted[model] for name, predicted in by_set.items()} for model in models}

    def report(
        self,
        measured: Mapping[str, Mapping[str, np.ndarray]],
        base: str | None,
        resamples: int,
        confidence: float = 0.95,
    ) -> Metrics:
        """Compute the accuracies and, against a base, what was lost.

        Args:
            measured: Results by model, as from `measure`.
            base: As for `Evaluator.report`. It must be among `measured`.
            resamples: As for `bootstrap_interval`.
            confidence: As for `bootstrap_interval`. The upper end of a 90% interval is that of a one-sided 95%
                interval.

        Returns:
            Estimates by model and metric.

        Raises:
            ValueError: If `base` is not among `measured`, or as for `bootstrap_interval`.
        """
        before = result_of(base, measured)
        found: Metrics = {}
        for model, got in measured.items():
            compared = None if model == base else before
            scores = {
                name: answer_scores(label, got[name], None if compared is None else compared[name])
                for name, label in self.label.items()
            }
            found[model] = scores_report(scores, confidence=confidence, resamples=resamples, seed=self.seed)
        return found


def answer_scores(
    label: np.ndarray, predicted: np.ndarray, base_predicted: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Score the answers of a model to the images of one set.

    Args:
        label: Array [N] of true classes.
        predicted: Array [N] of predicted classes.
        base_predicted: Those of the base; None for the base itself, or without one.

    Returns:
        Arrays [N]: `accuracy`, 1 for a right answer, else 0; with a base `retention_cost`, 100 for an answer that only
        the base has right, -100 for one that only the model has right, else 0.
    """
    right = (predicted == label).astype(np.float64)
    return {"accuracy": right} | (
        {} if base_predicted is None else {"retention_cost": 100 * ((base_predicted == label) - right)}
    )


def scores_report(
    scores: Mapping[str, Mapping[str, np.ndarray]], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Compute means of scores over the images of each set, and their mean over the sets.

    Args:
        scores: By set and metric, one number per image. A metric may be missing for some sets.
        confidence: As for `bootstrap_interval`.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        Estimates under the name of the metric for the mean over the sets that have it, and under "<set>: <metric>" for
        each set.

    Raises:
        ValueError: As for `bootstrap_interval`.
    """
    how: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    metrics = dict.fromkeys(metric for columns in scores.values() for metric in columns)
    found = {
        metric: mean_over_sets([columns[metric] for columns in scores.values() if metric in columns], **how)
        for metric in metrics
    }
    for name, columns in scores.items():
        found |= {f"{name}: {metric}": mean_over_sets([column], **how) for metric, column in columns.items()}
    return found
