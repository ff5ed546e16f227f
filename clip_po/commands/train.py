"""clip-po train: align a CLIP on labelled images on which words are written."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import ModelConfig, TrlParser, get_peft_config

from clip_po.averaging import BetaMovingAverageCallback, interpolate
from clip_po.callbacks import RobustnessCallback
from clip_po.commands.arguments import DEFAULT_TEMPLATE, Task, TaskArguments, flag_value
from clip_po.config import PRESETS, ContrastivePOConfig, preset, preset_batch_size
from clip_po.data.fonts import training_fonts
from clip_po.data.pairs import TypographicPreferences
from clip_po.evaluation.choice import check_bound, choose, sweep, sweep_table
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.labelling import LABEL_COLUMN, WEIGHT_COLUMN, pseudo_labels
from clip_po.models import image_size, init_kwargs, load_model, load_processor
from clip_po.trainer import ContrastivePOTrainer

VISION_ATTENTION = r".*vision_model.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
"""Where adapters go by default: the linear layers of the vision tower."""

BATCH_SIZE = 64

DEFAULTS: Mapping[str, Any] = {
    "loss_type": ["sigmoid", "sft"],
    "beta": 1.0,
    "reg_weight": 3.0,
    "per_device_eval_batch_size": 256,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "save_strategy": "epoch",
    "save_total_limit": 1,
    # Chosen where they are not given: the batch size below, the others in `fit_to_size`.
    "per_device_train_batch_size": None,
    "learning_rate": None,
    "num_train_epochs": None,
}
"""Defaults of the command line, chosen by experiment on photographs and digits (benchmarks/photographs.py).

DPO alone moves one difference of logits: it unlearns the word, but not what the ink hides. Cross-entropy on the chosen
text beside it teaches that too."""


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
            "accuracy within max_clean_cost. Needs an eval_strategy and the same save_strategy.",
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


def parse(argv: Sequence[str]) -> tuple[TrainArguments, ContrastivePOConfig, ModelConfig]:
    """The arguments: flags over YAML (`--config`) over `--preset` over the command line's defaults."""
    parser = TrlParser([TrainArguments, ContrastivePOConfig, ModelConfig], prog="clip-po train")
    chosen = flag_value("preset", argv)
    defaults = {**DEFAULTS, "output_dir": None, "lora_target_modules": None}
    if chosen is not None:
        defaults |= preset(chosen)
    parser.set_defaults_with_config(**defaults)
    task_args, args, model_args = parser.parse_args_and_config(list(argv))
    if args.per_device_train_batch_size is None:
        paper = preset_batch_size(args.gradient_accumulation_steps)
        args.per_device_train_batch_size = BATCH_SIZE if chosen is None else paper
    if str(args.resume_from_checkpoint).lower() == "true":
        args.resume_from_checkpoint = True
    return task_args, args, model_args


def adapters(model_args: ModelConfig) -> PeftConfig | None:
    """The adapters that the LoRA flags describe, by default on the linear layers of the vision tower."""
    model_args.lora_task_type = None
    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = VISION_ATTENTION
    return get_peft_config(model_args)


def align(
    task_args: TrainArguments, args: ContrastivePOConfig, model_args: ModelConfig
) -> tuple[ContrastivePOTrainer, Task]:
    """Train and choose; the trainer holds the model that is to be saved, for the task."""
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: a Hub id or the folder of a CLIPModel.")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("--load_in_4bit and --load_in_8bit are not supported: a CLIP is small. Leave them out.")
    if args.output_dir is None:
        raise ValueError("--output_dir is missing: where the checkpoint goes.")
    dataset = task_args.load(task_args.dataset_train_split, args.seed)
    names = task_args.names(dataset)
    template = task_args.prompt_template or DEFAULT_TEMPLATE

    init = {"dtype": model_args.dtype, "revision": model_args.model_revision, **init_kwargs(args.model_init_kwargs)}
    if model_args.attn_implementation is not None:
        init["attn_implementation"] = model_args.attn_implementation
    model = load_model(model_args.model_name_or_path, **init)
    args.model_init_kwargs = {k: v for k, v in init.items() if k in ("revision", "token")}
    processor = load_processor(model, args)
    args.model_init_kwargs = None
    side = image_size(processor) or model.config.vision_config.image_size

    validation = None
    if task_args.validates(args):
        dataset, validation = task_args.with_validation(dataset, args.seed)
    columns = {"image_column": task_args.image_column, "label_column": task_args.label_column}
    if task_args.labels == "reference":
        # As the trainer's own will be: there is one state of all accelerators of a process.
        accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.use_cpu)
        model.to(accelerator.device)

        def own(rows: Dataset) -> Dataset:
            return pseudo_labels(
                model,
                processor,
                rows,
                names,
                [template],
                image_column=task_args.image_column,
                batch_size=args.per_device_eval_batch_size,
                num_workers=args.dataloader_num_workers,
                accelerator=accelerator,
                disable_tqdm=bool(args.disable_tqdm),
            )

        dataset, validation = own(dataset), None if validation is None else own(validation)
        columns |= {"label_column": LABEL_COLUMN, "weight_column": WEIGHT_COLUMN}

    def preferences(rows: Dataset, seed: int) -> TypographicPreferences:
        attack = task_args.attack(names, training_fonts(), side, seed)
        return TypographicPreferences(rows, attack, names, template, rejected=task_args.rejected, **columns)

    peft_config = adapters(model_args)
    for name, value in fit_to_size(model.config.vision_config.hidden_size, len(dataset), bool(peft_config)).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    task_args.stop_early(args)
    train = preferences(dataset, args.seed)
    held_out = None if validation is None else preferences(validation, args.seed + 1)
    trainer = ContrastivePOTrainer(
        model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out if args.eval_strategy != "no" else None,
        processing_class=processor,
        peft_config=peft_config,
        candidate_texts=train.texts,
        callbacks=task_args.callbacks(),
    )
    if held_out is None:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        return trainer, Task(names, template)
    images = RobustnessImages(
        held_out.dataset,
        held_out.attack,
        processor,
        names,
        image_column=columns["image_column"],
        label_column=columns["label_column"],
    )
    if args.eval_strategy != "no":
        measured = RobustnessCallback(
            trainer,
            images,
            [template],
            task_args.max_clean_cost,
            args.per_device_eval_batch_size,
            args.dataloader_num_workers,
        )
        trainer.add_callback(measured)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if task_args.max_clean_cost is not None:
        keep_clean_accuracy(trainer, images, [template], task_args.max_clean_cost)
    if args.eval_strategy != "no" and task_args.saves_other_weights(args):
        trainer.evaluate()
    return trainer, Task(names, template)


def keep_clean_accuracy(
    trainer: ContrastivePOTrainer, images: RobustnessImages, templates: Sequence[str], max_clean_cost: float
) -> None:
    """Give the trainer the interpolation from base to aligned model that is sure to cost no more than a bound.

    Adapters are merged: an interpolation of weights is a plain model.
    """
    points = sweep(
        trainer.reference.model,
        trainer.model,
        images,
        templates,
        batch_size=trainer.args.per_device_eval_batch_size,
        num_workers=trainer.args.dataloader_num_workers,
        accelerator=trainer.accelerator,
        disable_tqdm=bool(trainer.args.disable_tqdm),
    )
    choice = choose(points, max_clean_cost)
    if trainer.is_world_process_zero():
        print(f"{sweep_table(points)}\n{choice.describe()}")
        if isinstance(trainer.model, PeftModel):
            print("The adapters are merged into the model: an interpolation is a plain CLIPModel.")
    chosen = interpolate(trainer.reference.model, trainer.model, choice.point.alpha)
    trainer.model = trainer.model_wrapped = trainer.encoder = chosen


def main(argv: Sequence[str]) -> None:
    """Train, save the checkpoint with its processor and task, and write its model card."""
    task_args, args, model_args = parse(argv)
    start = time.time()
    trainer, task = align(task_args, args, model_args)
    save(trainer, task)
    if trainer.is_world_process_zero():
        print(f"Aligned {model_args.model_name_or_path} in {time.time() - start:.0f} s: {args.output_dir}")
    trainer.accelerator.end_training()


def save(trainer: ContrastivePOTrainer, task: Task) -> None:
    """Save the model with its processor, task and card; pushes too, where the arguments say so."""
    if trainer.is_world_process_zero():
        if not isinstance(trainer.model, PeftModel):
            # Of an earlier save: from_pretrained would take them for the model.
            for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                Path(trainer.args.output_dir, file).unlink(missing_ok=True)
        task.save(trainer.args.output_dir)
        trainer.create_model_card()
    trainer.save_model()
