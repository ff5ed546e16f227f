"""Methods that change the layers of CLIP itself, and so take no other model."""

from __future__ import annotations

from torch import nn
from transformers import CLIPModel

from clip_po.dual_encoder import dual_encoder


def clip_model(model: nn.Module, method: str) -> CLIPModel:
    """Return the CLIPModel inside a model, for a method that changes its layers.

    Args:
        model: The model, or a PeftModel around it.
        method: Name of the method, for the message.

    Returns:
        The model itself, or the base model of a `PeftModel`: no copy.

    Raises:
        TypeError: If the model is another two-tower model, or as for `dual_encoder`.
    """
    encoder = dual_encoder(model)
    if not isinstance(encoder, CLIPModel):
        raise TypeError(
            f"{method} changes the layers of a CLIPModel, got {type(encoder).__name__}. Use a CLIP checkpoint "
            "(model_type 'clip'), or align this model by training: clip-po train."
        )
    return encoder
