"""What the flags of the commands share: parsing, and values that mean the same in each of them."""

from __future__ import annotations

from typing import Any


def resumed_checkpoint(given: Any) -> str | bool | None:
    """Return --resume_from_checkpoint as the trainer takes it.

    Args:
        given: The value of the flag or of the recipe.

    Returns:
        The folder of a checkpoint, True for the last one in the output folder, or None for a new run.
    """
    return {"true": True, "false": None, "none": None}.get(str(given).lower(), given)
