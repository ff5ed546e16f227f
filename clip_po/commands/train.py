"""clip-po train: align a CLIP on labelled images on which words are written."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from peft import PeftConfig
from trl import ModelConfig, TrlParser, get_peft_config

from clip_po.commands.arguments import DEFAULT_TEMPLATE, Task, TaskArguments
from clip_po.config import PRESETS, ContrastivePOConfig, preset, preset_batch_size
from clip_po.data.fonts import training_fonts
from clip_po.data.pairs import TypographicPreferences
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
    preset: str | None = field(
        default=None,
        metadata={"help": "The paper's settings, which single flags override.", "choices": sorted(PRESETS)},
    )


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
    chosen = _given("preset", argv)
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


def _given(name: str, argv: Sequence[str]) -> str | None:
    """The value of a flag that must be known before all others are parsed, from the flags or the YAML file."""
    for position, word in enumerate(argv):
        if word == f"--{name}":
            return argv[position + 1] if position + 1 < len(argv) else None
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    if name != "config" and (file := _given("config", argv)) is not None:
        with open(file) as stream:
            return (yaml.safe_load(stream) or {}).get(name)
    return None


def adapters(model_args: ModelConfig) -> PeftConfig | None:
    """The adapters that the LoRA flags describe, by default on the linear layers of the vision tower."""
    model_args.lora_task_type = None
    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = VISION_ATTENTION
    return get_peft_config(model_args)


def main(argv: Sequence[str]) -> None:
    """Train, save the checkpoint with its processor and task, and write its model card."""
    task_args, args, model_args = parse(argv)
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: a Hub id or the folder of a CLIPModel.")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("--load_in_4bit and --load_in_8bit are not supported: a CLIP is small. Leave them out.")
    if args.output_dir is None:
        raise ValueError("--output_dir is missing: where the checkpoint goes.")
    start = time.time()
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
    peft_config = adapters(model_args)
    for name, value in fit_to_size(model.config.vision_config.hidden_size, len(dataset), bool(peft_config)).items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    def preferences(rows: Any) -> TypographicPreferences:
        return TypographicPreferences(
            rows,
            task_args.attack(names, training_fonts(), side, args.seed),
            names,
            template,
            task_args.image_column,
            task_args.label_column,
            task_args.rejected,
        )

    train = preferences(dataset)
    wanted = args.eval_strategy != "no"
    held_out = preferences(task_args.load(task_args.dataset_test_split, args.seed)) if wanted else None
    trainer = ContrastivePOTrainer(
        model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=peft_config,
        candidate_texts=train.texts,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        Task(names, template).save(args.output_dir)
        trainer.create_model_card()
    trainer.save_model()  # pushes too, where the arguments say so
    if trainer.is_world_process_zero():
        print(f"Aligned {model_args.model_name_or_path} in {time.time() - start:.0f} s: {args.output_dir}")
    trainer.accelerator.end_training()
