"""Biased prompts: a calibrated projection of texts that makes pairs of prompts equal but for the attribute.

Source: Chuang et al. 2023, Debiasing Vision-Language Models via Biased Prompts, arXiv 2302.00070.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clip_po.baselines.linear_map import complement_projection, linear_map
from clip_po.concept.transform import ConceptTransform
from clip_po.validation import NOT_NEGATIVE, check_number


def project_out_biased_prompts(
    directions: Tensor, first: Tensor, second: Tensor, calibration: float = 1000.0
) -> ConceptTransform:
    """Project texts so that prompts that differ in the attribute alone come together. Images stay as they are.

    Args:
        directions: Tensor[M, D], the biased directions: embeddings of prompts that describe the attribute alone, such
            as "a photo of a man", or their differences. Their span is removed.
        first: Tensor[S, D], unit-norm, one prompt of each pair: "a photo of a male doctor".
        second: Tensor[S, D], unit-norm, the other: "a photo of a female doctor".
        calibration: Weight lambda of the pairs, >= 0. 0 is the orthogonal projection.

    Returns:
        The transformation, with the identity for the images and, for the texts,
        P0 (I + lambda / S sum (z_i - z_j)(z_i - z_j)^T)^-1, where P0 removes the directions.

    Raises:
        TypeError: If `calibration` is not a number.
        ValueError: If `calibration` is negative, there are no pairs or their shapes differ, or as for
            `project_out_directions`.

    Source: Chuang et al. 2023, arXiv 2302.00070, the closed form of the calibrated projection. 1000 is the weight in
    the authors' code for classification.
    """
    check_number("calibration", calibration, NOT_NEGATIVE)
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise ValueError(
            f"Expected first and second as matrices [S, D] of one shape with a row for each pair, got shapes "
            f"{list(first.shape)} and {list(second.shape)}."
        )
    projection = complement_projection(directions)
    apart = (first - second).detach().double().cpu()
    identity = torch.eye(len(projection), dtype=torch.float64)
    return linear_map(identity, projection @ torch.linalg.inv(identity + calibration / len(apart) * apart.T @ apart))
