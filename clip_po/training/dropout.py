"""Dropout of every kind, turned off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)


def disable_dropout(*models: nn.Module) -> None:
    """Set every dropout probability in models to 0, and log how many there were.

    CLIP's attention and the adapters of PEFT keep probabilities as plain attributes, besides those of `nn.Dropout`.
    The configuration of a model, which is saved, stays as it is.

    Args:
        *models: Models with their adapters. Changed in place.
    """
    found = [(place, name) for model in models for module in model.modules() for place, name in _probabilities(module)]
    for place, name in found:
        place[name] = 0.0
    if found:
        logger.warning(
            f"disable_dropout=True: {len(found)} dropout probabilities in models and adapters are set to 0. To "
            "train with dropout, set disable_dropout=False."
        )


def _probabilities(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where a module itself keeps dropout probabilities above 0: a dictionary and a key in it."""
    is_dropout = "dropout" in type(module).__name__.lower()
    for name, value in vars(module).items():
        if "dropout" not in name and not (is_dropout and name == "p"):
            continue
        # PEFT keeps one probability for each adapter.
        place, names = (value, list(value)) if isinstance(value, dict) else (vars(module), [name])
        yield from ((place, key) for key in names if _is_probability(place[key]))


def _is_probability(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
