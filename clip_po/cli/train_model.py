"""The model of clip-po train: loaded, with adapters, and compared with the start when it is saved."""

from __future__ import annotations

import time

from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel, ProcessorMixin
from trl import ModelConfig, get_peft_config

from clip_po.cli.outcome import NothingChanged
from clip_po.config import ContrastivePOConfig, check_precision
from clip_po.evaluation.interpolation import interpolate
from clip_po.models import init_kwargs, load_model, load_processor
from clip_po.trainable import trained_linear_layers
from clip_po.trainer import ContrastivePOTrainer
from clip_po.training.output_folder import check_unused
from clip_po.validation import check_writable

SAVED_FILES = ("model*.safetensors", SAFETENSORS_WEIGHTS_NAME)
"""Patterns of the files of a model or of adapters that the command saves."""

UNCHANGED_REMEDY = (
    "With a bound such as --max_clean_cost, the table above shows what each interpolation costs: give more validation "
    "images or a higher bound. Otherwise, train longer or with a higher --learning_rate."
)
"""What to do if training left the model as it was."""


def check_model_arguments(args: ContrastivePOConfig, model_args: ModelConfig) -> None:
    """Raise if the model or the output folder can't be used, before anything is loaded.

    Raises:
        ValueError: If there is no model, it is to be quantized, a CPU is to compute in float16, or the output folder
            holds an earlier run.
        OSError: If the output folder is not writable.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing. Give the Hub id or folder of a model such as CLIP.")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("--load_in_4bit and --load_in_8bit are not supported: a CLIP is small. Leave them out.")
    check_precision(args)
    if args.should_save:
        check_writable(args.output_dir, "--output_dir")
        check_unused(args, args.resume_from_checkpoint, SAVED_FILES)


def load_start(args: ContrastivePOConfig, model_args: ModelConfig) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load the model that training starts from, and its processor."""
    init = {"dtype": model_args.dtype, "revision": model_args.model_revision, **init_kwargs(args.model_init_kwargs)}
    if model_args.attn_implementation is not None:
        init["attn_implementation"] = model_args.attn_implementation
    model = load_model(str(model_args.model_name_or_path), **init)
    args.model_init_kwargs = {k: v for k, v in init.items() if k in ("revision", "token")}
    processor = load_processor(model, args)
    args.model_init_kwargs = None
    return model, processor


def adapters(model_args: ModelConfig, model: PreTrainedModel, args: ContrastivePOConfig) -> PeftConfig | None:
    """Return the adapters that the LoRA flags describe, by default on the linear layers of the blocks that train."""
    model_args.lora_task_type = None
    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = trained_linear_layers(model, args)
    config = get_peft_config(model_args)
    if config is not None and model_args.model_revision != "main":
        config.revision = model_args.model_revision
    return config


def is_changed(trainer: ContrastivePOTrainer) -> bool:
    """Return whether the trained model differs from the reference. Adapters and sharded models count as changed."""
    if isinstance(trainer.model, PeftModel) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return True
    base = interpolate(trainer.reference.initial_model, trainer.model, 0).state_dict()
    return not all(weight.equal(base[name].to(weight)) for name, weight in trainer.model.state_dict().items())


def finish(trainer: ContrastivePOTrainer, model: str, start: float) -> None:
    """Say that training has ended, and how long it took.

    Args:
        trainer: The trainer, whose model is saved.
        model: The model that training started from.
        start: When the command started, as `time.time()`.

    Raises:
        NothingChanged: If the saved model is that model.
    """
    changed = is_changed(trainer)
    if changed and trainer.is_world_process_zero():
        print(f"Aligned {model} in {time.time() - start:.0f} s: {trainer.args.output_dir}")
    trainer.accelerator.end_training()
    if not changed:
        raise NothingChanged(
            f"nothing was changed. {trainer.args.output_dir!r} holds {model!r} as it was. {UNCHANGED_REMEDY}"
        )
