"""Stale files: weights of another kind of model, which libraries would load instead of the model just saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from clip_po.hub.card import CheckpointKind

FILES: Mapping[CheckpointKind, tuple[str, ...]] = {
    "model": (
        "config.json",
        "model.safetensors",
        "model-*-of-*.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model-*-of-*.bin",
        "pytorch_model.bin.index.json",
    ),
    "adapter": ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    "concept": ("config.json", "concept.safetensors"),
}
"""Patterns of the files of each kind."""


def stale_files(kind: CheckpointKind) -> list[str]:
    """Return patterns of the files that do not belong beside a saved model.

    Args:
        kind: What was saved.

    Returns:
        The patterns of all other kinds.
    """
    return sorted({pattern for patterns in FILES.values() for pattern in patterns} - set(FILES[kind]))


def remove_stale_files(folder: str | os.PathLike[str], kind: CheckpointKind) -> None:
    """Remove what an earlier run saved in a folder, if it is of another kind than what was saved there now.

    `from_pretrained` puts the adapters in a folder on a full model beside them. Subfolders are not searched.

    Args:
        folder: The folder.
        kind: What was saved last.
    """
    for pattern in stale_files(kind):
        for file in Path(folder).glob(pattern):
            file.unlink()


def check_not_base(base: str, output_dir: str, hub_model_id: str | None) -> None:
    """Raise if adapters or a transformation would be saved in place of the base model that they need.

    Args:
        base: Folder or Hub id of the base model; may be empty.
        output_dir: Where it would be saved.
        hub_model_id: Where it would be pushed to; None for nowhere.

    Raises:
        ValueError: If one is the other.
    """
    is_folder = os.path.isdir(base) and os.path.isdir(output_dir) and os.path.samefile(base, output_dir)
    for name, value, is_base in (
        ("output_dir", output_dir, is_folder),
        ("hub_model_id", hub_model_id, bool(base) and base == hub_model_id),
    ):
        if is_base:
            raise ValueError(
                f"{name}={value!r} holds the base model. What is trained here is saved without it, in its place, and "
                f"could not be loaded any more. Set another {name}."
            )
