"""Checks before a resume: is the checkpoint whole, safe to read, and a checkpoint of this very run?"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import logging

from clip_po.bounded_text import parse_json
from clip_po.hub.safe_loading import read_state, refuse_pickles

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)

Shapes = Mapping[str, tuple[int, ...]]


def check_resume(trainer: Trainer, folder: str) -> None:
    """Raise if a trainer cannot resume exactly from a checkpoint.

    Trainer itself goes on without a missing state, with the initial weights if the names in the file differ, and with
    pickled weights, and says nothing.

    Args:
        trainer: The trainer. FSDP and DeepSpeed write files of their own, of which only pickles are checked.
        folder: The checkpoint.

    Raises:
        OSError: If the weights of the checkpoint, or of the best checkpoint that it names, are pickled.
        ValueError: If a file is missing, damaged, or belongs to another run. The message says which, and what to do.
    """
    refuse_pickles(folder)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    best = _trainer_state(folder).get("best_model_checkpoint")
    if best is not None and Path(best).is_dir():
        refuse_pickles(best)
    _check_weights(Path(folder), trainer.model)
    if trainer.args.save_only_model:
        logger.warning("save_only_model=True: the optimizer, its schedule and the random numbers start again.")
        return
    _check_states(folder)
    _check_optimizer(trainer, folder)


def _trainer_state(folder: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = parse_json(Path(folder, TRAINER_STATE_NAME).read_text())
        return state
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The checkpoint {folder!r} has no readable {TRAINER_STATE_NAME} ({error}): it was not written by a "
            f"trainer, or it is damaged. {_instead(folder)}."
        ) from error


def _check_states(folder: str) -> None:
    path = Path(folder)
    random = sorted(file.name for file in path.glob("rng_state*.pth")) or ["rng_state.pth"]
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME, *random):
        if not (path / name).is_file():
            raise ValueError(
                f"The checkpoint {folder!r} has no {name}, so training could not go on as before: the checkpoint was "
                f"saved with save_only_model=True, or the file was lost. {_instead(folder)}."
            )
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME, *random):
        if not (path / name).is_file():
            continue
        if not zipfile.is_zipfile(path / name):
            raise ValueError(f"{str(path / name)!r} is damaged: torch.save did not write it. {_instead(folder)}.")
        read_state(path / name)


def _check_optimizer(trainer: Trainer, folder: str) -> None:
    """Raise if the optimizer's state is for other parameters or for another kind of optimizer."""
    remedy = (
        "Resume with the optimizer (optim) and the trained parts (train_vision_model, train_text_model, "
        "train_logit_scale, trainable_layers, layer_decay, peft_config) of the run that wrote it, or start a new run."
    )
    trainer.create_optimizer()
    groups = trainer.optimizer.param_groups
    stored = read_state(Path(folder, OPTIMIZER_NAME))["param_groups"]
    sizes, stored_sizes = ([len(group["params"]) for group in found] for found in (groups, stored))
    if sizes != stored_sizes:
        raise ValueError(
            f"The optimizer's state in {folder!r} does not fit this run: its groups have {stored_sizes} parameters, "
            f"those of this run {sizes}. {remedy}"
        )
    optim = getattr(trainer.args.optim, "value", trainer.args.optim)
    other = sorted((set(groups[0]) ^ set(stored[0])) - {"initial_lr"})  # which the scheduler adds
    if other:
        raise ValueError(
            f"The optimizer's state in {folder!r} belongs to another optimizer than optim={optim!r}: only one of them "
            f"has {', '.join(other)}. {remedy}"
        )


def _instead(folder: str) -> str:
    return f"Resume from another checkpoint, or start a new run from these weights: model={folder!r}"


def _check_weights(path: Path, model: nn.Module) -> None:
    if isinstance(model, PeftModel):
        name, kind = SAFETENSORS_WEIGHTS_NAME, "adapters"
        own = path / str(model.active_adapter) / name
        files = [own] if own.is_file() else [*path.glob(name)]
        weights = get_peft_model_state_dict(model, adapter_name=str(model.active_adapter))
    else:
        name, kind = "model.safetensors", "a full model"
        files, weights = sorted(path.glob("model*.safetensors")), model.state_dict()
    if not files:
        there = sorted(file.name for file in path.glob("*") if file.suffix in (".safetensors", ".bin", ".pth", ".pt"))
        raise ValueError(
            f"The checkpoint {str(path)!r} has no {name}, but this run trains {kind}. The checkpoint holds {there}. "
            "Resume with the arguments of the run that wrote it. Weights in other formats, which may carry code, are "
            "not read."
        )
    wanted: Shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                found |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{str(file)!r} is damaged ({error}). Resume from an earlier checkpoint, or start a new run."
            ) from error
    if found != wanted:
        raise ValueError(
            f"The checkpoint {str(path)!r} is of another model: {differences(found, wanted)}. Resume with the model, "
            "adapters and trained parts of the run that wrote it, or start a new run in another output_dir."
        )


def differences(found: Shapes, wanted: Shapes, most: int = 3) -> str:
    """Describe how the weights in a file differ from the weights of a model.

    Args:
        found: Shapes by name in the file.
        wanted: Shapes by name in the model.
        most: Number of differences that are named.

    Returns:
        A sentence without a period: the differences by name with both shapes, joined by "; ", and how many more there
        are. Empty if there are none.
    """
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    said = [f"{name} is {_shape(found.get(name))} in the file and {_shape(wanted.get(name))} here" for name in names]
    return "; ".join(said[:most]) + (f"; and {len(said) - most} more" if len(said) > most else "")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
