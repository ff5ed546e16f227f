"""Evaluators of bias: by a labelled attribute, and by the word written on an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset

from clip_po.data.images import read_images
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.evaluator import Evaluator, Metrics
from clip_po.evaluation.fairness.metrics import Desired, top_k
from clip_po.evaluation.fairness.report import RESAMPLES, fairness_report
from clip_po.evaluation.fairness.scores import query_scores, read_attribute
from clip_po.evaluation.fairness.written_word import written_word_report, written_word_scores
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.zero_shot import CleanImages


@dataclass
class FairnessEvaluator(Evaluator[np.ndarray]):
    """Evaluates which groups of images a model ranks first. Returns the metrics of `fairness_report`.

    Args:
        images: N images, with the processor of the models.
        groups: N groups, as from `read_attribute`.
        queries: Q texts that name no group.
        templates: Prompts with one `{}` each for the query, as for `query_scores`.
        ks: Numbers of images, or shares of them below 1.
        labels: Array [N] of the right query 0..Q-1 for each image, -1 for none; None if no query is right.
        clusters: Array [N] that identifies related images (subject, scene); None if images are independent.
        desired: As for `skew_at_k`.
        zero_count: As for `skew_at_k`.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        resamples: Number of resamples for the intervals; 0 for no intervals.
        seed: Seed of the resamples.
        title: Label of the progress bar.

    Raises:
        ValueError: If a k is not valid for this number of images, as for `top_k`.
    """

    images: CleanImages
    groups: np.ndarray
    queries: Sequence[str]
    templates: Sequence[str] = ("{}",)
    ks: Sequence[float] = (1000,)
    labels: np.ndarray | None = None
    clusters: np.ndarray | None = None
    desired: Desired = "dataset"
    zero_count: float = 1.0
    batch_size: int = 64
    num_workers: int = 0
    resamples: int = RESAMPLES
    seed: int = 0
    title: str = "Fairness"
    primary_metric: str = field(default="ndkl", init=False)
    greater_is_better = False

    def __post_init__(self) -> None:
        """Raise if a k is not valid; choose by the skew at the first one."""
        self.ks = [top_k(k, len(self.groups), self.desired) for k in self.ks]
        if self.ks:
            self.primary_metric = f"max_skew@{self.ks[0]}"

    def measure(
        self, models: Mapping[str, Any], *, accelerator: Accelerator | None = None, disable_tqdm: bool = False
    ) -> dict[str, np.ndarray]:
        """Score the images against the queries.

        Args:
            models: As for `query_scores`.
            accelerator: As for `query_scores`.
            disable_tqdm: As for `query_scores`.

        Returns:
            Cosine similarities of queries and images by model, arrays [Q, N].

        Raises:
            ValueError, TypeError: As for `query_scores`.
        """
        return query_scores(
            models,
            self.images.processor,
            self.images,
            self.queries,
            self.templates,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            accelerator=accelerator,
            disable_tqdm=disable_tqdm,
            title=self.title,
        )

    def report(self, measured: Mapping[str, np.ndarray], base: str | None, resamples: int) -> Metrics:
        """Compute the metrics of `fairness_report`.

        Args:
            measured: Similarities by model, as from `measure`.
            base: As for `fairness_report`.
            resamples: As for `fairness_report`.

        Returns:
            Estimates by model and metric.

        Raises:
            ValueError, TypeError: As for `fairness_report`.
        """
        return fairness_report(
            measured,
            self.groups,
            self.ks,
            base=base,
            labels=self.labels,
            clusters=self.clusters,
            desired=self.desired,
            zero_count=self.zero_count,
            resamples=resamples,
            seed=self.seed,
        )


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
    """Measure the bias of several models on a dataset with an attribute column, by a `FairnessEvaluator`.

    Args:
        models: Two-tower models, or PeftModels around one, by name. They share the processor.
        processor: Processor of the models.
        dataset: One split with images and an attribute.
        attribute_column: Name of the column with the group of each image, as for `read_attribute`.
        queries: As for `query_scores`.
        templates: As for `query_scores`.
        ks: As for `fairness_report`.
        base: As for `fairness_report`.
        labels: As for `fairness_report`.
        image_column: Name of the image column.
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
        Estimates by model and metric, as from `fairness_report`.

    Raises:
        ValueError: As for `read_attribute`, `query_scores` and `fairness_report`.
    """
    evaluator = FairnessEvaluator(
        CleanImages(read_images(dataset, image_column), image_column, processor),
        read_attribute(dataset, attribute_column),
        queries,
        templates,
        ks,
        labels=labels,
        clusters=clusters,
        desired=desired,
        zero_count=zero_count,
        batch_size=batch_size,
        num_workers=num_workers,
        resamples=resamples,
        seed=seed,
    )
    return evaluator(models, base, accelerator=accelerator, disable_tqdm=disable_tqdm)


@dataclass
class WrittenWordEvaluator(Evaluator[Mapping[str, np.ndarray]]):
    """Evaluates bias by the word written on an image. Returns the metrics of `written_word_report`.

    The report needs a base and has further rows, the `FLOORS`: how little skew the same images can have.

    Args:
        images: The images, with the processor of the models; with `keep_bytes` each is drawn only once.
        templates: Prompts with one `{}` each for the class, as for `written_word_scores`.
        k: Number of top-ranked images; None for `class_size(images)`.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that draw images, >= 0.
        resamples: Number of resamples for the intervals; 0 for no intervals of the skews and gaps.
        seed: Seed of the resamples and of the random rankings.
    """

    images: RobustnessImages
    templates: Sequence[str]
    k: int | None = None
    batch_size: int = 64
    num_workers: int = 0
    resamples: int = RESAMPLES
    seed: int = 0
    primary_metric = "ndkl"
    greater_is_better = False

    def measure(
        self, models: Mapping[str, Any], *, accelerator: Accelerator | None = None, disable_tqdm: bool = False
    ) -> dict[str, Mapping[str, np.ndarray]]:
        """Score the images against the class prompts, with the attack word and without.

        Args:
            models: As for `written_word_scores`.
            accelerator: As for `written_word_scores`.
            disable_tqdm: As for `written_word_scores`.

        Returns:
            Cosine similarities by model and by "clean" and "typographic", arrays [C, N].

        Raises:
            ValueError, TypeError: As for `written_word_scores`.
        """
        scores = written_word_scores(
            models,
            self.images,
            self.templates,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            accelerator=accelerator,
            disable_tqdm=disable_tqdm,
        )
        return {name: {variant: by_model[name] for variant, by_model in scores.items()} for name in models}

    def report(self, measured: Mapping[str, Mapping[str, np.ndarray]], base: str | None, resamples: int) -> Metrics:
        """Compute the metrics of `written_word_report`.

        Args:
            measured: Similarities by model, as from `measure`.
            base: Name of the model that the others are compared with, one of `measured`. Not None.
            resamples: As for `fairness_report`.

        Returns:
            Estimates by model or floor, and metric.

        Raises:
            ValueError: If there is no base, or as for `written_word_report`.
        """
        if base is None:
            raise ValueError(f"base is missing. Name the model, one of {list(measured)}, to compare the others with.")
        scores = {
            variant: {name: by_variant[variant] for name, by_variant in measured.items()}
            for variant in ("clean", "typographic")
        }
        return written_word_report(scores, self.images, base, self.k, resamples=resamples, seed=self.seed)
