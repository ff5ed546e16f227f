"""What is measured while a model trains: robustness to words on images, by which checkpoints can be chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clip_po.evaluation.interpolation import check_bound, within
from clip_po.evaluation.robustness import Answers, RobustnessImages, evaluate_robustness, robustness_report
from clip_po.trainer import ContrastivePOTrainer


def trade_off(typographic_accuracy: float, clean_cost: float, max_clean_cost: float) -> float:
    """One number to choose checkpoints by: typographic accuracy where the clean cost holds a bound, else the excess.

    A model that breaks the bound is worse than any that holds it, and the worse the farther it is off.

    Args:
        typographic_accuracy: 0..1.
        clean_cost: Clean accuracy lost, in percentage points.
        max_clean_cost: The bound, in percentage points.

    Returns:
        `typographic_accuracy` where `clean_cost` <= `max_clean_cost`, else (max_clean_cost - clean_cost) / 100,
        in [-1, 0).
    """
    if within(clean_cost, max_clean_cost):
        return typographic_accuracy
    return (max_clean_cost - clean_cost) / 100


class RobustnessCallback(TrainerCallback):
    """Measures, with every evaluation of a trainer, how the model answers images with words on them.

    The metrics of `robustness_report` are logged, and added to those of the evaluation itself, so that
    `metric_for_best_model` ("typographic_accuracy", "trade_off"), `load_best_model_at_end` and
    `EarlyStoppingCallback` go by them. Among them are clean_accuracy, typographic_accuracy, occluded_accuracy,
    fooled and reading_effect (shares), recovery (a share) and clean_cost (percentage points) against the trainer's
    reference policy, and trade_off where there is a bound. A metric that is undefined is left out. Of several
    evaluation data sets, the metrics come with the first. All processes share the work. The callback steps before
    those that were added earlier, so that they find its metrics.

    The bound of `trade_off` is held by the clean cost's value; to be sure of it, sweep the chosen model
    (`sweep_interpolation`).

    Example:

        trainer = ContrastivePOTrainer(..., args=ContrastivePOConfig(..., eval_strategy="epoch", save_strategy="epoch",
            load_best_model_at_end=True, metric_for_best_model="trade_off"))
        trainer.add_callback(RobustnessCallback(trainer, images, ["a photo of a {}"], max_clean_cost=1.0))

    Args:
        trainer: The trainer.
        images: Validation images, with the trainer's processor.
        templates: As for `evaluate_robustness`.
        max_clean_cost: Clean accuracy that may be lost, in percentage points, >= 0; None for no `trade_off`.
        batch_size: As for `evaluate_robustness`.
        num_workers: As for `evaluate_robustness`.
        prefix: Of the evaluations to go with, the `metric_key_prefix` of `Trainer.evaluate`, and of the metrics.

    Raises:
        ValueError: `max_clean_cost` is negative or not finite. When training starts: as for
            `evaluate_robustness`.
    """

    def __init__(
        self,
        trainer: ContrastivePOTrainer,
        images: RobustnessImages,
        templates: Sequence[str],
        max_clean_cost: float | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        prefix: str = "eval",
    ) -> None:
        if max_clean_cost is not None:
            check_bound(max_clean_cost)
        self.trainer, self.images, self.templates = trainer, images, templates
        self.max_clean_cost = max_clean_cost
        self.batch_size, self.num_workers = batch_size, num_workers
        self.prefix = prefix
        self._base: Answers | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the reference policy, so that what is wrong with the images shows before training."""
        self._base_answers()
        handler = self.trainer.callback_handler
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Measure the model as it is; log the metrics and add them to those of the evaluation."""
        if not self._goes_with(metrics):
            return
        base = self._base_answers()
        found = self._answers(self.trainer.encoder)
        both = replace(found, predicted={"base": base.of("model"), **found.predicted})
        report = robustness_report(both, "model", "base", resamples=1)
        values = {name: estimate.value for name, estimate in report.items()}
        if self.max_clean_cost is not None:
            values["trade_off"] = trade_off(values["typographic_accuracy"], values["clean_cost"], self.max_clean_cost)
        named = {f"{self.prefix}_{name}": value for name, value in values.items() if math.isfinite(value)}
        metrics.update(named)
        self.trainer.log(named)

    def _goes_with(self, metrics: dict[str, float]) -> bool:
        """Whether an evaluation is one of this prefix, and of several data sets the first: one, and not each again."""
        sets = self.trainer.eval_dataset
        names = [self.prefix, *(f"{self.prefix}_{name}" for name in (sets if isinstance(sets, dict) else ()))]
        return any(f"{name}_loss" in metrics for name in names[:2])

    def _base_answers(self) -> Answers:
        # Not the model as training starts: that of a resumed run has trained already.
        if self._base is None:
            self._base = self._answers(self.trainer.reference.model)
        return self._base

    def _answers(self, model: Any) -> Answers:
        return evaluate_robustness(
            {"model": model},
            self.images,
            self.templates,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            accelerator=self.trainer.accelerator,
            disable_tqdm=bool(self.trainer.args.disable_tqdm),
        )
