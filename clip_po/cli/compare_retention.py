"""What the methods of a comparison keep of other tasks: --retention of `clip-po compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from clip_po.cli.compare_methods import ComparisonSetup, MethodResult
from clip_po.cli.retention_sets import LoadedSet
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.drift import compare_embeddings
from clip_po.evaluation.other_tasks import SetResult, measure_set
from clip_po.evaluation.per_class import class_changes
from clip_po.evaluation.report.before_after import Gallery
from clip_po.evaluation.report.changed_answers import changed_answers_gallery
from clip_po.evaluation.report.retention_report import retention_section
from clip_po.evaluation.retention import answer_scores, scores_report
from clip_po.evaluation.robustness import Answers

PREDICTED = "predicted"
"""Name of the stored array of predicted classes. The others are named as the metrics of drift."""

Stored = Mapping[str, Mapping[str, np.ndarray]]
"""What is stored of one method and seed: arrays [N] by set and name."""


@dataclass(frozen=True)
class OtherTasks:
    """The retention sets of a comparison.

    Attributes:
        setup: The model and data that every method starts from.
        sets: The sets by name; empty to measure none.
        texts: The open vocabulary.
    """

    setup: ComparisonSetup
    sets: Mapping[str, LoadedSet]
    texts: Sequence[str]

    def describe(self) -> str:
        """Return the names of the sets, each with its split, its number of images, and whether it has no labels."""
        return ", ".join(
            f"{name} ({loaded.split}, {len(loaded.dataset):,} images{'' if loaded.labelled else ', drift only'})"
            for name, loaded in self.sets.items()
        )

    @cached_property
    def base(self) -> dict[str, SetResult]:
        """The result of the model before alignment on each set, measured when first needed."""
        return self._measure(MethodResult(self.setup.load_base(), self.setup.processor))

    def measure_base(self) -> dict[str, dict[str, np.ndarray]]:
        """Return what is stored of the model before alignment.

        Returns:
            The predicted classes of each set with labels.
        """
        return {name: _predicted(found) for name, found in self.base.items()}

    def measure(self, result: MethodResult) -> dict[str, dict[str, np.ndarray]]:
        """Return what is stored of a method.

        Args:
            result: The model that the method makes. Its class embeddings, if any, are those of the task: other tasks
                have their plain prompts.

        Returns:
            Predicted classes, and the drift of each image, by set.
        """
        found = self._measure(result) if self.sets else {}
        return {
            name: {**_predicted(now), **compare_embeddings(self.base[name].embeddings, now.embeddings)}
            for name, now in found.items()
        }

    def _measure(self, result: MethodResult) -> dict[str, SetResult]:
        return {
            name: measure_set(
                {"model": result.model},
                result.processor,
                loaded.dataset,
                loaded.labelled,
                self.texts,
                image_column=loaded.image_column,
                batch_size=self.setup.batch_size,
                disable_tqdm=True,
            )["model"]
            for name, loaded in self.sets.items()
        }

    def metrics(self, stored: Sequence[Stored], base: Stored | None) -> dict[str, Estimate]:
        """Compute the metrics of a method over all its seeds.

        Args:
            stored: What is stored of each seed.
            base: What is stored of the model before alignment; None for the metrics of one model only.

        Returns:
            Estimates as from `scores_report`. An image has the mean of its scores over the seeds, so the intervals are
            over images.
        """
        scores = {}
        for name, loaded in self.sets.items():
            by_seed = [
                _scores(loaded, run.get(name, {}), None if base is None else base.get(name, {})) for run in stored
            ]
            scores[name] = {metric: np.mean([each[metric] for each in by_seed], axis=0) for metric in by_seed[0]}
        return scores_report(scores)

    def answers(self, stored: Mapping[str, Stored]) -> dict[str, Answers]:
        """Return stored answers with the labels of the images.

        Args:
            stored: What is stored, by method.

        Returns:
            Answers to the variant "clean", for each set with labels.
        """
        return {
            name: loaded.answers({method: run[name][PREDICTED] for method, run in stored.items()})
            for name, loaded in self.sets.items()
            if loaded.labelled is not None
        }

    def section(
        self, metrics: Mapping[str, Mapping[str, Estimate]], answers: Mapping[str, Answers], base: str, shown: str
    ) -> dict[str, Any]:
        """Return the section of report.json on other tasks.

        Args:
            metrics: From `metrics`, by method.
            answers: From `answers`, of two methods.
            base: Name of the model before alignment.
            shown: The method whose classes are compared with it.

        Returns:
            The section.
        """
        changes = {name: class_changes(said, base, shown) for name, said in answers.items()}
        about = {name: loaded.about() for name, loaded in self.sets.items()}
        return retention_section(metrics, about, changes, len(self.texts))

    def galleries(self, answers: Mapping[str, Answers], base: str, shown: str) -> list[Gallery]:
        """Return images whose answer has changed.

        Args:
            answers: As for `section`.
            base: As for `section`.
            shown: As for `section`.

        Returns:
            One gallery for each set with a changed answer.
        """
        found = [
            changed_answers_gallery(said, base, shown, name, self.sets[name].picture) for name, said in answers.items()
        ]
        return [gallery for gallery in found if gallery is not None]


def _predicted(result: SetResult) -> dict[str, np.ndarray]:
    return {} if result.predicted is None else {PREDICTED: result.predicted}


def _scores(
    loaded: LoadedSet, run: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Return the scores of one method and seed on each image of a set, by metric."""
    drift = {name: array for name, array in run.items() if name != PREDICTED}
    if loaded.labelled is None:
        return drift
    label = loaded.answers({}).label
    return answer_scores(label, run[PREDICTED], None if base is None else base[PREDICTED]) | drift
