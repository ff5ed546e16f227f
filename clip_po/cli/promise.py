"""The promise about the saved model: bounds on what it may lose, how they are measured, and how they are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset
from peft import PeftModel

from clip_po.cli.retention_sets import labelled_sets, load_retention_sets
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.data.vocabulary import open_vocabulary
from clip_po.evaluation.bounds import Bounds, describe_promise, describe_retention_promise
from clip_po.evaluation.drift import DriftEvaluator
from clip_po.evaluation.interpolation import (
    Measure,
    choose_alpha,
    interpolate,
    interpolation_table,
    sweep_interpolation,
)
from clip_po.evaluation.retention import RetentionEvaluator, RetentionSet
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.trainer import ContrastivePOTrainer


def check_bounds(bounds: Bounds, retention: Sequence[str] | None) -> None:
    """Raise if a bound and what it is measured on don't come together.

    Args:
        bounds: The bounds.
        retention: Names of the retention sets; None if none were given.

    Raises:
        ValueError: If one is given without the other; the message names both.
    """
    if bounds.max_retention_cost is not None and not retention:
        raise ValueError(
            "max_retention_cost is a bound on the sets of retention, which names none. Give --retention with at least "
            "one folder or name of labelled images."
        )
    if retention and bounds.max_retention_cost is None:
        raise ValueError(
            "retention names sets that max_retention_cost is measured on, which is missing: the sets have no effect. "
            "Give --max_retention_cost, or measure them afterwards with clip-po evaluate --retention."
        )


def load_promised_sets(names: Sequence[str] | None, templates: Sequence[str]) -> dict[str, RetentionSet]:
    """Load the retention sets that a bound is measured on.

    Args:
        names: As for `load_retention_sets`; None for no sets.
        templates: As for `load_retention_sets`.

    Returns:
        The sets by name.

    Raises:
        ValueError: If a set can't be loaded or has no labels; the message names it.
    """
    loaded = load_retention_sets(names or (), templates)
    labelled = labelled_sets(loaded)
    if missing := loaded.keys() - labelled.keys():
        raise ValueError(
            f"--retention: {', '.join(sorted(missing))} has no labels, which max_retention_cost is measured by. Give "
            "a set with a column of classes, or bound the drift with --max_drift."
        )
    return labelled


def describe_promises(bounds: Bounds, images: int, sets: Mapping[str, RetentionSet]) -> Iterator[str]:
    """Describe how many images the bounds on accuracies take, before any is measured.

    A bound on the drift takes as many as the images differ, which nothing says before they are measured.

    Args:
        bounds: The bounds.
        images: Number of validation images, >= 1.
        sets: The retention sets.

    Yields:
        One line for each bound on an accuracy.
    """
    if bounds.max_clean_cost is not None:
        yield describe_promise(bounds.max_clean_cost, images)
    if bounds.max_retention_cost is not None:
        yield describe_retention_promise(bounds.max_retention_cost, [len(known.dataset) for known in sets.values()])


def cost_measures(
    bounds: Bounds,
    images: Dataset,
    image_column: str,
    texts: Sequence[str],
    sets: Mapping[str, RetentionSet],
    **evaluator: Any,
) -> dict[str, Measure]:
    """Return what a sweep must measure for the bounds, beside the clean cost.

    Args:
        bounds: The bounds.
        images: Clean validation images, for the drift.
        image_column: Name of their column.
        texts: The vocabulary of the drift.
        sets: The retention sets.
        **evaluator: Arguments of both evaluators: `processor`, `batch_size`, `num_workers`, `on_bad_image`.

    Returns:
        Measures by name of the cost.

    Raises:
        ValueError, TypeError: As for `DriftEvaluator` and `RetentionEvaluator`.
    """
    measures = {}
    if bounds.max_drift is not None:
        drift = DriftEvaluator(dataset=images, texts=texts, image_column=image_column, **evaluator)
        measures["drift"] = Measure(drift, "kl", len(drift.dataset))
    if bounds.max_retention_cost is not None:
        retention = RetentionEvaluator(sets=sets, **evaluator)
        count = sum(len(known.dataset) for known in retention.sets.values())
        measures["retention_cost"] = Measure(retention, "retention_cost", count)
    return measures


def promised(
    trainer: ContrastivePOTrainer, rows: TypographicPreferences, bounds: Bounds, sets: Mapping[str, RetentionSet]
) -> dict[str, Measure]:
    """Print how many images the bounds take, and return what must be measured for them.

    Args:
        trainer: The trainer before training.
        rows: Validation preferences.
        bounds: At least one bound.
        sets: The retention sets.

    Returns:
        Measures by name of the cost.

    Raises:
        ValueError: If the weights are sharded, so that they can't be interpolated, or as for `cost_measures`.
    """
    if trainer.is_fsdp_enabled:
        flags = " and ".join(f"--max_{name}" for name in bounds.given)
        raise ValueError(
            f"{flags}: the bound is kept by an interpolation of whole weights, but FSDP divides them among processes. "
            "Train with DDP (examples/accelerate_configs/ddp.yaml), or leave the bound out."
        )
    if trainer.is_world_process_zero():
        for line in describe_promises(bounds, len(rows), sets):
            print(line, flush=True)
    return cost_measures(
        bounds,
        rows.dataset,
        rows.image_column,
        open_vocabulary(rows.template, rows.class_names),
        sets,
        processor=trainer.processing_class,
        batch_size=trainer.args.per_device_eval_batch_size,
        num_workers=trainer.args.dataloader_num_workers,
        on_bad_image=trainer.args.on_bad_image,
    )


def keep_bounds(
    trainer: ContrastivePOTrainer,
    images: RobustnessImages,
    templates: Sequence[str],
    bounds: Bounds,
    measures: Mapping[str, Measure],
) -> None:
    """Replace the trainer's model by the most robust interpolation from base to aligned model that keeps the bounds.

    Adapters are merged, because an interpolation of weights is a plain model.

    Args:
        trainer: The trainer after training.
        images: Validation images.
        templates: Prompt templates with one `{}`.
        bounds: The most that the model may lose.
        measures: What must be measured for the bounds, beside the clean cost.
    """
    points = sweep_interpolation(
        trainer.reference.initial_model,
        trainer.model,
        images,
        templates,
        measures=measures,
        batch_size=trainer.args.per_device_eval_batch_size,
        num_workers=trainer.args.dataloader_num_workers,
        accelerator=trainer.accelerator,
        disable_tqdm=bool(trainer.args.disable_tqdm),
    )
    choice = choose_alpha(points, bounds)
    if trainer.is_world_process_zero():
        print(f"{interpolation_table(points)}\n{choice.describe()}")
        if isinstance(trainer.model, PeftModel):
            print("The adapters are merged into the model: an interpolation is a plain model.")
    chosen = interpolate(trainer.reference.initial_model, trainer.model, choice.point.alpha)
    trainer.replace_model(chosen)
