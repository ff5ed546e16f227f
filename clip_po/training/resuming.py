"""Whether a checkpoint is one of this run: asked before training goes on from it, or silently from something else."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import logging

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.get_logger(__name__)

Shapes = Mapping[str, tuple[int, ...]]


def check_resumable(folder: str, model: nn.Module) -> None:
    """Refuse a checkpoint that no trainer wrote, or that holds the weights of another model.

    Trainer goes on with the weights that training started from where the file names others, and says nothing.

    Args:
        folder: The checkpoint.
        model: What trains: the model, the model with its adapters, or a transformation.

    Raises:
        ValueError: The message says what is wrong with which file, and what to do.
    """
    path = Path(folder)
    try:
        json.loads((path / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The checkpoint {folder!r} has no {TRAINER_STATE_NAME} that can be read ({error}): no trainer wrote it, "
            f"or it was damaged. {_instead(folder)}."
        ) from error
    _check_weights(path, model)


def check_states(folder: str) -> None:
    """Refuse a checkpoint without the states of optimizer, scheduler or random numbers, or with damaged ones.

    Trainer goes on without them, and says nothing.

    Args:
        folder: The checkpoint.

    Raises:
        ValueError: The message says which file, and what to do.
    """
    path = Path(folder)
    random = sorted(file.name for file in path.glob("rng_state*.pth")) or ["rng_state.pth"]
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME, *random):
        if not (path / name).is_file():
            raise ValueError(
                f"The checkpoint {folder!r} has no {name}, so training would go on otherwise than it would have: it "
                f"was saved with save_only_model=True, or the file is lost. {_instead(folder)}."
            )
        if not zipfile.is_zipfile(path / name):
            raise ValueError(
                f"{str(path / name)!r} is damaged: it is no file that torch.save wrote. {_instead(folder)}."
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
        name, kind = "model.safetensors", "a model"
        files, weights = sorted(path.glob("model*.safetensors")), model.state_dict()
    if not files:
        there = sorted(file.name for file in path.glob("*") if file.suffix in (".safetensors", ".bin", ".pth", ".pt"))
        raise ValueError(
            f"The checkpoint {str(path)!r} has no {name}, but {kind} in safetensors is what trains here; it holds "
            f"{there}. Resume with the arguments of the run that wrote it; weights in other formats, which may carry "
            "code, are not read."
        )
    wanted: Shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                found |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{str(file)!r} is damaged ({error}). Resume from an earlier checkpoint, or start anew."
            ) from error
    if found != wanted:
        raise ValueError(
            f"The checkpoint {str(path)!r} is of another model: {differences(found, wanted)}. Resume with the model, "
            "adapters and trained parts of the run that wrote it, or start anew in another output_dir."
        )


def differences(found: Shapes, wanted: Shapes, most: int = 3) -> str:
    """How the weights of a file differ from those of a model, in words.

    Args:
        found: Shapes by name in the file.
        wanted: Shapes by name in the model.
        most: How many are named.
    """
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    said = [f"{name} is {_shape(found.get(name))} in the file and {_shape(wanted.get(name))} here" for name in names]
    return "; ".join(said[:most]) + (f"; and {len(said) - most} more" if len(said) > most else "")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


class ResumesExactly(_Base):
    """What a trainer does so that it never goes on with the optimizer of other parameters or of another kind."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # which write files of their own
            check_resumable(str(resume_from_checkpoint), model or self.model)
            if self.args.save_only_model:
                logger.warning("save_only_model=True: the optimizer, its schedule and the random numbers start anew.")
            else:
                check_states(str(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        remedy = (
            "Resume with the optimizer (optim) and the trained parts (train_text_model, train_logit_scale, "
            "peft_config) of the run that wrote it, or start anew."
        )
        before = set() if self.optimizer is None else set(self.optimizer.param_groups[0])
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"The optimizer's state in {checkpoint!r} does not fit this run ({error}). {remedy}"
            ) from error
        if checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        optim = getattr(self.args.optim, "value", self.args.optim)
        other = sorted(before ^ set(self.optimizer.param_groups[0]))
        if other:
            raise ValueError(
                f"The optimizer's state in {checkpoint!r} is of another optimizer than optim={optim!r}: "
                f"only one of them knows {', '.join(other)}. {remedy}"
            )


def first_line(error: Any) -> str:
    """What an error says, its first two lines: those of torch list every weight of a model."""
    return " ".join(str(error).split("\n")[:2]).strip()
