"""Saving and pushing checkpoints: safetensors, processor, arguments without secrets, and no pickle."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitInfo
from peft import PeftModel
from torch import Tensor
from transformers import ProcessorMixin, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging

from clip_po.adapters import save_adapters
from clip_po.hub.card import CARD_FILE
from clip_po.hub.redaction import publishable, redacted
from clip_po.hub.retries import call_hub
from clip_po.hub.stale_files import stale_files

logger = logging.get_logger(__name__)

TRAINING_ARGS_FILE = "training_args.json"


def save_pretrained(
    folder: str | Path,
    model: Any,
    processor: ProcessorMixin,
    settings: Mapping[str, Any],
    state_dict: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Write a model in safetensors, its processor, and the training arguments as JSON.

    `Trainer` pickles its arguments beside every model, with the Hub token in clear text. This function does not.

    Args:
        folder: Created if it does not exist.
        model: Model, adapters or transformation with a `save_pretrained` of its own.
        processor: Processor of the model.
        settings: Training arguments. Secrets are replaced, and absolute paths reduced to their last part.
        state_dict: Weights as Trainer gathered them from several processes; None for those of `model`.
        **kwargs: As in the model's own `save_pretrained`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    card = Path(folder, CARD_FILE)
    written = card.read_bytes() if card.is_file() else None
    save = partial(save_adapters, model) if isinstance(model, PeftModel) else model.save_pretrained
    save(folder, state_dict=state_dict, **kwargs)
    if written is not None:  # PEFT and ModelHubMixin write a card of their own, PEFT with the folder of the base model
        card.write_bytes(written)
    else:
        card.unlink(missing_ok=True)
    # Saved only if it was read from a file, and defaults differ: SigLIP 2 would read texts padded on the left.
    processor.tokenizer.init_kwargs["padding_side"] = processor.tokenizer.padding_side
    processor.save_pretrained(folder)
    text = json.dumps(publishable(settings), indent=2, sort_keys=True, default=str)
    Path(folder, TRAINING_ARGS_FILE).write_text(text + "\n")


@contextlib.contextmanager
def creating_repository(trainer: Trainer, args: TrainingArguments) -> Iterator[None]:
    """Create the repository of a trainer after its `Trainer.__init__`, which would call the Hub only once.

    Args:
        trainer: The trainer, whose `Trainer.__init__` is called inside.
        args: Its arguments.

    Yields:
        Nothing. Inside, `push_to_hub` of the arguments is False.

    Raises:
        HubError: If the Hub refuses, or stays busy or out of reach.
    """
    wanted, args.push_to_hub = args.push_to_hub, False
    try:
        yield
    finally:
        args.push_to_hub = wanted
    if wanted:
        call_hub(f"Creating the repository {args.hub_model_id or args.output_dir!r}", trainer.init_hf_repo)


def push_model(
    trainer: Trainer,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **kwargs: Any,
) -> CommitInfo | Future[CommitInfo] | None:
    """Save the model of a trainer and push its output folder, without checkpoints.

    The commit deletes files of another kind of model, which earlier runs pushed to the repository.

    `Trainer.push_to_hub` can't repeat its upload alone, and saving again needs every process.

    Args:
        trainer: The trainer. Every process must call the function.
        commit_message: Message of the commit.
        blocking: Whether to wait for the end of the upload.
        token: Token with write access; defaults to `hub_token` of the arguments.
        revision: Branch to push to; defaults to `hub_revision` of the arguments.
        private: Whether a new repository is private; defaults to `hub_private_repo` of the arguments.
        **kwargs: As in `create_model_card` of the trainer.

    Returns:
        The commit; a future of it if `blocking` is False; None in every process but the first.

    Raises:
        HubError: If the Hub refuses, or stays busy or out of reach.
    """
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    token = token or args.hub_token
    if trainer.hub_model_id is None:
        settings = {} if private is None else {"private": private}
        call_hub("Creating the repository", trainer.init_hf_repo, token=token, **settings)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    trainer.create_model_card(**kwargs)
    push = partial(
        upload,
        str(trainer.hub_model_id),
        str(args.output_dir),
        commit_message=commit_message,
        token=token,
        revision=revision or args.hub_revision,
        ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"],
        delete_patterns=stale_files(trainer.checkpoint_kind),
    )
    return push() if blocking else huggingface_hub.run_as_future(push)


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
        upload(
            str(trainer.hub_model_id),
            folder,
            path_in_repo="last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name,
            commit_message=f"{message}, checkpoint",
            delete_patterns=stale_files(trainer.checkpoint_kind),
            token=args.hub_token,
            revision=args.hub_revision,
        )


def upload(repo_id: str, folder: str | Path, **kwargs: Any) -> CommitInfo:
    """Upload a folder to the Hub in one commit, repeated while the Hub is busy.

    Args:
        repo_id: Id of the repository.
        folder: The folder.
        **kwargs: As in `huggingface_hub.upload_folder`.

    Returns:
        The commit.

    Raises:
        HubError: As in `call_hub`.
    """
    what = f"Pushing {str(folder)!r} to {repo_id!r}"
    return call_hub(what, huggingface_hub.upload_folder, repo_id=repo_id, folder_path=folder, **kwargs)
