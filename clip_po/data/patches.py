"""Images as patches of variable number (NaFlex, SigLIP 2), packed into one tensor so that they travel as pixels do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

COLUMNS = 3
"""Columns that `pack_patches` adds to each patch: whether it counts, and height and width of the image in patches."""


def pack_patches(inputs: Mapping[str, Any]) -> Tensor:
    """Pack what an image processor returns for a model with a variable number of patches.

    Args:
        inputs: `pixel_values` (Tensor[B, N, D]), `pixel_attention_mask` (Tensor[B, N]) and `spatial_shapes`
            (Tensor[B, 2], height and width in patches).

    Returns:
        Tensor[B, N, D + 3].
    """
    pixels = inputs["pixel_values"]
    mask = inputs["pixel_attention_mask"].unsqueeze(-1)
    shapes = inputs["spatial_shapes"].unsqueeze(1).expand(-1, pixels.shape[1], -1)
    return torch.cat([pixels, mask.to(pixels), shapes.to(pixels)], dim=-1)


def unpack_patches(packed: Tensor) -> dict[str, Tensor]:
    """Return what `pack_patches` has packed.

    Args:
        packed: Tensor[B, N, D + 3].

    Returns:
        The inputs of a vision tower: `pixel_values` (Tensor[B, N, D]), `pixel_attention_mask` (Tensor[B, N]) and
        `spatial_shapes` (Tensor[B, 2]), both of integers.
    """
    return {
        "pixel_values": packed[..., :-COLUMNS],
        "pixel_attention_mask": packed[..., -COLUMNS].int(),
        "spatial_shapes": packed[:, 0, 1 - COLUMNS :].long(),
    }
