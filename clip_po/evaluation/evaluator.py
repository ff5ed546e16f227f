"""The evaluator protocol, and the evaluators of robustness, zero-shot accuracy and retrieval.

To add an evaluation, subclass `Evaluator`. `EvaluatorCallback` runs any evaluator during training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from accelerate import Accelerator
from datasets import Dataset

from clip_po.data.bad_images import OnBadImage
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.bounds import check_bound, within
from clip_po.evaluation.readable import readable_rows
from clip_po.evaluation.retrieval import KS, RetrievalHits, evaluate_retrieval, retrieval_report
from clip_po.evaluation.robustness import Answers, RobustnessImages, evaluate_robustness, robustness_report
from clip_po.evaluation.zero_shot import ZeroShotResult, zero_shot_accuracy, zero_shot_report

Measured = TypeVar("Measured")
"""The result of one model, before it is compared with another: answers, hits or scores."""

Metrics = dict[str, dict[str, Estimate]]
"""Estimates by model and metric."""


class Evaluator(ABC, Generic[Measured]):
    """Measures models by name and returns metrics with confidence intervals.

    An evaluator works in two steps, so that a model that does not change, such as the reference policy, is measured
    once and compared often: `measure` runs the models, `report` compares the results. Calling the evaluator does both.

    Attributes:
        primary_metric: The metric to choose models by.
        greater_is_better: Whether a greater primary metric is better.
        resamples: Number of bootstrap resamples for the intervals.

    Source: the interface follows `SentenceEvaluator` of sentence-transformers.
    """

    primary_metric: str
    greater_is_better: bool = True
    resamples: int

    @abstractmethod
    def measure(
        self, models: Mapping[str, Any], *, accelerator: Accelerator | None = None, disable_tqdm: bool = False
    ) -> dict[str, Measured]:
        """Run the models on the data of this evaluator.

        Args:
            models: Two-tower models, or PeftModels around one, by name.
            accelerator: Divides the data among its processes; every process gets the whole result. None runs in this
                process alone.
            disable_tqdm: Whether to hide the progress bar.

        Returns:
            The result of each model.
        """

    @abstractmethod
    def report(self, measured: Mapping[str, Measured], base: str | None, resamples: int) -> Metrics:
        """Compute the metrics of measured models.

        Args:
            measured: Results by model, from one or several calls of `measure`.
            base: Name of the model that the others are compared with; None for no comparison.
            resamples: Number of bootstrap resamples, >= 1.

        Returns:
            Estimates by model and metric. Metrics that compare are missing for the base itself.
        """

    def __call__(
        self,
        models: Mapping[str, Any],
        base: str | None = None,
        *,
        accelerator: Accelerator | None = None,
        disable_tqdm: bool = False,
    ) -> Metrics:
        """Measure the models and return their metrics.

        Args:
            models: As for `measure`.
            base: As for `report`.
            accelerator: As for `measure`.
            disable_tqdm: As for `measure`.

        Returns:
            As for `report`.
        """
        measured = self.measure(models, accelerator=accelerator, disable_tqdm=disable_tqdm)
        return self.report(measured, base, self.resamples)


def trade_off(typographic_accuracy: float, clean_cost: float, max_clean_cost: float) -> float:
    """Return one number to choose checkpoints by: typographic accuracy within a bound on the clean cost.

    A model that exceeds the bound is worse than every model within it, and worse the more it exceeds it.

    Args:
        typographic_accuracy: In [0, 1].
        clean_cost: Clean accuracy lost, in percentage points.
        max_clean_cost: The bound, in percentage points.

    Returns:
        `typographic_accuracy` if `clean_cost` <= `max_clean_cost`, else (max_clean_cost - clean_cost) / 100, in
        [-1, 0).
    """
    if within(clean_cost, max_clean_cost):
        return typographic_accuracy
    return (max_clean_cost - clean_cost) / 100


@dataclass
class RobustnessEvaluator(Evaluator[Mapping[str, np.ndarray]]):
    """Evaluates accuracy on clean and attacked images. Returns the metrics of `robustness_report`.

    With `max_clean_cost` there is also `trade_off`, which then is the primary metric. It has no interval, and it
    applies the bound to the value of the clean cost. To be 95% sure of the bound, sweep the chosen model
    (`sweep_interpolation`).

    Args:
        images: The images, with the processor of the models.
        templates: Prompts with one `{}` each, as for `evaluate_robustness`.
        max_clean_cost: Clean accuracy that may be lost, in percentage points, >= 0; None for no `trade_off`.
        batch_size: Items per batch and process, >= 1.
        num_workers: Number of worker processes that draw images, >= 0.
        resamples: Number of bootstrap resamples for the intervals, >= 1.
        seed: Seed of the resamples.

    Raises:
        ValueError: If `max_clean_cost` is negative or not finite.
    """

    images: RobustnessImages
    templates: Sequence[str]
    max_clean_cost: float | None = None
    batch_size: int = 64
    num_workers: int = 0
    resamples: int = 1000
    seed: int = 0
    primary_metric: str = field(default="typographic_accuracy", init=False)

    def __post_init__(self) -> None:
        """Raise if the bound is not valid; choose by `trade_off` if there is one."""
        if self.max_clean_cost is not None:
            check_bound(self.max_clean_cost)
            self.primary_metric = "trade_off"

    def measure(
        self, models: Mapping[str, Any], *, accelerator: Accelerator | None = None, disable_tqdm: bool = False
    ) -> dict[str, Mapping[str, np.ndarray]]:
        """Classify every variant of the images.

        Args:
            models: As for `evaluate_robustness`.
            accelerator: As for `evaluate_robustness`.
            disable_tqdm: As for `evaluate_robustness`.

        Returns:
            Predicted classes by model and variant, arrays [N].

        Raises:
            ValueError, TypeError: As for `evaluate_robustness`.
        """
        answers = evaluate_robustness(
            models,
            self.images,
            self.templates,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            accelerator=accelerator,
            disable_tqdm=disable_tqdm,
        )
        return dict(answers.predicted)

    def report(self, measured: Mapping[str, Mapping[str, np.ndarray]], base: str | None, resamples: int) -> Metrics:
        """Compute the metrics of `robustness_report`, and `trade_off` if there is a bound on the clean cost.

        Args:
            measured: Results by model, as from `measure`.
            base: As for `Evaluator.report`. It must be among `measured`.
            resamples: As for `bootstrap_interval`.

        Returns:
            Estimates by model and metric. The base and, without a base, all models have no `trade_off`.

        Raises:
            ValueError: If `base` is not among `measured`, or as for `bootstrap_interval`.
        """
        answers = Answers.about(self.images, measured)
        found = {
            model: robustness_report(answers, model, base, resamples=resamples, seed=self.seed) for model in measured
        }
        if self.max_clean_cost is not None:
            for metrics in found.values():
                if "clean_cost" in metrics:
                    accuracy, cost = metrics["typographic_accuracy"].value, metrics["clean_cost"].value
                    metrics["trade_off"] = Estimate(trade_off(accuracy, cost, self.max_clean_cost))
        return found


@dataclass
class ZeroShotEvaluator(Evaluator[ZeroShotResult]):
    """Evaluates zero-shot accuracy on labelled images. Returns the metrics of `zero_shot_report`.

    Args:
        dataset: One split with images and labels.
        processor: Processor of the models.
        templates: Prompts with one `{}` each, as for `zero_shot_accuracy`.
        class_names: Names in the order of the labels; None for the names of the ClassLabel column.
        image_column: Name of the image column.
        label_column: Name of the label column.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        resamples: Number of bootstrap resamples for the intervals, >= 1.
        seed: Seed of the resamples.
        on_bad_image: "raise" stops at an image that can't be read. "skip" leaves such rows out, as `readable_rows`
            does, in the constructor and in every process.

    Attributes:
        skipped_rows: Number of rows left out.
    """

    dataset: Dataset
    processor: Any
    templates: Sequence[str]
    class_names: Sequence[str] | None = None
    image_column: str = "image"
    label_column: str = "label"
    batch_size: int = 64
    num_workers: int = 0
    resamples: int = 1000
    seed: int = 0
    on_bad_image: OnBadImage = "raise"
    skipped_rows: int = field(default=0, init=False)
    primary_metric = "accuracy"

    def __post_init__(self) -> None:
        """Leave out the rows whose images can't be read, if the arguments say so."""
        self.dataset, self.skipped_rows = _measurable(self)

    def measure(
        self, models: Mapping[str, Any], *, accelerator: Accelerator | None = None, disable_tqdm: bool = False
    ) -> dict[str, ZeroShotResult]:
        """Classify the images.

        Args:
            models: As for `Evaluator.measure`. They share the processor.
            accelerator: As for `Evaluator.measure`.
            disable_tqdm: As for `Evaluator.measure`.

        Returns:
            Labels and predicted classes by model. Their accuracies have no useful interval; `report` computes it.

        Raises:
            ValueError, TypeError: As for `zero_shot_accuracy`.
        """
        return {
            name: zero_shot_accuracy(
                model,
                self.processor,
                self.dataset,
                self.templates,
                self.class_names,
                image_column=self.image_column,
                label_column=self.label_column,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                accelerator=accelerator,
                disable_tqdm=disable_tqdm,
                resamples=1,
            )
            for name, model in models.items()
        }

    def report(self, measured: Mapping[str, ZeroShotResult], base: str | None, resamples: int) -> Metrics:
        """Compute the metrics of `zero_shot_report`.

        Args:
            measured: Results by model, as from `measure`.
            base: As for `Evaluator.report`. It must be among `measured`.
            resamples: As for `bootstrap_interval`.

        Returns:
            Estimates by model and metric.

        Raises:
            ValueError: If `base` is not among `measured`, or as for `zero_shot_report` and `bootstrap_interval`.
        """
        before = result_of(base, measured)
        return {
            name: zero_shot_report(result, None if name == base else before, resamples=resamples, seed=self.seed)
            for name, result in measured.items()
        }


@dataclass
class RetrievalEvaluator(Evaluator[RetrievalHits]):
    """Evaluates retrieval between images and captions. Returns the metrics of `retrieval_report`.

    Args:
        dataset: One split with images and captions.
        processor: Processor of the models.
        templates: One prompt with one `{}` for the caption; "{}" uses the caption unchanged.
        image_column: Name of the image column.
        caption_column: Name of the column of captions, each a text or a list of texts.
        ks: Ranks k at which recall is computed, each >= 1.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        resamples: Number of bootstrap resamples for the intervals, >= 1.
        seed: Seed of the resamples.
        title: Label of the progress bar.
        on_bad_image: As for `ZeroShotEvaluator`.

    Attributes:
        skipped_rows: Number of rows left out.
    """

    dataset: Dataset
    processor: Any
    templates: Sequence[str] = ("{}",)
    image_column: str = "image"
    caption_column: str = "caption"
    ks: Sequence[int] = KS
    batch_size: int = 64
    num_workers: int = 0
    resamples: int = 1000
    seed: int = 0
    title: str = "Retrieval"
    on_bad_image: OnBadImage = "raise"
    skipped_rows: int = field(default=0, init=False)
    primary_metric = "mean_recall"

    def __post_init__(self) -> None:
        """Leave out the rows whose images can't be read, if the arguments say so."""
        self.dataset, self.skipped_rows = _measurable(self)

    def measure(
        self, models: Mapping[str, Any], *, accelerator: Accelerator | None = None, disable_tqdm: bool = False
    ) -> dict[str, RetrievalHits]:
        """Rank captions for each image, and images for each caption.

        Args:
            models: As for `Evaluator.measure`. They share the processor.
            accelerator: As for `Evaluator.measure`.
            disable_tqdm: As for `Evaluator.measure`.

        Returns:
            Hits by model.

        Raises:
            ValueError, TypeError: As for `evaluate_retrieval`.
        """
        return evaluate_retrieval(
            models,
            self.processor,
            self.dataset,
            self.templates,
            image_column=self.image_column,
            caption_column=self.caption_column,
            ks=self.ks,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            accelerator=accelerator,
            disable_tqdm=disable_tqdm,
            title=self.title,
        )

    def report(self, measured: Mapping[str, RetrievalHits], base: str | None, resamples: int) -> Metrics:
        """Compute the metrics of `retrieval_report`.

        Args:
            measured: Results by model, as from `measure`.
            base: As for `Evaluator.report`. It must be among `measured`.
            resamples: As for `bootstrap_interval`.

        Returns:
            Estimates by model and metric.

        Raises:
            ValueError: If `base` is not among `measured`, or as for `retrieval_report` and `bootstrap_interval`.
        """
        before = result_of(base, measured)
        return {
            name: retrieval_report(hits, None if name == base else before, resamples=resamples, seed=self.seed)
            for name, hits in measured.items()
        }


def _measurable(evaluator: ZeroShotEvaluator | RetrievalEvaluator) -> tuple[Dataset, int]:
    """Return the rows to measure, and the number of rows left out."""
    rows = readable_rows(
        evaluator.dataset, evaluator.image_column, evaluator.on_bad_image, num_workers=evaluator.num_workers
    )
    return rows, len(evaluator.dataset) - len(rows)


def result_of(base: str | None, measured: Mapping[str, Measured]) -> Measured | None:
    """Return the result of the base.

    Args:
        base: Name of the base, or None.
        measured: Results by model.

    Returns:
        The result, None if there is no base.

    Raises:
        ValueError: If `base` is not among `measured`.
    """
    if base is None:
        return None
    if base not in measured:
        raise ValueError(f"base is {base!r}, which is none of the models {list(measured)}. Name one of them.")
    return measured[base]
