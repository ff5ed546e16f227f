"""Arguments of clip-po train. Flags override YAML, which overrides a preset, which overrides the defaults."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import ModelConfig

from clip_po.cli.arguments import TaskArguments
from clip_po.cli.flags import FlagParser, flag_value, is_given, parse_flags, resumed_checkpoint
from clip_po.cli.precision import precision_defaults
from clip_po.cli.promise import check_bounds
from clip_po.config import PRESETS, ContrastivePOConfig, preset, preset_batch_size
from clip_po.data.unlabelled_images import load_images
from clip_po.evaluation.bounds import Bounds
from clip_po.training.averaging import BetaMovingAverageCallback
from clip_po.validation import COUNT, check_number

BATCH_SIZE = 64

METHOD: Mapping[str, Any] = {
    "loss_type": ["sft", "embedding_distillation"],
    "loss_weights": [3.0, 40.0],
    "reg_type": "embedding",
    "reg_weight": 40.0,
    "reg_share": 0.5,
    "attack_words": ["everyday"],
}
"""The default method, for users who choose neither losses nor a preset (benchmarks/retention.py, docs/retention.md).

Cross-entropy teaches the task. The reference's embedding of the clean image, as the target for the attacked and for
the clean image, belongs to no task: it unlearns reading in general and preserves the answers to all texts. Collages of
the training images, or photographs of the user, show more of the world than the images of the task do."""

TEXT_METHOD: Mapping[str, Any] = {"loss_type": ["sft", "distillation"]}
"""The default method if the text tower trains, or the vision tower does not: embeddings are no target then."""

LABEL_FREE_METHOD: Mapping[str, Any] = {**METHOD, "loss_type": ["embedding_distillation"], "loss_weights": [40.0]}
"""The default method for images without labels."""

DEFAULTS: Mapping[str, Any] = {
    "beta": 1.0,
    "reg_weight": 1.0,
    "per_device_eval_batch_size": 256,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "lora_dropout": 0.0,  # disable_dropout is on
    # Filled in if they are not given: batch size and workers by `parse`, the others by `fit_to_size`.
    "per_device_train_batch_size": None,
    "dataloader_num_workers": None,
    "learning_rate": None,
    "num_train_epochs": None,
}
"""Defaults of the command for any method."""


@dataclass
class TrainArguments(TaskArguments):
    """Arguments of `clip-po train` in addition to those of the trainer, the model and LoRA."""

    rejected: Literal["word", "others"] = field(
        default="word",
        metadata={
            "help": "Rejected texts. word: only the text of the written word; others: the other classes too (S-DPO).",
        },
    )
    labels: Literal["given", "reference"] = field(
        default="given",
        metadata={
            "help": "Source of the labels. given: the label column; reference: the model's own predictions on clean "
            "images, weighted by its confidence, for images without labels.",
        },
    )
    hard_candidates: int | None = field(
        default=None,
        metadata={
            "help": "For preferences: add to each row so many wrong texts or images that the model before training "
            "scores highest, as rejected ones; default: none.",
        },
    )
    hard_margin: float | None = field(
        default=None,
        metadata={
            "help": "Smallest cosine by which a hard candidate is below the chosen one, so that what may be right too "
            "is left out; default: no limit.",
        },
    )
    reg_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Ordinary photographs of any kind, without labels, that preserve what the model knows: a Hub id, "
            "a folder, or a file. They are mixed into the training rows (reg_share)."
        },
    )
    reg_dataset_split: str = field(default="train", metadata={"help": "Split of reg_dataset_name."})
    reg_max_samples: int = field(
        default=10_000,
        metadata={"help": "Maximum number of these images. Of a dataset on the Hub, only so many are downloaded."},
    )
    dataset_validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate and choose on. Default: a tenth of the training rows, held out."},
    )
    max_clean_cost: float | None = field(
        default=None,
        metadata={
            "help": "Clean accuracy that may be lost, in percentage points. After training, of the interpolations "
            "from base to aligned model that cost at most this much on validation images (95% confidence), the most "
            "robust is saved.",
        },
    )
    max_drift: float | None = field(
        default=None,
        metadata={
            "help": "Largest KL(base || model), in nats, on clean validation images over everyday nouns and the "
            "classes. It bounds the choice of an interpolation as max_clean_cost does, alone or beside it.",
        },
    )
    max_retention_cost: float | None = field(
        default=None,
        metadata={
            "help": "Accuracy that may be lost on the sets of retention, on average, in percentage points. It bounds "
            "the choice of an interpolation as max_clean_cost does, alone or beside it.",
        },
    )
    retention: list[str] | None = field(
        default=None,
        metadata={
            "help": "Sets of labelled images that training does not see, for max_retention_cost: folders, Parquet "
            "files, Hub ids or names of the retention suite, as for clip-po evaluate.",
        },
    )
    moving_average: float | None = field(
        default=None,
        metadata={
            "help": "Save the Beta moving average of the weights of all steps, with this beta. The paper uses 0.7."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many evaluations without improvement and keep the best checkpoint, by "
            "typographic accuracy within max_clean_cost. Requires eval_strategy and the same save_strategy.",
        },
    )
    preset: str | None = field(
        default=None,
        metadata={"help": "Settings of the paper. Other flags override them.", "choices": sorted(PRESETS)},
    )

    def __post_init__(self) -> None:
        """Raise if arguments can't work, before anything is loaded."""
        super().__post_init__()
        self.check_single_prompt()
        check_bounds(self.bounds, self.retention)
        if self.moving_average is not None:
            BetaMovingAverageCallback(self.moving_average)  # checks the beta
        if self.early_stopping_patience is not None:
            check_number("--early_stopping_patience", self.early_stopping_patience, COUNT)
        check_number("--reg_max_samples", self.reg_max_samples, COUNT)

    def generic_images(self, seed: int, others: Sequence[str] = ()) -> Dataset | None:
        """Return the images of --reg_dataset_name, and other columns that it has; None without it.

        Raises:
            ValueError: As for `load_images`.
        """
        if self.reg_dataset_name is None:
            return None
        try:
            return load_images(self.reg_dataset_name, self.reg_dataset_split, self.reg_max_samples, seed, others)
        except ValueError as error:
            raise ValueError(f"--reg_dataset_name: {error} Its split is --reg_dataset_split.") from error

    @property
    def bounds(self) -> Bounds:
        """The bounds on what the saved model may lose."""
        return Bounds(self.max_clean_cost, self.max_drift, self.max_retention_cost)

    def validates(self, args: ContrastivePOConfig) -> bool:
        """Return whether anything is measured on validation images."""
        return args.eval_strategy != "no" or bool(self.bounds.given)

    def with_validation(self, dataset: Dataset, seed: int) -> tuple[Dataset, Dataset]:
        """Return training and validation rows. Without a validation split, a tenth of the training rows is held out.

        Raises:
            ValueError: If there are fewer than two validation rows.
        """
        validation = None
        if self.dataset_validation_split is not None:
            validation = self.load(self.dataset_validation_split, seed, like=dataset)
        elif len(dataset) > 1:
            split = dataset.train_test_split(test_size=0.1, seed=seed)
            dataset, validation = split["train"], split["test"]
        if validation is None or len(validation) < 2:
            raise ValueError(
                "Validation takes at least two images. Without --dataset_validation_split it gets a tenth of the "
                "training rows. Give more than ten training rows, or name a split with more images."
            )
        return dataset, validation

    def check_labelled(self) -> None:
        """Raise if a flag was given that only preferences have a use for.

        Raises:
            ValueError: If so; the message names it.
        """
        for name in ("hard_candidates", "hard_margin"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"--{name} is for preferences, but {self.dataset_name!r} holds labelled images. Leave it "
                    "out; --rejected others rejects all other classes."
                )

    def stop_early(self, args: ContrastivePOConfig) -> None:
        """Configure the trainer to keep its best checkpoint if early stopping is on.

        Raises:
            ValueError: If evaluations and checkpoints do not coincide.
        """
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
        """Return whether the saved weights differ from those of the last evaluation, and need one of their own."""
        return args.load_best_model_at_end or self.moving_average is not None or bool(self.bounds.given)

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callbacks that the arguments ask for."""
        found: list[TrainerCallback] = []
        if self.moving_average is not None:
            found.append(BetaMovingAverageCallback(self.moving_average))
        if self.early_stopping_patience is not None:
            found.append(EarlyStoppingCallback(self.early_stopping_patience))
        return found


def fit_to_size(width: int, rows: int, adapters: bool) -> dict[str, float]:
    """Return learning rate and number of epochs for a model and dataset, for users who give none.

    The learning rate falls with the square of the vision tower's width, starting from the best rate found for width
    128, and is near 6e-6 for ViT-B. Adapters train with four times that. Small datasets are repeated more often.

    Args:
        width: Hidden size of the vision tower.
        rows: Number of training rows.
        adapters: Whether only adapters are trained.

    Returns:
        `learning_rate` and `num_train_epochs`, 3..10.
    """
    full = 2e-4 * (128 / width) ** 2
    return {
        "learning_rate": full * (4.0 if adapters else 1.0),
        "num_train_epochs": float(min(10, max(3, math.ceil(16_000 / rows)))),
    }


def workers(processes: int) -> int:
    """Return the number of data workers per training process: half of its share of the cores, 1 to 8."""
    return min(8, max(1, (os.cpu_count() or 2) // (2 * processes)))


def method_defaults(argv: Sequence[str]) -> Mapping[str, Any]:
    """Return the default method for what a command line asks for.

    Args:
        argv: Command line after the command, without --preset.

    Returns:
        Arguments by name; none if the losses are chosen.
    """
    if is_given("loss_type", argv):
        return {}
    towers = {name: str(flag_value(name, argv)).lower() for name in ("train_text_model", "train_vision_model")}
    if is_given("train_text_model", argv) and towers["train_text_model"] != "false":
        return TEXT_METHOD
    if towers["train_vision_model"] == "false":
        return TEXT_METHOD
    method = dict(LABEL_FREE_METHOD if flag_value("labels", argv) == "reference" else METHOD)
    if flag_value("reg_type", argv) not in (None, method["reg_type"]):
        del method["reg_weight"]  # a KL is a number of another size
    return method


def parse(
    argv: Sequence[str], method: Mapping[str, Any] | None = None
) -> tuple[TrainArguments, ContrastivePOConfig, ModelConfig]:
    """Parse the arguments. Flags override `--config` (YAML), that overrides the preset or method, that `DEFAULTS`.

    Args:
        argv: Command line after `clip-po train`.
        method: Defaults of the method; None for those of typographic robustness.

    Returns:
        The arguments of the task, the trainer and the model.

    Raises:
        ValueError, OSError: As for `parse_flags`.
    """
    parser = FlagParser([TrainArguments, ContrastivePOConfig, ModelConfig], "train")
    chosen = flag_value("preset", argv)
    share = workers(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    # None would become "trainer_output" in the current folder.
    defaults = {**DEFAULTS, "output_dir": "", "lora_target_modules": None, "dataloader_num_workers": share}
    defaults["disable_tqdm"] = not sys.stderr.isatty()
    defaults |= precision_defaults(argv)
    if chosen is not None:
        defaults |= preset(chosen)
    else:
        defaults |= method_defaults(argv) if method is None else method
    parser.set_defaults_with_config(**defaults)
    task_args, args, model_args = parse_flags(parser, argv)
    if args.per_device_train_batch_size is None:
        paper = preset_batch_size(args.gradient_accumulation_steps)
        args.per_device_train_batch_size = BATCH_SIZE if chosen is None else paper
    args.resume_from_checkpoint = resumed_checkpoint(args.resume_from_checkpoint)
    return task_args, args, model_args
