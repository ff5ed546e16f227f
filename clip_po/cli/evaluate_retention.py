"""clip-po evaluate --retention: what the model keeps of other tasks, in another table under the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_po.cli.evaluate_arguments import EvaluateArguments
from clip_po.cli.evaluate_common import Models, measurable_rows
from clip_po.cli.retention_sets import LoadedSet
from clip_po.evaluation.other_tasks import SetResult, measure_set, set_scores
from clip_po.evaluation.per_class import class_changes
from clip_po.evaluation.report.answer_tables import write_answers
from clip_po.evaluation.report.before_after import Gallery, before_after_grid
from clip_po.evaluation.report.changed_answers import changed_answers_gallery
from clip_po.evaluation.report.retention_report import describe_vocabulary, retention_section, retention_table
from clip_po.evaluation.retention import scores_report
from clip_po.evaluation.robustness import Answers

WITHOUT_BASE = "Retention cost and drift compare with the base: give --base_model_name_or_path to measure them."


@dataclass(frozen=True)
class RetentionMeasurement:
    """What models keep of other tasks.

    Attributes:
        section: The section of report.json.
        answers: Answers to the clean images of each set with labels.
        galleries: Images whose answer has changed, for each set that has any.
    """

    section: Mapping[str, Any]
    answers: Mapping[str, Answers]
    galleries: Mapping[str, Gallery]

    @property
    def table(self) -> str:
        """The table to print, and what its columns are against."""
        table = retention_table(self.section["models"], self.section["sets"])
        compared = any("kl" in metrics for metrics in self.section["models"].values())
        note = describe_vocabulary(self.section["texts"]) if compared else WITHOUT_BASE
        return f"{table}\n\n{note}"

    def write(self, folder: Path) -> dict[str, Path]:
        """Write the answer to each image, the accuracy of each class, and pictures of the changed answers.

        Args:
            folder: Folder of the report.

        Returns:
            The paths of the pictures, by what they are.
        """
        for name, answers in self.answers.items():
            write_answers(folder, answers, f"{name}-")
        return {
            f"Changed answers, {name}": before_after_grid(
                gallery.examples,
                folder / f"{name}-changed_answers.png",
                picture=gallery.picture,
                title=gallery.title,
                subtitle=gallery.note,
            )
            for name, gallery in self.galleries.items()
        }


def measure_retention(
    args: EvaluateArguments, sets: Mapping[str, LoadedSet], texts: Sequence[str], models: Models
) -> RetentionMeasurement:
    """Measure the accuracy and drift of models on other tasks.

    Args:
        args: Arguments of the command.
        sets: The sets by name.
        texts: The open vocabulary.
        models: The models.

    Returns:
        The measurement. Without a base it has neither drift nor cost.

    Raises:
        ValueError: As for `measure_set`.
    """
    kept, results = {}, {}
    for name, loaded in sets.items():
        few = loaded if args.max_samples is None else loaded.sample(args.max_samples, args.seed)
        kept[name] = few.part(measurable_rows(args, few.dataset, few.image_column, models.accelerator))
        results[name] = measure_set(
            models.by_name,
            models.processor,
            kept[name].dataset,
            kept[name].labelled,
            texts,
            image_column=few.image_column,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            accelerator=models.accelerator,
            title=name,
        )
    answers = {
        name: loaded.answers({m: found.predicted for m, found in results[name].items() if found.predicted is not None})
        for name, loaded in kept.items()
        if loaded.labelled is not None
    }
    metrics = {
        model: scores_report(_scores(model, models.base, results, answers))
        for model in models.by_name
        if models.accelerator.is_main_process
    }
    compared = {} if models.base is None else answers
    changes = {name: class_changes(said, "base", "aligned") for name, said in compared.items()}
    galleries = {
        name: gallery
        for name, said in compared.items()
        if (gallery := changed_answers_gallery(said, "base", "aligned", name, kept[name].picture, seed=args.seed))
    }
    about = {name: loaded.about() for name, loaded in kept.items()}
    return RetentionMeasurement(retention_section(metrics, about, changes, len(texts)), answers, galleries)


def _scores(
    model: str, base: str | None, results: Mapping[str, Mapping[str, SetResult]], answers: Mapping[str, Answers]
) -> dict[str, Any]:
    """Return the scores of a model by set and metric, against the base if there is another one."""
    return {
        name: set_scores(
            answers[name].label if name in answers else None,
            found[model],
            None if base in (None, model) else found[str(base)],
        )
        for name, found in results.items()
    }
