"""clip-po train on feedback: preferences between texts or images, and unpaired feedback, as they are."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import ModelConfig

from clip_po.candidates import CandidateTexts
from clip_po.cli.flags import flag_value
from clip_po.cli.idle_flags import check_lora_flags
from clip_po.cli.train_arguments import TrainArguments, fit_to_size, parse
from clip_po.cli.train_model import adapters, check_model_arguments, finish, load_start
from clip_po.config import ContrastivePOConfig
from clip_po.data.anchored_rows import AnchoredRows
from clip_po.data.image_folder import has_images
from clip_po.data.loading import load_split
from clip_po.data.row_kinds import Kind, has_kinds
from clip_po.data.table_files import find_tables
from clip_po.dual_encoder import as_dual_encoder
from clip_po.scoring.hard_candidates import hard_images, hard_texts
from clip_po.scoring.scorer import Scorer
from clip_po.trainer import ContrastivePOTrainer
from clip_po.training.printed_logs import print_numbers
from clip_po.validation import COUNT, check_number

WORDS: Mapping[Kind, str] = {
    "texts": "preferences between texts",
    "images": "preferences between images",
    "unpaired": "unpaired feedback",
}
"""What rows of each kind are called."""

LOSS_OF_PAIRS, LOSS_OF_SINGLE_TEXTS = "sigmoid", "kto"

CHOSEN_IMAGE = {"text", "chosen_image"}
"""Columns of preferences between images, to which --hard_candidates adds the rejected ones."""

LABELLED_ONLY = (
    *("max_clean_cost", "max_drift", "max_retention_cost", "retention", "early_stopping_patience"),
    *("rejected", "labels", "name_until", "class_name_map"),
)
"""Flags about labelled images."""


def load_feedback(argv: Sequence[str]) -> Dataset | None:
    """Load the training rows of a command line if they are feedback.

    Args:
        argv: Command line after `clip-po train`.

    Returns:
        The rows; None if they are labelled images, or can't be loaded: the training on these says why.
    """
    name, column = flag_value("dataset_name", argv), flag_value("image_column", argv) or "image"
    split = flag_value("dataset_train_split", argv) or "train"
    try:
        if name is None or (Path(name).is_dir() and has_images(Path(name)) and not find_tables(Path(name), split)):
            return None
        rows = load_split(name, split, flag_value("dataset_config", argv), column)
    except (ValueError, OSError):
        return None
    chosen = any(columns <= set(rows.column_names) for columns in ({"image", "chosen"}, CHOSEN_IMAGE))
    return rows if (chosen or has_kinds(rows.column_names, rows.features)) and len(rows) else None


def train_on_feedback(argv: Sequence[str], rows: Dataset) -> None:
    """Train on feedback, and save the checkpoint with processor and model card.

    Args:
        argv: Command line after `clip-po train`.
        rows: The training rows.

    Raises:
        ValueError: If flags do not suit the rows, or as for the trainer.
        NothingChanged: If the saved model is the one that training started from.
    """
    kinds = kinds_of(rows)
    task_args, args, model_args = parse(argv, method_of(kinds, rows.column_names, argv))
    check_flags(task_args)
    check_hard_candidates(task_args, kinds)
    check_model_arguments(args, model_args)
    check_lora_flags(model_args)
    start = time.time()
    trainer = feedback_trainer(rows, kinds, task_args, args, model_args)
    print_numbers(trainer)
    if trainer.is_world_process_zero():
        print(describe_feedback(len(trainer.train_dataset or ()), kinds, trainer.args), flush=True)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        trainer.create_model_card()
    trainer.save_model()
    finish(trainer, str(model_args.model_name_or_path), start)


def kinds_of(rows: Dataset) -> list[Kind]:
    """Return the kinds of the rows, each once, in the order of `WORDS`."""
    if not has_kinds(rows.column_names, rows.features):
        return ["images" if set(rows.column_names) >= CHOSEN_IMAGE else "texts"]
    found = set(AnchoredRows(rows, CandidateTexts(), "the dataset").kinds)
    return [kind for kind in WORDS if kind in found]


def method_of(kinds: Collection[Kind], columns: Collection[str], argv: Sequence[str]) -> dict[str, Any]:
    """Return the default losses and regularization for feedback.

    Args:
        kinds: The kinds of the rows.
        columns: Columns of the rows.
        argv: Command line after `clip-po train`.

    Returns:
        Arguments by name. Without ordinary images, nothing is regularized.
    """
    losses = [LOSS_OF_PAIRS] * (set(kinds) != {"unpaired"}) + [LOSS_OF_SINGLE_TEXTS] * ("unpaired" in kinds)
    own_images = "clean_image" in columns and "images" not in kinds
    if flag_value("reg_dataset_name", argv) is None and not own_images:
        return {"loss_type": losses, "reg_weight": 0.0}
    return {"loss_type": losses}


def check_flags(task_args: TrainArguments) -> None:
    """Raise if a flag was given that only labelled images have a use for.

    Raises:
        ValueError: If so; the message names it.
    """
    for name in LABELLED_ONLY:
        if getattr(task_args, name) != getattr(TrainArguments, name):
            raise ValueError(
                f"--{name} is for labelled images, but the rows of {task_args.dataset_name!r} are feedback. Leave it "
                "out; clip-po evaluate measures a checkpoint on labelled images."
            )


def check_hard_candidates(task_args: TrainArguments, kinds: Sequence[Kind]) -> None:
    """Raise if hard candidates can't be added to rows.

    Args:
        task_args: The flags about them.
        kinds: The kinds of the rows.

    Raises:
        ValueError: If the rows are not preferences of one kind, or a flag has no effect.
    """
    if task_args.hard_candidates is None:
        if task_args.hard_margin is not None:
            raise ValueError("--hard_margin has no effect without --hard_candidates. Leave it out.")
        return
    check_number("--hard_candidates", task_args.hard_candidates, COUNT)
    if list(kinds) not in (["texts"], ["images"]):
        raise ValueError(
            f"--hard_candidates adds rejected texts or images to preferences of one kind, but the rows are "
            f"{' and '.join(WORDS[kind] for kind in kinds)}. Leave it out, or train on each kind by itself."
        )


def with_hard_candidates(
    rows: Dataset,
    kind: Kind,
    task_args: TrainArguments,
    args: ContrastivePOConfig,
    model_name: str,
    texts: Sequence[str] | None,
) -> Dataset:
    """Add the hard candidates that the flags ask for. Other processes wait for the cache of the first.

    Args:
        rows: The training rows.
        kind: "texts" or "images".
        task_args: `hard_candidates` and `hard_margin`.
        args: `bf16` and the batch size.
        model_name: The checkpoint that training starts from.
        texts: The texts to choose from; None for those of the rows.

    Returns:
        The rows; unchanged without --hard_candidates.

    Raises:
        ValueError, UnreadableImage: As for `hard_texts` and `hard_images`.
    """
    if task_args.hard_candidates is None:
        return rows
    precision = torch.bfloat16 if args.bf16 else None
    scorer = Scorer(model_name, device=args.device, batch_size=args.per_device_eval_batch_size, precision=precision)
    with args.main_process_first(desc="hard candidates"):
        if kind == "images":
            return hard_images(rows, scorer, task_args.hard_candidates, margin=task_args.hard_margin)
        return hard_texts(rows, scorer, task_args.hard_candidates, texts=texts, margin=task_args.hard_margin)


def feedback_trainer(
    rows: Dataset, kinds: Sequence[Kind], task_args: TrainArguments, args: ContrastivePOConfig, model_args: ModelConfig
) -> ContrastivePOTrainer:
    """Return the trainer of feedback. Arguments that are not given are filled in from the size of model and data.

    Args:
        rows: The training rows.
        kinds: The kinds of the rows.
        task_args: Splits, ordinary images and class names.
        args: The configuration.
        model_args: The model and its adapters.

    Returns:
        The trainer. Its candidate texts are the prompts of --class_names, if these are given.
    """
    rows, held_out = task_args.sample(rows, args.seed), None
    if args.eval_strategy != "no":
        rows, held_out = _with_validation(rows, task_args, args.seed)
    model, processor = load_start(args, model_args)
    peft_config = adapters(model_args, model, args)
    width = as_dual_encoder(model).width("vision" if args.train_vision_model else "text")
    for name, value in fit_to_size(width, len(rows), bool(peft_config)).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    (template,) = task_args.templates()
    texts = None if task_args.class_names is None else [template.format(c) for c in task_args.class_names]
    rows = with_hard_candidates(rows, kinds[0], task_args, args, str(model_args.model_name_or_path), texts)
    return ContrastivePOTrainer(
        model,
        args=args,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=peft_config,
        reg_dataset=task_args.generic_images(args.seed, others=("text",)),
        candidate_texts=texts,
        callbacks=task_args.callbacks(),
    )


def _with_validation(rows: Dataset, task_args: TrainArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Return training and validation rows: those of the validation split, or else a tenth that is held out."""
    if task_args.dataset_validation_split is not None:
        return rows, task_args.sample(task_args.read(task_args.dataset_validation_split), seed)
    if len(rows) < 2:
        raise ValueError("One row can't be split into training and validation. Give more rows, or --eval_strategy no.")
    parts = rows.train_test_split(test_size=0.1, seed=seed)
    return parts["train"], parts["test"]


def describe_feedback(rows: int, kinds: Sequence[Kind], args: ContrastivePOConfig) -> str:
    """Describe what was found and how it is trained on, which depend on the columns.

    Args:
        rows: Number of training rows.
        kinds: Their kinds.
        args: The configuration of the trainer.

    Returns:
        One line.
    """
    found = " and ".join(WORDS[kind] for kind in kinds)
    held = f"held by {args.reg_type} on ordinary images" if args.reg_weight else "without ordinary images"
    return f"Found {found}: {rows:,} rows. Training with loss_type {' + '.join(args.loss_type)}, {held}."
