"""clip-po train: align a model on labelled images with words written on them, or on feedback of any kind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin
from transformers.trainer_utils import HubStrategy
from trl import ModelConfig

from clip_po.cli.arguments import Task
from clip_po.cli.idle_flags import check_lora_flags
from clip_po.cli.promise import keep_bounds, load_promised_sets, promised
from clip_po.cli.train_arguments import TrainArguments, fit_to_size, parse
from clip_po.cli.train_drift import log_drift
from clip_po.cli.train_feedback import load_feedback, train_on_feedback
from clip_po.cli.train_model import adapters, check_model_arguments, finish, load_start
from clip_po.config import ContrastivePOConfig
from clip_po.data.attacks.fonts import training_fonts
from clip_po.data.generic_images import MixedPreferences
from clip_po.data.pairs import PreferencePairs
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.dual_encoder import as_dual_encoder
from clip_po.evaluation.evaluator import RobustnessEvaluator
from clip_po.evaluation.pseudo_labelling import LABEL_COLUMN, WEIGHT_COLUMN, pseudo_labels
from clip_po.evaluation.readable import readable_rows
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.trainer import ContrastivePOTrainer
from clip_po.training.callbacks import EvaluatorCallback
from clip_po.training.printed_logs import print_numbers


def main(argv: Sequence[str]) -> None:
    """Train, say how far the model moved, and save the checkpoint with processor, task, drift and model card.

    Args:
        argv: Command line after `clip-po train`.

    Raises:
        NothingChanged: If the saved model is the one that training started from.
    """
    feedback = load_feedback(argv)
    if feedback is not None:
        train_on_feedback(argv, feedback)
        return
    task_args, args, model_args = parse(argv)
    start = time.time()
    trainer, task = align(task_args, args, model_args)
    drift = log_drift(trainer, task)
    if trainer.is_world_process_zero():
        print(drift.describe())
        drift.save(args.output_dir)
    save(trainer, task)
    finish(trainer, str(model_args.model_name_or_path), start)


def align(
    task_args: TrainArguments, args: ContrastivePOConfig, model_args: ModelConfig
) -> tuple[ContrastivePOTrainer, Task]:
    """Train, and keep the bounds on what the model may lose.

    Returns:
        The trainer, which holds the model to save, and the task.
    """
    check_model_arguments(args, model_args)
    check_lora_flags(model_args)
    task_args.check_labelled()
    task_args.stop_early(args)
    dataset = task_args.load(task_args.dataset_train_split, args.seed)
    names, (template,) = task_args.names(dataset), task_args.templates()
    task = Task.of(names, template, task_args.dataset_names(dataset))
    sets = load_promised_sets(task_args.retention, [task.prompt_template])
    model, processor = load_start(args, model_args)
    rows = load_preferences(dataset, task, model, processor, task_args, args)
    trainer = make_trainer(model, processor, rows, task_args, args, model_args)
    print_numbers(trainer)
    templates = [task.prompt_template]
    images = None if rows.validation is None else validation_images(rows.validation, processor)
    if images is not None and args.eval_strategy != "no":
        evaluator = RobustnessEvaluator(
            images,
            templates,
            max_clean_cost=task_args.max_clean_cost,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
        )
        trainer.add_callback(EvaluatorCallback(trainer, evaluator))
    bounds, measures = task_args.bounds, {}
    if rows.validation is not None and bounds.given:
        measures = promised(trainer, rows.validation, bounds, sets)
    if trainer.is_world_process_zero():
        print(describe_training(trainer), flush=True)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if images is not None and bounds.given:
        keep_bounds(trainer, images, templates, bounds, measures)
    if args.eval_strategy != "no" and task_args.saves_other_weights(args):
        trainer.evaluate()
    return trainer, task


def describe_training(trainer: ContrastivePOTrainer) -> str:
    """Describe the rows and the precision of a training, which depend on defaults and on the machine.

    Args:
        trainer: The trainer.

    Returns:
        One line.
    """
    preferences = cast(PreferencePairs, trainer.train_dataset).preferences
    shown = f"{len(preferences):,} images"
    if isinstance(preferences, MixedPreferences):
        whose = "them" if trainer.reg_dataset is None else f"{len(trainer.reg_dataset):,} photographs without labels"
        shown = f"{len(preferences.task):,} images, and {len(preferences.generic):,} crops and collages of {whose}"
    precision = {"bf16": "bfloat16 (--bf16 false for float32)", "fp16": "float16"}
    return f"Training on {shown}, in {precision.get(str(trainer.args.mixed_precision), 'float32')}."


@dataclass(frozen=True)
class TrainPreferences:
    """Preferences of a run.

    Attributes:
        train: Preferences to train on.
        validation: Preferences to evaluate and choose on. None if nothing is measured.
        generic: Ordinary images without labels. None if there are none.
    """

    train: TypographicPreferences
    validation: TypographicPreferences | None
    generic: Dataset | None = None


def load_preferences(
    dataset: Dataset,
    task: Task,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    task_args: TrainArguments,
    args: ContrastivePOConfig,
) -> TrainPreferences:
    """Split and label the rows as the arguments say, and attack their images."""

    def readable(rows: Dataset) -> Dataset:
        workers, silent = args.dataloader_num_workers, bool(args.disable_tqdm)
        return readable_rows(rows, task_args.image_column, args.on_bad_image, num_workers=workers, disable_tqdm=silent)

    validation = None
    if task_args.validates(args):
        dataset, validation = task_args.with_validation(dataset, args.seed)
        validation = readable(validation)
    columns = {"image_column": task_args.image_column, "label_column": task_args.label_column}
    if task_args.labels == "reference":
        dataset, validation = (
            None if rows is None else own_answers(rows, model, processor, task, task_args.image_column, args)
            for rows in (readable(dataset), validation)
        )
        columns |= {"label_column": LABEL_COLUMN, "weight_column": WEIGHT_COLUMN}

    def preferences(rows: Dataset, seed: int) -> TypographicPreferences:
        attack = task_args.attack(task.class_names, training_fonts(), processor, seed)
        return TypographicPreferences(
            rows, attack, task.class_names, task.prompt_template, rejected=task_args.rejected, **columns
        )

    return TrainPreferences(
        preferences(dataset, args.seed),
        None if validation is None else preferences(validation, args.seed + 1),
        task_args.generic_images(args.seed),
    )


def make_trainer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: TrainPreferences,
    task_args: TrainArguments,
    args: ContrastivePOConfig,
    model_args: ModelConfig,
) -> ContrastivePOTrainer:
    """Return the trainer. Arguments that are not given are filled in from the size of model and data."""
    peft_config = adapters(model_args, model, args)
    width = as_dual_encoder(model).width("vision" if args.train_vision_model else "text")
    for name, value in fit_to_size(width, len(rows.train), bool(peft_config)).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if peft_config is not None and task_args.bounds.given:
        # The final model has its adapters merged. Adapters pushed by earlier saves would stay beside it on the Hub.
        args.hub_strategy = HubStrategy.END
    return ContrastivePOTrainer(
        model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.validation if args.eval_strategy != "no" else None,
        processing_class=processor,
        peft_config=peft_config,
        reg_dataset=rows.generic,
        candidate_texts=rows.train.all_texts,
        callbacks=task_args.callbacks(),
    )


def own_answers(
    rows: Dataset,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    task: Task,
    image_column: str,
    args: ContrastivePOConfig,
) -> Dataset:
    """Return the rows with the model's own predictions as labels and its confidence as weights."""
    # Configured as the trainer's own: all accelerators of a process share one state.
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.use_cpu)
    return pseudo_labels(
        model.to(accelerator.device),
        processor,
        rows,
        task.class_names,
        [task.prompt_template],
        image_column=image_column,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        accelerator=accelerator,
        disable_tqdm=bool(args.disable_tqdm),
    )


def validation_images(rows: TypographicPreferences, processor: ProcessorMixin) -> RobustnessImages:
    """Return the images of validation preferences, with the same attacks."""
    return RobustnessImages(
        rows.dataset,
        rows.attack,
        processor,
        rows.class_names,
        image_column=rows.image_column,
        label_column=rows.label_column,
    )


def save(trainer: ContrastivePOTrainer, task: Task) -> None:
    """Save the model with processor, task and model card, and push it if the arguments say so."""
    if trainer.is_world_process_zero():
        task.save(trainer.args.output_dir)
        trainer.create_model_card()
    trainer.save_model()
