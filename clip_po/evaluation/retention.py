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
from clip_po.evaluation.bootstrap import Estimate, bootstrap_interval
from clip_po.evaluation.class_doubles import unique_keys
from clip_po.evaluation.evaluator import Evaluator, Metrics, result_of
from clip_po.evaluation.readable import readable_rows
from clip_po.evaluation.robustness import Answers
from clip_po.evaluation.suites.photographs import accuracy_report, mean_report
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
        processor: CLIPProcessor of the models.
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

    def answers(self, measured: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Answers]:
        """Return the answers of the models with the labels of the images.

        Args:
            measured: Results by model, as from `measure`.

        Returns:
            Answers by set, to the variant "clean".
        """
        return {
            name: _answers(self.class_names[name], label, {model: got[name] for model, got in measured.items()})
            for name, label in self.label.items()
        }

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
        result_of(base, measured)
        answers = self.answers(measured)
        how: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": self.seed}
        found: Metrics = {}
        for model in measured:
            mean = mean_report([*answers.values()], model, base, "clean", **how)
            found[model] = _named("", mean["mean_accuracy"], mean.get("mean_difference"))
            for name, said in answers.items():
                alone = accuracy_report(said, model, base, "clean", **how)
                found[model] |= _named(f"{name}: ", alone["clean_accuracy"], alone.get("difference"))
        return found


def _answers(class_names: tuple[str, ...], label: np.ndarray, predicted: Mapping[str, np.ndarray]) -> Answers:
    """Return answers about clean images, on which no word is written."""
    return Answers(
        class_names,
        label,
        word=np.full(len(label), -1),
        written=np.full(len(label), ""),
        cluster=np.arange(len(label)),
        predicted={model: {"clean": got} for model, got in predicted.items()},
    )


def _named(prefix: str, accuracy: Estimate, gain: Estimate | None) -> dict[str, Estimate]:
    cost = {} if gain is None else {f"{prefix}retention_cost": Estimate(-gain.value, -gain.high, -gain.low)}
    return {f"{prefix}accuracy": accuracy, **cost}


@dataclass(frozen=True)
class ClassChange:
    """How the accuracy on one class has changed.

    Attributes:
        name: Name of the class; with its number if another class has the same name.
        images: Number of its images.
        before: Share of its images that the base classifies correctly, 0..1.
        after: The same for the other model.
        lost: Number of images that only the base classifies correctly.
        won: Number of images that only the other model classifies correctly.
        cost: 100 (before - after), in percentage points, with an interval over the images of the class.
    """

    name: str
    images: int
    before: float
    after: float
    lost: int
    won: int
    cost: Estimate


def class_changes(
    answers: Answers, before: str, after: str, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> list[ClassChange]:
    """Compare two models on each class of clean images.

    Args:
        answers: Answers to the variant "clean".
        before: Name of the base.
        after: Name of the other model.
        confidence: As for `bootstrap_interval`.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        One change per class that has images, those that lost most first.

    Raises:
        ValueError: If there are no answers of one of the models.
    """
    was, now = (answers.predictions_of(model)["clean"] == answers.label for model in (before, after))
    names = unique_keys(answers.class_names)
    found = []
    for number in np.unique(answers.label):
        rows = answers.label == number
        columns = {"before": was[rows], "after": now[rows]}
        cost = bootstrap_interval(
            lambda means: 100 * (means["before"] - means["after"]), columns, None, confidence, resamples, seed
        )
        found.append(
            ClassChange(
                names[number],
                int(rows.sum()),
                float(was[rows].mean()),
                float(now[rows].mean()),
                int((rows & was & ~now).sum()),
                int((rows & now & ~was).sum()),
                cost,
            )
        )
    return sorted(found, key=lambda change: (-change.cost.value, change.name))
