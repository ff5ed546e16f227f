"""The line after training: how far the model moved, on clean training images over an open vocabulary."""

from __future__ import annotations

from typing import cast

import numpy as np
from datasets import Dataset

from clip_po.cli.arguments import Task
from clip_po.data.generic_images import MixedPreferences
from clip_po.data.pairs import PreferencePairs
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.data.vocabulary import open_vocabulary
from clip_po.evaluation.drift import DriftEvaluator
from clip_po.evaluation.training_drift import TrainingDrift
from clip_po.trainer import ContrastivePOTrainer
from clip_po.training.random_state import unchanged_random_state
from clip_po.training.sharding import whole_weights

MOST_IMAGES = 1000
"""Largest number of images, so that the measurement takes about a second or two."""


def log_drift(trainer: ContrastivePOTrainer, task: Task) -> TrainingDrift:
    """Measure how far the model moved from the reference, and log it. Every process must call the function.

    Images that can't be read are left out: a trained model must not be lost to one of them. After a whole epoch that
    raised no error there are none, which saves looking for them.

    Args:
        trainer: The trainer after training, whose images without words are measured.
        task: Class names and prompt of the training, whose prompts are part of the vocabulary.

    Returns:
        The drift.
    """
    args, accelerator, rows = trainer.args, trainer.accelerator, labelled_rows(trainer)
    evaluator = DriftEvaluator(
        sample(rows.dataset, args.seed),
        trainer.processing_class,
        open_vocabulary(task.prompt_template, task.class_names),
        image_column=rows.image_column,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        on_bad_image=args.on_bad_image if (trainer.state.epoch or 0) >= 1 else "skip",
    )
    models = {"reference": trainer.reference.initial_model, "model": trainer.encoder}
    # In the precision of the training, which is several times as fast; both models have the same rounding errors.
    kept, whole = unchanged_random_state(accelerator.device), whole_weights(trainer.model, accelerator)
    with kept, whole, accelerator.autocast():
        measured = evaluator.measure(models, accelerator=accelerator, disable_tqdm=True)
    found = evaluator.report(measured, "reference", evaluator.resamples)["model"]
    images, texts = len(evaluator.dataset), len(measured["model"].texts)
    drift = TrainingDrift(images, texts, found["kl"], found["agreement"], found["cosine"])
    trainer.log(drift.logs())
    return drift


def labelled_rows(trainer: ContrastivePOTrainer) -> TypographicPreferences:
    """Return the labelled training rows of the command, without generic images.

    Args:
        trainer: The trainer of the command.

    Returns:
        The rows.
    """
    preferences = cast(PreferencePairs, trainer.train_dataset).preferences
    return cast(TypographicPreferences, preferences.task if isinstance(preferences, MixedPreferences) else preferences)


def sample(images: Dataset, seed: int) -> Dataset:
    """Return at most `MOST_IMAGES` rows.

    Args:
        images: All rows.
        seed: Seed of the draw.

    Returns:
        The rows, in their order.
    """
    count = min(MOST_IMAGES, len(images))
    return images.select(np.sort(np.random.default_rng(seed).choice(len(images), count, replace=False)))
