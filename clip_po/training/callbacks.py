"""A callback that runs any evaluator during training, so that its metrics can choose checkpoints."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clip_po.evaluation.evaluator import Evaluator
from clip_po.trainer import ContrastivePOTrainer
from clip_po.training.random_state import unchanged_random_state
from clip_po.training.sharding import whole_weights

TRAINER_METRICS = frozenset({"loss", "kl"})
"""Metrics of every evaluation of the trainer, which an evaluator must not replace."""


class EvaluatorCallback(TrainerCallback):
    """Runs an evaluator with every evaluation of a trainer.

    The callback measures the model in training against the trainer's reference policy, logs the metrics and adds them
    to those of the evaluation, so that `metric_for_best_model`, `load_best_model_at_end` and `EarlyStoppingCallback`
    can use them. The reference is measured once. Undefined metrics are left out. With several evaluation datasets, the
    metrics come with the first. All processes share the work. The callback runs before callbacks that were added
    earlier, so that they find its metrics.

    Example:

        trainer = ContrastivePOTrainer(..., args=ContrastivePOConfig(..., eval_strategy="epoch", save_strategy="epoch",
            load_best_model_at_end=True, metric_for_best_model="trade_off"))
        evaluator = RobustnessEvaluator(images, ["a photo of a {}"], max_clean_cost=1.0)
        trainer.add_callback(EvaluatorCallback(trainer, evaluator))

    Args:
        trainer: The trainer.
        evaluator: What to measure, such as a `RobustnessEvaluator` of validation images.
        prefix: Prefix of the metrics. The callback runs with evaluations that have this `metric_key_prefix`.
        name: Name of the evaluator, for metrics such as "eval_drift/kl" with the name "drift". It is needed if the
            trainer, or another evaluator, has metrics of the same names. The default "" adds no name.
    """

    def __init__(
        self, trainer: ContrastivePOTrainer, evaluator: Evaluator[Any], prefix: str = "eval", name: str = ""
    ) -> None:
        self.trainer, self.evaluator, self.prefix, self.name = trainer, evaluator, prefix, name
        self._base: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the reference policy, so that problems with the data show early, and become the first callback.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **kwargs: Not used.

        Raises:
            ValueError: If a metric has the name of one of the trainer's.
            ValueError, TypeError: As for `measure` and `report` of the evaluator.
        """
        self._check_names(self._measured_base())
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
        """Measure the model in training, log its metrics and add them to those of the evaluation.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            metrics: Metrics of the evaluation by name with prefix. Changed in place.
            **kwargs: Not used.

        Raises:
            ValueError, TypeError: As for `measure` and `report` of the evaluator.
        """
        if not self._belongs_to(metrics):
            return
        measured = {**self._measured_base(), **self._measure("policy", self.trainer.encoder)}
        with unchanged_random_state(self.trainer.accelerator.device):
            found = self.evaluator.report(measured, base="reference", resamples=1)["policy"]
        values = {metric: estimate.value for metric, estimate in found.items()}
        named = {
            f"{self.prefix}_{self._named(metric)}": value for metric, value in values.items() if math.isfinite(value)
        }
        metrics.update(named)
        self.trainer.log(named)

    def _belongs_to(self, metrics: dict[str, float]) -> bool:
        """Return whether an evaluation has this prefix and, of several datasets, is that of the first."""
        sets = self.trainer.eval_dataset
        names = [self.prefix, *(f"{self.prefix}_{name}" for name in (sets if isinstance(sets, dict) else ()))]
        return any(f"{name}_loss" in metrics for name in names[:2])

    def _named(self, metric: str) -> str:
        return f"{self.name}/{metric}" if self.name else metric

    def _check_names(self, base: dict[str, Any]) -> None:
        """Raise if a metric of the evaluator would replace one of the trainer's. The base stands in for the policy."""
        with unchanged_random_state(self.trainer.accelerator.device):
            metrics = self.evaluator.report({**base, "policy": base["reference"]}, "reference", 1)["policy"]
        if taken := sorted(TRAINER_METRICS & set(map(self._named, metrics))):
            raise ValueError(
                f"The evaluator and the trainer both have a metric {', '.join(taken)}. Give the callback a name: "
                f"EvaluatorCallback(trainer, evaluator, name='drift') logs {self.prefix}_drift/{taken[0]}."
            )

    def _measured_base(self) -> dict[str, Any]:
        # The reference, not the model at the start of training: a resumed run starts with a trained model.
        if not self._base:
            self._base = self._measure("reference", self.trainer.reference.initial_model)
        return self._base

    def _measure(self, name: str, model: Any) -> dict[str, Any]:
        accelerator = self.trainer.accelerator
        with unchanged_random_state(accelerator.device), whole_weights(self.trainer.model, accelerator):
            return self.evaluator.measure(
                {name: model}, accelerator=accelerator, disable_tqdm=bool(self.trainer.args.disable_tqdm)
            )
