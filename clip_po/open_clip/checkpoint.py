"""Checkpoints of open_clip: a file of weights, with or without the configuration beside it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clip_po.bounded_text import parse_json
from clip_po.open_clip.architecture import architecture
from clip_po.open_clip.weights import plain_names

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""Names under which open_clip looks for weights in a folder, the first of them those that it writes."""


def weights_file(checkpoint: str) -> Path:
    """Return the file of the weights of a checkpoint.

    Args:
        checkpoint: The file itself, or a folder with one of `WEIGHTS_FILES`.

    Returns:
        The file.

    Raises:
        ValueError: If there is none.
    """
    path = Path(checkpoint)
    found = next((path / name for name in WEIGHTS_FILES if (path / name).is_file()), path)
    if not found.is_file():
        raise ValueError(
            f"{checkpoint!r} is no open_clip checkpoint: neither a file of weights nor a folder with "
            f"{' or '.join(WEIGHTS_FILES)}. Download the checkpoint and give its file."
        )
    return found


def read_config(file: Path, arch: str | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Read open_clip's configuration of a checkpoint.

    Args:
        file: The file of the weights.
        arch: Name of an architecture, or a JSON file of open_clip; None for the `open_clip_config.json` beside `file`.

    Returns:
        open_clip's `model_cfg` and `preprocess_cfg`. The second is empty if no file names it.

    Raises:
        ValueError: If there is no configuration, or it is not readable.
    """
    if arch is not None and not Path(arch).is_file() and not arch.endswith(".json"):
        return architecture(arch), {}
    path = file.parent / CONFIG_FILE if arch is None else Path(arch)
    if not path.is_file():
        raise ValueError(
            f"There is no {str(path)!r}. Give the architecture: its name in open_clip, such as --arch ViT-B-32, or "
            "the JSON file of its configuration."
        )
    try:
        written = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not readable as JSON ({error}). Copy or download it again.") from error
    model = written.get("model_cfg", written) if isinstance(written, dict) else None
    preprocess = written.get("preprocess_cfg") or {} if isinstance(written, dict) else {}
    if not isinstance(model, dict) or not isinstance(preprocess, dict):
        raise ValueError(f"{str(path)!r} is no configuration of open_clip: it has no model_cfg. Give another file.")
    return model, preprocess


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, without running code from it.

    Args:
        file: A `.safetensors` file, or what `torch.save` wrote: weights, or a checkpoint of open_clip's training.

    Returns:
        The weights on the CPU, under the names of open_clip's class CLIP.

    Raises:
        ValueError: If the file is not readable, or holds anything but weights.
    """
    try:
        safe = file.suffix == ".safetensors"
        found: Any = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(
            f"{str(file)!r} is not readable as weights alone ({reason}). A program in it (as in OpenAI's TorchScript "
            "files) is not run. Give a .safetensors file, or a state dict that torch.save wrote."
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise ValueError(f"{str(file)!r} holds a {type(found).__name__}, no weights by name. Give a state dict.")
    return plain_names({name: weight for name, weight in found.items() if isinstance(weight, Tensor)})
