"""Safe loading: weights come from safetensors alone, and a state that could run code is not read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import has_file

_WEIGHTS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("pytorch_model.bin", "pytorch_model.bin.index.json"): ("model.safetensors", "model.safetensors.index.json"),
    ("adapter_model.bin", "adapter_model.bin"): ("adapter_model.safetensors", "adapter_model.safetensors"),
}
"""Names of pickled weights (one file, or the index of several) and of the same weights in safetensors."""


def refuse_pickles(name: str | os.PathLike[str], **where: Any) -> None:
    """Raise if a model, adapters or a checkpoint has its weights as a pickle only.

    Args:
        name: Folder or Hub id.
        **where: `revision` and `token`, for the Hub.

    Raises:
        OSError: If there are pickled weights and none in safetensors. The message says which file, and how to convert
            it.
    """
    for pickled, safe in _WEIGHTS.items():
        found = next((file for file in pickled if has_file(name, file, **where)), None)
        if found is not None and not any(has_file(name, file, **where) for file in safe):
            load = {
                "pytorch_model.bin": f"AutoModel.from_pretrained({str(name)!r})",
                "adapter_model.bin": f"PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), {str(name)!r})",
            }[pickled[0]]
            raise OSError(
                f"{str(name)!r} has its weights as a pickle alone ({found}), without {safe[0]}. A pickle can run any "
                "program when it is read, so weights are read from safetensors only. If you trust its author, convert "
                f"it once: {load}.save_pretrained(FOLDER)"
            )


def read_state(file: str | os.PathLike[str]) -> Any:
    """Read what `torch.save` wrote without running code from it and without reading its tensors.

    Args:
        file: State of an optimizer, a scheduler, a gradient scaler or a random number generator.

    Returns:
        The state. Its tensors are on the meta device: they have shapes but no values.

    Raises:
        ValueError: If the file holds anything that could run a program.
    """
    try:
        with safe_globals():
            return torch.load(file, map_location="meta", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        path = Path(file)
        raise ValueError(
            f"{path.name} of the checkpoint {str(path.parent)!r} holds more than tensors and numbers. Trainer writes "
            "nothing else, and the rest could run any program, so it was not read. Resume from another checkpoint, or "
            f"start a new run from these weights: model={str(path.parent)!r}."
        ) from error
