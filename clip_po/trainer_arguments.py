"""Checks of a trainer's arguments by their kind, before anything is loaded: each in its own place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import (
    BaseImageProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import number_of_arguments

from clip_po.data.typographic_preferences import AttackedClasses

OWN_PLACES: Mapping[str, tuple[type, ...]] = {
    "args": (TrainingArguments,),
    "processing_class": (ProcessorMixin, PreTrainedTokenizerBase, BaseImageProcessor),
    "train_dataset": (
        *(Dataset, DatasetDict, IterableDataset, AttackedClasses),
        *(torch.utils.data.Dataset, torch.utils.data.DataLoader, list),
    ),
}
"""Kinds of values by the argument that they belong to."""


def check_places(model: Any, ref_model: Any, data_collator: Any, model_init: Any, optimizers: Any) -> None:
    """Raise if a value stands in the place of another argument, as it happens with arguments without names.

    Args:
        model: As in the trainer.
        ref_model: As in the trainer.
        data_collator: As in the trainer.
        model_init: As in the trainer.
        optimizers: As in the trainer.

    Raises:
        TypeError: If a value belongs to another argument, or can't be called where a function is needed.
        ValueError: If there is no model, or a model in two ways.
    """
    if (model is None) == (model_init is None):
        raise ValueError(
            "The trainer needs either model or model_init, and got "
            + ("neither. Pass the name of a checkpoint." if model is None else "both. Leave one of the two out.")
        )
    if model_init is not None and not callable(model_init):
        raise TypeError(
            f"model_init must be a function that returns a model, got {type(model_init).__name__}. Pass model=... for "
            "a model or its name."
        )
    if model_init is not None and any(optimizer is not None for optimizer in optimizers):
        raise ValueError(
            "optimizers belong to one model, but model_init makes a new one for each training. Leave optimizers out."
        )
    for name, value in {"model": model, "ref_model": ref_model, "data_collator": data_collator}.items():
        own = next((place for place, kinds in OWN_PLACES.items() if isinstance(value, kinds)), None)
        if own is not None:
            raise TypeError(
                f"{name} is a {type(value).__name__}, which belongs to {own}. Arguments without names come in the "
                f"order model, ref_model, args, data_collator, train_dataset. Pass {own}=..."
            )
    if data_collator is not None and not callable(data_collator):
        raise TypeError(
            f"data_collator must be a function from a list of rows to a batch, got {type(data_collator).__name__}. "
            "Leave it out to use DataCollatorForContrastivePreference."
        )


def initial_model(model_init: Callable[..., Any], seed: int, trial: Any = None) -> Any:
    """Call `model_init` of the trainer, with the same random state each time.

    Args:
        model_init: A function of no argument, or of the trial.
        seed: Seed of all random generators.
        trial: The trial of a hyperparameter search; None outside of one.

    Returns:
        What the function returns.

    Raises:
        TypeError: If it returns nothing.
    """
    set_seed(seed)
    model = model_init(trial) if number_of_arguments(model_init) else model_init()
    if model is None:
        raise TypeError("model_init returned None. Let it return the model.")
    return model


def check_trial(trial: Any, args: TrainingArguments) -> None:
    """Raise if the trials of a hyperparameter search would save checkpoints, each in a folder of its own.

    Args:
        trial: The trial; None outside of a search.
        args: The configuration.

    Raises:
        ValueError: If there is a trial and checkpoints are saved.
    """
    if trial is not None and args.save_strategy != "no":
        raise ValueError(
            f"save_strategy={str(args.save_strategy)!r}, but the trials of hyperparameter_search save no checkpoints. "
            "Set save_strategy='no', and train once more with the best arguments."
        )
