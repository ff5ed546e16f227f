"""Find the family of a two-tower model: its embeddings, logits and towers behind one interface."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from clip_po.families import FAMILIES, DualEncoder
from clip_po.other_kinds import model_remedy

ANSWERS = ("forward", "get_image_features", "get_text_features", "__call__")
"""Methods of a model that define its answers. Embeddings are computed by these methods or by the towers in them."""

_BY_CLASS = {family.class_name: family for family in FAMILIES.values()}


def dual_encoder(model: nn.Module, name: str = "model") -> PreTrainedModel:
    """Return the two-tower model of transformers inside a plain model or a PeftModel. Its LoRA layers stay active.

    Args:
        model: The model.
        name: Name of the argument, for messages.

    Returns:
        The model itself, or the base model of a `PeftModel`: no copy.

    Raises:
        TypeError: If the model is of no class in `FAMILIES`, or of a subclass that overrides a method in `ANSWERS`.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    supported = _supported_class(inner)
    if supported is None:
        raise TypeError(
            f"{name} must be a transformers.CLIPModel or another two-tower model of transformers (or a "
            f"PeftModel around one), got {type(inner).__name__}. {model_remedy(inner)}"
        )
    own = [method for method in ANSWERS if getattr(type(inner), method) is not getattr(supported, method)]
    if own:
        kind, base = type(inner).__name__, supported.__name__
        raise TypeError(
            f"{name} is a {kind}, whose own {', '.join(f'{kind}.{method}' for method in own)} would be ignored: "
            f"embeddings are computed as {base} computes them. Load the weights with {base}.from_pretrained, or "
            "put the change into a module of the model, such as model.vision_model."
        )
    return inner


def as_dual_encoder(model: nn.Module, name: str = "model") -> DualEncoder:
    """Return the interface to a two-tower model.

    Args:
        model: The model, or a PeftModel around it.
        name: Name of the argument, for messages.

    Returns:
        The interface. It holds the model, not a copy.

    Raises:
        TypeError: As for `dual_encoder`.
    """
    inner = dual_encoder(model, name)
    supported = _supported_class(inner)
    assert supported is not None  # dual_encoder has checked it
    return _BY_CLASS[supported.__name__](inner)


def _supported_class(model: Any) -> type | None:
    """Return the class in `FAMILIES` that a model belongs to; None if it belongs to none."""
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.models.") and kind.__name__ in _BY_CLASS:
            return kind
    return None
