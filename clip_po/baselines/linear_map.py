"""A transformation of the embeddings with given matrices, which closed forms return."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_po.concept.transform import ConceptTransform


def linear_map(image_weight: Tensor, text_weight: Tensor | None = None) -> ConceptTransform:
    """Return the transformation of embeddings with given matrices.

    Args:
        image_weight: Tensor[K, D], W of the images, K <= D.
        text_weight: Tensor[K, D], W of the texts; None for that of the images.

    Returns:
        The transformation in float32, without gradients. `fold_into` makes a plain CLIPModel of it.
    """
    output_dim, dim = image_weight.shape
    transform = ConceptTransform(dim, output_dim, "shared" if text_weight is None else "each")
    with torch.no_grad():
        transform.image_weight.copy_(image_weight)
        if transform.text_weight is not None and text_weight is not None:
            transform.text_weight.copy_(text_weight)
    return transform.requires_grad_(False)


def complement_projection(directions: Tensor) -> Tensor:
    """Return the orthogonal projection that removes the span of some directions.

    Args:
        directions: Tensor[M, D] of finite numbers, of any length; they may depend on each other.

    Returns:
        Tensor[D, D] in float64: I minus the projection onto the span.

    Raises:
        ValueError: If `directions` is not a matrix of finite numbers, or they are all zero or span all D dimensions.
    """
    if directions.ndim != 2 or not directions.isfinite().all():
        raise ValueError(
            f"Expected directions as a matrix [M, D] of finite numbers, got shape {list(directions.shape)}."
        )
    wide = directions.detach().double().cpu()
    _, sizes, basis = torch.linalg.svd(wide, full_matrices=False)
    # Embeddings are float32: a smaller direction is a rounding error.
    rank = int((sizes > sizes[0] * max(wide.shape) * torch.finfo(torch.float32).eps).sum())
    if not 0 < rank < wide.shape[1]:
        raise ValueError(
            f"The directions span {rank} of {wide.shape[1]} dimensions, so that there is nothing to remove or nothing "
            "left. Give at least one direction that is not zero, and fewer than dimensions."
        )
    return torch.eye(wide.shape[1], dtype=torch.float64) - basis[:rank].T @ basis[:rank]
