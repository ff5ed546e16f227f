"""Saving and pushing checkpoints: safetensors, processor, arguments without secrets, and no pickle."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from peft import PeftModel
from torch import Tensor
from transformers import ProcessorMixin, Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from clip_po.adapters import save_adapters
from clip_po.hub.card import CARD_FILE
from clip_po.hub.redaction import publishable, redacted

logger = logging.get_logger(__name__)

TRAINING_ARGS_FILE = "training_args.json"


def save_pretrained(
    folder: str | Path,
    model: Any,
    processor: ProcessorMixin,
    settings: Mapping[str, Any],
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model in safetensors, its processor, and the training arguments as JSON.

    `Trainer` pickles its arguments beside every model, with the Hub token in clear text. This function does not.

    Args:
        folder: Created if it does not exist.
        model: Model, adapters or transformation with a `save_pretrained` of its own.
        processor: Processor of the model.
        settings: Training arguments. Secrets are replaced, and absolute paths reduced to their last part.
        state_dict: Weights as Trainer gathered them from several processes; None for those of `model`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    card = Path(folder, CARD_FILE)
    written = card.read_bytes() if card.is_file() else None
    save = functools.partial(save_adapters, model) if isinstance(model, PeftModel) else model.save_pretrained
    save(folder, state_dict=state_dict)
    if written is not None:  # PEFT and ModelHubMixin write a card of their own, PEFT with the folder of the base model
        card.write_bytes(written)
    else:
        card.unlink(missing_ok=True)
    processor.save_pretrained(folder)
    text = json.dumps(publishable(settings), indent=2, sort_keys=True, default=str)
    Path(folder, TRAINING_ARGS_FILE).write_text(text + "\n")


def push_checkpoint(trainer: Trainer, folder: Path, strategy: HubStrategy) -> None:
    """Push a whole checkpoint while training goes on. An error of the Hub is a warning, not the end of the run.

    Args:
        trainer: The trainer. Every process must call the function.
        folder: The checkpoint.
        strategy: `hub_strategy` of the arguments, not "end".
    """
    try:
        _push(trainer, folder, strategy)
    except Exception as error:  # hours of training must not end because of the Hub
        logger.warning(
            f"Pushing the checkpoint {str(folder)!r} to {trainer.hub_model_id!r} failed ({type(error).__name__}: "
            f"{redacted(str(error))}). It is whole on the disk, and training goes on."
        )


def _push(trainer: Trainer, folder: Path, strategy: HubStrategy) -> None:
    args = trainer.args
    message = f"Training in progress, step {trainer.state.global_step}"
    trainer.push_to_hub(commit_message=message, revision=args.hub_revision)
    if strategy != HubStrategy.EVERY_SAVE and trainer.is_world_process_zero():
        huggingface_hub.upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=folder,
            path_in_repo="last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name,
            commit_message=f"{message}, checkpoint",
            token=args.hub_token,
            revision=args.hub_revision,
        )
