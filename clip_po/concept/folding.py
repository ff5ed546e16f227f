"""Multiplying a linear transformation of embeddings into the projections of a model."""

from __future__ import annotations

from torch import Tensor, nn

from clip_po.dual_encoder import dual_encoder

WITHOUT_FLOAT64 = ("mps",)
"""Types of devices that can't compute in float64."""

PROJECTIONS = ("visual_projection", "text_projection")
"""Linear layers whose output is the embedding, where a model has them."""


def check_foldable(model: nn.Module, projections: tuple[str, ...] = PROJECTIONS) -> None:
    """Raise if a transformation can't be multiplied into the weights of a model.

    Args:
        model: Two-tower model or PeftModel.
        projections: Names of the layers that the transformation changes.

    Raises:
        ValueError: If a tower of the model does not end with such a layer.
        TypeError: As for `clip_po.dual_encoder.dual_encoder`.
    """
    encoder = dual_encoder(model)
    missing = [name for name in projections if not hasattr(encoder, name)]
    if missing:
        raise ValueError(
            f"{type(encoder).__name__} has no {' and no '.join(missing)}, the linear layer at the end of a tower "
            "that W is multiplied into. Transform the embeddings themselves, image_embeds, text_embeds = "
            "concept(image_embeds, text_embeds), or use a model with projections, such as CLIP or MetaCLIP 2."
        )


def multiply_projection(matrix: Tensor, projection: nn.Linear) -> nn.Linear:
    """Return a projection followed by a linear transformation, as one layer.

    Args:
        matrix: Tensor[K, D].
        projection: The layer, with D outputs and without a bias. Not changed.

    Returns:
        A new layer with K outputs. The product is computed in float64 and stored in the dtype of the layer.

    Raises:
        ValueError: If the product is out of range of that dtype.
    """
    before = projection.weight
    product = (to_float64(matrix.to(before.device)) @ to_float64(before)).to(before.dtype).to(before.device)
    if not product.isfinite().all():
        raise ValueError(
            f"A folded projection has values out of range of {before.dtype}: W is too large at this t. Use a t "
            "closer to 0, or fold into the model in float32 (model.float())."
        )
    folded = nn.Linear(product.shape[1], product.shape[0], bias=False, device=before.device, dtype=before.dtype)
    folded.weight = nn.Parameter(product, requires_grad=before.requires_grad)
    return folded


def to_float64(matrix: Tensor) -> Tensor:
    """Return a matrix in float64, on the CPU if its own device has no float64.

    Args:
        matrix: Tensor of any shape and floating-point dtype.

    Returns:
        The same values in float64.
    """
    return (matrix.cpu() if matrix.device.type in WITHOUT_FLOAT64 else matrix).double()
