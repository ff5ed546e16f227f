"""Pickles, which may run any program when they are read: weights never come from one, and no state runs anything."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import has_file

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

_WEIGHTS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("pytorch_model.bin", "pytorch_model.bin.index.json"): ("model.safetensors", "model.safetensors.index.json"),
    ("adapter_model.bin", "adapter_model.bin"): ("adapter_model.safetensors", "adapter_model.safetensors"),
}
"""Names of pickled weights, whole and in parts, and of the same in safetensors."""


def refuse_pickles(name: str | os.PathLike[str], **where: Any) -> None:
    """Refuse a model, adapters or a checkpoint whose weights are there as a pickle alone.

    Args:
        name: Folder or Hub id.
        **where: `revision` and `token`, for the Hub.

    Raises:
        OSError: The message says which file, and how to convert it.
    """
    for pickled, safe in _WEIGHTS.items():
        found = next((file for file in pickled if has_file(name, file, **where)), None)
        if found is not None and not any(has_file(name, file, **where) for file in safe):
            load = {
                "pytorch_model.bin": f"CLIPModel.from_pretrained({str(name)!r})",
                "adapter_model.bin": f"PeftModel.from_pretrained(CLIPModel.from_pretrained(BASE), {str(name)!r})",
            }[pickled[0]]
            raise OSError(
                f"{str(name)!r} holds its weights as a pickle alone ({found}), with no {safe[0]} beside it. A pickle "
                "may run any program when it is read, so weights are read from safetensors only. If you trust who "
                f"made it, convert it once: {load}.save_pretrained(FOLDER)"
            )


class SafeLoading(_Base):
    """What a trainer reads from a checkpoint: weights from safetensors, and states that can't run anything.

    Trainer also takes weights from a pickle, and where a state holds more than tensors and numbers, its error advises
    to switch the protection off. Its methods that read are replaced here for these reasons.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        refuse_pickles(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        refuse_pickles(str(self.state.best_model_checkpoint))
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _explained(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _explained(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _explained(checkpoint):
            super()._load_rng_state(checkpoint)


@contextlib.contextmanager
def _explained(checkpoint: str | None) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        files = sorted(file for file in Path(str(checkpoint)).glob("*.pt*") if not _harmless(file))
        raise ValueError(
            f"{' and '.join(file.name for file in files)} of the checkpoint {checkpoint!r} holds more than the "
            "tensors and numbers of an optimizer, a scheduler or a random number generator. Trainer writes nothing "
            "else, and the rest might run any program when it is read, so it was not. Resume from another checkpoint, "
            "or start anew from these weights: give the folder as the model."
        ) from error


def _harmless(file: Path) -> bool:
    try:
        with safe_globals():
            torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True
