"""MirrorCLIP: compare the embeddings of an image and its mirror image, and keep what both agree on. No training.

Objects look alike in a mirror, words don't. Where the two embeddings have different signs, the number is taken to
speak of written words.

Source: Wang et al. 2024, CLIP in Mirror: Disentangling text from visual images through reflection, NeurIPS 2024: the
disentangling mask and the filter of visual features.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import CLIPModel

from clip_po.baselines.clip_layers import clip_model
from clip_po.encoding import unit_norm


def visual_features(image_embeds: Tensor, mirrored_embeds: Tensor) -> Tensor:
    """Filter what images show from the embeddings of images and their mirror images.

    The filter adds both embeddings where their signs agree. Elsewhere only the embedding of the mirror image, in
    which words are hard to read, is left.

    Args:
        image_embeds: Tensor[B, D], unit-norm.
        mirrored_embeds: Tensor[B, D], unit-norm embeddings of the mirror images.

    Returns:
        Tensor[B, D], unit-norm.

    Source: Wang et al. 2024 (MirrorCLIP), the visual features as in the code of the authors, which they use to defend
    against typographic attacks. They also tried to set the other numbers to 0 (the "hard" filter).
    """
    agree = image_embeds * mirrored_embeds > 0
    return unit_norm(mirrored_embeds + image_embeds * agree)


def mask_by_mirror(model: CLIPModel | PeftModel) -> CLIPModel | PeftModel:
    """Return a copy of a model whose image embeddings are the visual features of the images.

    Each image passes the vision tower twice, as it is and mirrored. Weights cannot express this, so the copy uses
    hooks, and `save_pretrained` writes the original model. Texts are encoded as before. Outputs of the vision tower
    other than the embeddings have two rows per image.

    Args:
        model: The model. It is not changed.

    Returns:
        The copy.

    Raises:
        TypeError: As in `clip_po.baselines.clip_layers.clip_model`.

    Source: Wang et al. 2024 (MirrorCLIP).
    """
    masked = copy.deepcopy(model)
    encoder = clip_model(masked, "MirrorCLIP")
    encoder.vision_model.register_forward_pre_hook(_add_mirror_images, with_kwargs=True)
    encoder.visual_projection.register_forward_hook(_keep_visual_features)
    return masked


def _add_mirror_images(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Append the mirror images to the pixel values, wherever they are among the arguments."""
    pixels, *rest = args or (kwargs["pixel_values"],)
    both = torch.cat([pixels, pixels.flip(-1)])
    return ((both, *rest), kwargs) if args else (args, {**kwargs, "pixel_values": both})


def _keep_visual_features(module: nn.Module, args: tuple[Any, ...], features: Tensor) -> Tensor:
    return visual_features(*unit_norm(features).chunk(2)).to(features.dtype)
