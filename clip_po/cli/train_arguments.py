"""Arguments of clip-po train: flags over YAML over a preset over the command line's defaults."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import ModelConfig, TrlParser

from clip_po.cli.arguments import TaskArguments, flag_value, parse_flags
from clip_po.config import PRESETS, ContrastivePOConfig, preset, preset_batch_size
from clip_po.evaluation.interpolation import check_bound
from clip_po.training.averaging import BetaMovingAverageCallback

BATCH_SIZE = 64

DEFAULTS: Mapping[str, Any] = {
    "loss_type": ["sft", "distillation"],
    "beta": 1.0,
    "reg_weight": 1.0,
    "per_device_eval_batch_size": 256,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "save_strategy": "epoch",
    "save_total_limit": 1,
    # Chosen where they are not given: batch size and workers in `parse`, the others in `fit_to_size`.
    "per_device_train_batch_size": None,
    "dataloader_num_workers": None,
    "learning_rate": None,
    "num_train_epochs": None,
}
"""Defaults of the command line, chosen by comparison (benchmarks/photographs.yaml, docs/results.md).

DPO alone moves one difference of logits: it unlearns the word, but not what the ink hides. Cross-entropy on the chosen
text teaches that too, and the reference's answer on the clean image, as a soft target, holds the other classes."""


@dataclass
class TrainArguments(TaskArguments):
    """Arguments of `clip-po train` beside those of the trainer, the model and LoRA."""

    rejected: Literal["word", "others"] = field(
        default="word",
        metadata={
            "help": "Rejected texts: word, that of the written word alone; others, all other classes too (S-DPO).",
        },
    )
    labels: Literal["given", "reference"] = field(
        default="given",
        metadata={
            "help": "Where classes come from: given, the label column; reference, the model's own answers on clean "
            "images, weighted by its confidence, for images without labels.",
        },
    )
    dataset_validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate and choose on; default: a tenth of the training rows, kept out of them."},
    )
    max_clean_cost: float | None = field(
        default=None,
        metadata={
            "help": "Clean accuracy that may be lost, in points: after training, the most robust interpolation from "
            "the base to the aligned model is saved that is sure (95%) to cost no more on the validation images.",
        },
    )
    moving_average: float | None = field(
        default=None,
        metadata={"help": "Save the Beta moving average of the weights of all steps; the paper's is 0.7."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after that many evaluations without a better one, and keep the best: by typographic "
            "accuracy within max_clean_cost; needs an eval_strategy and the same save_strategy.",
        },
    )
    preset: str | None = field(
        default=None,
        metadata={"help": "The paper's settings, which single flags override.", "choices": sorted(PRESETS)},
    )

    def __post_init__(self) -> None:
        """Refuse what can't work before anything is loaded."""
        super().__post_init__()
        if self.max_clean_cost is not None:
            check_bound(self.max_clean_cost)
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(
                f"--early_stopping_patience must be at least 1 evaluation, got {self.early_stopping_patience}."
            )

    def validates(self, args: ContrastivePOConfig) -> bool:
        """Whether anything is measured on validation images."""
        return args.eval_strategy != "no" or self.max_clean_cost is not None

    def with_validation(self, dataset: Dataset, seed: int) -> tuple[Dataset, Dataset]:
        """Training and validation rows: those of the validation split, or a tenth of the training rows."""
        validation = None
        if self.dataset_validation_split is not None:
            validation = self.load(self.dataset_validation_split, seed)
        elif len(dataset) > 1:
            split = dataset.train_test_split(test_size=0.1, seed=seed)
            dataset, validation = split["train"], split["test"]
        if validation is None or len(validation) < 2:
            raise ValueError(
                "Validation takes at least two images. Without --dataset_validation_split it gets a tenth of the "
                "training rows: give more than ten of them, or name a split with more images."
            )
        return dataset, validation

    def stop_early(self, args: ContrastivePOConfig) -> None:
        """Let the trainer keep its best checkpoint, where training is to stop early."""
        if self.early_stopping_patience is None:
            return
        if args.eval_strategy == "no" or args.eval_strategy != args.save_strategy:
            raise ValueError(
                f"--early_stopping_patience compares checkpoints, but eval_strategy={str(args.eval_strategy)!r} and "
                f"save_strategy={str(args.save_strategy)!r}. Give both the same: --eval_strategy epoch "
                "--save_strategy epoch."
            )
        if args.eval_strategy == "steps" and args.eval_steps != args.save_steps:
            raise ValueError(
                f"--early_stopping_patience keeps the best evaluated checkpoint, but eval_steps={args.eval_steps} and "
                f"save_steps={args.save_steps}. Give both --eval_steps and --save_steps the same number."
            )
        args.load_best_model_at_end = args.greater_is_better = True
        args.metric_for_best_model = "typographic_accuracy" if self.max_clean_cost is None else "trade_off"

    def saves_other_weights(self, args: ContrastivePOConfig) -> bool:
        """Whether what is saved are not the weights of the last evaluation, so that it is to be measured itself."""
        return args.load_best_model_at_end or self.moving_average is not None or self.max_clean_cost is not None

    def callbacks(self) -> list[TrainerCallback]:
        """The callbacks that the arguments ask for."""
        found: list[TrainerCallback] = []
        if self.moving_average is not None:
            found.append(BetaMovingAverageCallback(self.moving_average))
        if self.early_stopping_patience is not None:
            found.append(EarlyStoppingCallback(self.early_stopping_patience))
        return found


def fit_to_size(width: int, rows: int, adapters: bool) -> dict[str, float]:
    """Learning rate and epochs where the user gives none.

    The learning rate falls with the square of the vision tower's width, from what was found best at 128, so that
    it is near 1e-5 for ViT-B; adapters, which are small, take more. Small data sets are seen more often.

    Args:
        width: Hidden size of the vision tower.
        rows: Rows of the training data.
        adapters: Whether only adapters train.
    """
    full = 3e-4 * (128 / width) ** 2
    return {
        "learning_rate": full * (4.0 if adapters else 1.0),
        "num_train_epochs": float(min(10, max(3, math.ceil(12_000 / rows)))),
    }


def workers(processes: int) -> int:
    """Processes that draw attacks beside each training process: half of its share of the cores, 1 to 8."""
    return min(8, max(1, (os.cpu_count() or 2) // (2 * processes)))


def parse(argv: Sequence[str]) -> tuple[TrainArguments, ContrastivePOConfig, ModelConfig]:
    """The arguments: flags over YAML (`--config`) over `--preset` over the command line's defaults."""
    parser = TrlParser([TrainArguments, ContrastivePOConfig, ModelConfig], prog="clip-po train")
    chosen = flag_value("preset", argv)
    share = workers(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    # None would become "trainer_output", in whatever folder the command is called.
    defaults = {**DEFAULTS, "output_dir": "", "lora_target_modules": None, "dataloader_num_workers": share}
    if chosen is not None:
        defaults |= preset(chosen)
    parser.set_defaults_with_config(**defaults)
    task_args, args, model_args = parse_flags(parser, argv)
    if args.per_device_train_batch_size is None:
        paper = preset_batch_size(args.gradient_accumulation_steps)
        args.per_device_train_batch_size = BATCH_SIZE if chosen is None else paper
    if str(args.resume_from_checkpoint).lower() == "true":
        args.resume_from_checkpoint = True
    return task_args, args, model_args
