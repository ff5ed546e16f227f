"""Evaluators of feedback: preferences between texts or images, and texts labelled right or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from datasets import Dataset

from clip_po.data.bad_images import OnBadImage
from clip_po.evaluation.evaluator import Evaluator, Metrics, result_of
from clip_po.evaluation.feedback_embeddings import Measuring
from clip_po.evaluation.preferences import PreferenceMargins, evaluate_preferences, preference_report
from clip_po.evaluation.unpaired import UnpairedScores, evaluate_unpaired, unpaired_report


@dataclass
class FeedbackSettings:
    """What the evaluators of feedback share.

    Args:
        dataset: One split.
        processor: Processor of the models.
        cluster_column: Column that says which rows belong together, such as the photo; None if each row is on its own.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        resamples: Number of bootstrap resamples for the intervals, >= 1.
        seed: Seed of the resamples.
        on_bad_image: "raise" stops at an image that can't be read. "skip" leaves its row out and counts it in the
            result.
        title: Label of the progress bar.
    """

    dataset: Dataset
    processor: Any
    cluster_column: str | None = None
    batch_size: int = 64
    num_workers: int = 0
    resamples: int = 1000
    seed: int = 0
    on_bad_image: OnBadImage = "raise"
    title: str = "Feedback"

    def measuring(self, accelerator: Accelerator | None, disable_tqdm: bool) -> Measuring:
        """Return how a measurement runs.

        Args:
            accelerator: As for `Evaluator.measure`.
            disable_tqdm: As for `Evaluator.measure`.

        Returns:
            The settings of `evaluate_preferences` and `evaluate_unpaired`.
        """
        return Measuring(self.batch_size, self.num_workers, self.on_bad_image, accelerator, disable_tqdm, self.title)


@dataclass
class PreferenceEvaluator(FeedbackSettings, Evaluator[PreferenceMargins]):
    """Evaluates how often a model agrees with preferences. Returns the metrics of `preference_report`.

    The dataset has rows with image, chosen and rejected; with text, chosen_image and rejected_image; or with both. The
    other arguments are those of `FeedbackSettings`.
    """

    primary_metric = "pairwise_accuracy"

    def measure(
        self, models: Mapping[str, Any], *, accelerator: Accelerator | None = None, disable_tqdm: bool = False
    ) -> dict[str, PreferenceMargins]:
        """Compute the margins of the preferences.

        Args:
            models: As for `Evaluator.measure`. They share the processor.
            accelerator: As for `Evaluator.measure`.
            disable_tqdm: As for `Evaluator.measure`.

        Returns:
            Margins by model.

        Raises:
            ValueError, TypeError: As for `evaluate_preferences`.
        """
        how = self.measuring(accelerator, disable_tqdm)
        return evaluate_preferences(models, self.processor, self.dataset, how, self.cluster_column)

    def report(self, measured: Mapping[str, PreferenceMargins], base: str | None, resamples: int) -> Metrics:
        """Compute the metrics of `preference_report`.

        Args:
            measured: Results by model, as from `measure`.
            base: As for `Evaluator.report`. It must be among `measured`.
            resamples: As for `bootstrap_interval`.

        Returns:
            Estimates by model and metric.

        Raises:
            ValueError: If `base` is not among `measured`, or as for `preference_report`.
        """
        before = result_of(base, measured)
        return {
            name: preference_report(margins, None if name == base else before, resamples=resamples, seed=self.seed)
            for name, margins in measured.items()
        }


@dataclass
class UnpairedEvaluator(FeedbackSettings, Evaluator[UnpairedScores]):
    """Evaluates how well a model tells right texts from wrong ones. Returns the metrics of `unpaired_report`.

    The dataset has rows with image, text and label (bool). The other arguments are those of `FeedbackSettings`.
    """

    primary_metric = "pairwise_accuracy"

    def measure(
        self, models: Mapping[str, Any], *, accelerator: Accelerator | None = None, disable_tqdm: bool = False
    ) -> dict[str, UnpairedScores]:
        """Score the text of each image.

        Args:
            models: As for `Evaluator.measure`. They share the processor.
            accelerator: As for `Evaluator.measure`.
            disable_tqdm: As for `Evaluator.measure`.

        Returns:
            Scores by model.

        Raises:
            ValueError, TypeError: As for `evaluate_unpaired`.
        """
        how = self.measuring(accelerator, disable_tqdm)
        return evaluate_unpaired(models, self.processor, self.dataset, how, self.cluster_column)

    def report(self, measured: Mapping[str, UnpairedScores], base: str | None, resamples: int) -> Metrics:
        """Compute the metrics of `unpaired_report`.

        Args:
            measured: Results by model, as from `measure`.
            base: As for `Evaluator.report`. It must be among `measured`.
            resamples: As for `bootstrap_interval`.

        Returns:
            Estimates by model and metric.

        Raises:
            ValueError: If `base` is not among `measured`, or as for `unpaired_report`.
        """
        before = result_of(base, measured)
        return {
            name: unpaired_report(scores, None if name == base else before, resamples=resamples, seed=self.seed)
            for name, scores in measured.items()
        }
