"""Embeddings of the images of an evaluation by several models, in one pass over the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_po.dual_encoder import as_dual_encoder, dual_encoder
from clip_po.encoding import encode_images


def embed_batch(models: Mapping[str, Any], pixel_values: Tensor) -> Tensor:
    """Embed images with several models. The caller sets the mode of the models.

    Args:
        models: Two-tower models, or PeftModels around one, by name, each on any device.
        pixel_values: Tensor[B, 3, H, W].

    Returns:
        Tensor[B, D1 + D2 + ...] on the CPU, float32: the unit-norm embeddings side by side.
    """
    found = []
    for model in models.values():
        clip = dual_encoder(model)
        found.append(encode_images(clip, pixel_values.to(clip.device, clip.dtype)).float())
    return torch.cat([embeds.cpu() for embeds in found], dim=1)


def embedding_sizes(models: Mapping[str, Any]) -> list[int]:
    """Return the size of the embeddings of each model.

    Args:
        models: As for `embed_batch`.

    Returns:
        D1, D2, ...
    """
    return [as_dual_encoder(model).dim for model in models.values()]


def split_by_model(models: Mapping[str, Any], table: np.ndarray) -> dict[str, Tensor]:
    """Divide what `embed_batch` returned for all images.

    Args:
        models: As for `embed_batch`.
        table: Array [N, D1 + D2 + ...].

    Returns:
        Tensor[N, D] by model, on the device of the model.
    """
    parts = torch.from_numpy(table).split(embedding_sizes(models), dim=1)
    return {
        name: part.to(dual_encoder(model).device) for (name, model), part in zip(models.items(), parts, strict=True)
    }


def pair_logits(model: Any, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Compute the logit of each image and the text at its position, such as logit_scale * cos.

    Args:
        model: Two-tower model, or PeftModel around one.
        image_embeds: Tensor[P, D], unit-norm.
        text_embeds: Tensor[P, D], unit-norm.

    Returns:
        Tensor[P], float32.
    """
    return as_dual_encoder(model).pair_logits(image_embeds, text_embeds).detach()
