"""clip-po evaluate on preferences, on texts labelled right or wrong, and on captions: recognized by their columns."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, Value

from clip_po.atomic_write import atomic_write
from clip_po.cli.evaluate_arguments import EvaluateArguments
from clip_po.cli.evaluate_common import Measurement, Models, measurable_rows
from clip_po.data.row_kinds import UNPAIRED_TEXT
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.calibration import ReliabilityBin
from clip_po.evaluation.evaluator import Metrics, RetrievalEvaluator
from clip_po.evaluation.feedback_evaluators import PreferenceEvaluator, UnpairedEvaluator
from clip_po.evaluation.preference_pairs import IMAGE_TO_TEXT, TEXT_TO_IMAGE, has_preferences
from clip_po.evaluation.report.figures import save_figure
from clip_po.evaluation.report.reliability_plot import reliability_plot
from clip_po.evaluation.retrieval import KS
from clip_po.evaluation.tables import format_table

Kind = Literal["labelled", "preferences", "unpaired", "mixed", "captions"]

FOUND: Mapping[str, str] = {
    "labelled": "labelled images: clean and typographic accuracy",
    "preferences": "preferences: agreement, margin and calibration",
    "unpaired": "texts labelled right or wrong: agreement, margin and calibration",
    "mixed": "preferences, and texts labelled right or wrong: agreement, margin and calibration",
    "captions": "captions: recall and NDCG",
}
"""What the columns of a dataset say, and what is measured on it."""

_AGREEMENT = {
    "pairwise_accuracy": "pairwise accuracy",
    "margin": "margin",
    "calibration_error": "calibration error",
    "pairwise_accuracy_difference": "accuracy against base (points)",
    "margin_difference": "margin against base",
    "calibration_error_difference": "calibration against base (points)",
}
_RETRIEVAL = {
    **{f"{metric}@{k}": f"{metric}@{k}" for metric in ("recall", "ndcg") for k in KS},
    "recall@1_difference": "recall@1 against base (points)",
}
_PARTS = {
    "": "all",
    f"{IMAGE_TO_TEXT}_": "texts of an image",
    f"{TEXT_TO_IMAGE}_": "images of a text",
    "unpaired_": "right or wrong texts",
}
_WAYS = {f"{IMAGE_TO_TEXT}_": "texts of an image", f"{TEXT_TO_IMAGE}_": "images of a text"}


def kind_of_rows(dataset: Dataset, args: EvaluateArguments) -> Kind:
    """Return what the columns of a dataset hold.

    Args:
        dataset: One split.
        args: Arguments of the command, which may name the columns of images, classes and captions.

    Returns:
        "preferences" for image, chosen, rejected, for text, chosen_image, rejected_image, and for Pick-a-Pic's
        columns; "unpaired" for image, text and a truth value as label; "mixed" for both; "captions" for images with
        captions or texts and without classes; else "labelled".
    """
    renamed = as_image(dataset, args)
    names, label = set(renamed.column_names), renamed.features.get("label")
    preferences = has_preferences(renamed)
    unpaired = names >= UNPAIRED_TEXT and isinstance(label, Value) and label.dtype == "bool"
    if preferences or unpaired:
        return "mixed" if preferences and unpaired else "preferences" if preferences else "unpaired"
    if args.label_column not in names and names & {args.caption_column, "text"}:
        return "captions"
    return "labelled"


def as_image(dataset: Dataset, args: EvaluateArguments) -> Dataset:
    """Return a dataset whose column of images is called `image`."""
    if args.image_column in dataset.column_names and "image" not in dataset.column_names:
        return dataset.rename_column(args.image_column, "image")
    return dataset


@dataclass(frozen=True, kw_only=True)
class FeedbackMeasurement(Measurement):
    """A measurement of feedback, with the reliability diagrams of the models.

    Attributes:
        reliability: Reliability diagram by model; empty if there is none.
    """

    reliability: Mapping[str, Sequence[ReliabilityBin]] = field(default_factory=dict)

    def write(self, folder: Path, seconds: float) -> dict[str, Path]:
        """Write report.json, reliability.csv and reliability.png."""
        files = super().write(folder, seconds)
        if self.reliability:
            write_reliability(folder / "reliability.csv", self.reliability)
            files["Picture"] = save_figure(reliability_plot(self.reliability), folder / "reliability.png")
        return files


def write_reliability(file: Path, diagrams: Mapping[str, Sequence[ReliabilityBin]]) -> Path:
    """Write reliability diagrams as a table.

    Args:
        file: CSV file.
        diagrams: Bins by model.

    Returns:
        The file.
    """
    with atomic_write(file) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["model", *ReliabilityBin.__dataclass_fields__], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"model": model, **asdict(part)} for model, bins in diagrams.items() for part in bins)
    return file


def measure_feedback(kind: Kind, args: EvaluateArguments, dataset: Dataset, models: Models) -> FeedbackMeasurement:
    """Measure the agreement of models with preferences or labels.

    Args:
        kind: "preferences", "unpaired" or "mixed", where the metrics of unpaired rows begin with "unpaired_".
        args: Arguments of the command.
        dataset: The rows.
        models: The models.

    Returns:
        The measurement.

    Raises:
        ValueError: As for `evaluate_preferences` and `evaluate_unpaired`.
    """
    kinds = (PreferenceEvaluator, UnpairedEvaluator)
    chosen = {"preferences": kinds[:1], "unpaired": kinds[1:], "mixed": kinds}[kind]
    metrics: dict[str, dict[str, Estimate]] = {name: {} for name in models.by_name}
    reliability: dict[str, Sequence[ReliabilityBin]] = {}
    skipped = 0
    for evaluator_class in chosen:
        evaluator: Any = evaluator_class(
            as_image(dataset, args),
            models.processor,
            args.cluster_column,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            on_bad_image=args.on_bad_image,
        )
        measured = evaluator.measure(models.by_name, accelerator=models.accelerator)
        prefix = "unpaired_" if kind == "mixed" and evaluator_class is UnpairedEvaluator else ""
        skipped += next(iter(measured.values())).skipped_rows
        for model, found in models.report(evaluator, measured).items():
            metrics[model] |= {f"{prefix}{name}": estimate for name, estimate in found.items()}
        reliability |= {f"{model}{' (unpaired)' * bool(prefix)}": r.reliability() for model, r in measured.items()}
    return FeedbackMeasurement(
        metrics=metrics,
        table=metrics_table(metrics, _PARTS, _AGREEMENT, "rows"),
        data=describe_data(args, kind, dataset, skipped),
        settings=asdict(args),
        name=data_folder(args),
        reliability=reliability,
    )


def measure_captions(args: EvaluateArguments, dataset: Dataset, models: Models) -> Measurement:
    """Measure retrieval between images and captions.

    Args:
        args: Arguments of the command.
        dataset: The rows.
        models: The models.

    Returns:
        The measurement.

    Raises:
        ValueError: As for `evaluate_retrieval`.
    """
    rows = measurable_rows(args, dataset, args.image_column, models.accelerator)
    evaluator = RetrievalEvaluator(
        rows,
        models.processor,
        args.prompt_template or ["{}"],
        image_column=args.image_column,
        caption_column=args.caption_column if args.caption_column in dataset.column_names else "text",
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )
    metrics = models.report(evaluator, evaluator.measure(models.by_name, accelerator=models.accelerator))
    return Measurement(
        metrics=metrics,
        table=metrics_table(metrics, _WAYS, _RETRIEVAL, "ranked"),
        data=describe_data(args, "captions", dataset, len(dataset) - len(rows)),
        settings=asdict(args),
        name=data_folder(args),
    )


def metrics_table(metrics: Metrics, parts: Mapping[str, str], columns: Mapping[str, str], first: str) -> str:
    """Format metrics as a table with a line for each model and part.

    Args:
        metrics: Estimates by model and metric.
        parts: What the beginnings of metrics mean. Those without metrics are left out.
        columns: Headers by metric.
        first: Header of the parts.

    Returns:
        The table; "" without metrics.
    """
    lines: list[list[Estimate | str | float | None]] = []
    shown = [name for name in columns if any(f"{part}{name}" in found for found in metrics.values() for part in parts)]
    for model, found in metrics.items():
        for part, title in parts.items():
            if any(f"{part}{name}" in found for name in shown):
                lines.append([model, title, *(found.get(f"{part}{name}") for name in shown)])
    return format_table(["model", first, *(columns[name] for name in shown)], lines) if lines else ""


def describe_data(args: EvaluateArguments, kind: Kind, dataset: Dataset, skipped_rows: int) -> dict[str, Any]:
    """Return the data as report.json describes them."""
    return {
        "name": args.dataset_name,
        "split": args.dataset_test_split,
        "kind": kind,
        "rows": len(dataset) - skipped_rows,
        "skipped_rows": skipped_rows,
    }


def data_folder(args: EvaluateArguments) -> str:
    """Return the name of the data, for the default folder of the report."""
    return f"{Path(str(args.dataset_name)).name}-{args.dataset_test_split}"
