"""Subspace projection: remove the directions of the embeddings that vary together with an attribute of the images.

Source: Shao, Ziser and Cohen 2022, Gold Doesn't Always Glitter: Spectral Removal of Linear and Nonlinear Guarded
Attribute Information, arXiv 2203.07893 (SAL, the linear method).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_po.baselines.linear_map import complement_projection, linear_map
from clip_po.concept.transform import ConceptTransform


def project_out_attribute(
    image_embeds: Tensor, groups: Sequence[Any] | np.ndarray, dimensions: int | None = None
) -> ConceptTransform:
    """Remove the directions with the largest covariance with the groups of images, from images and texts.

    G groups have G - 1 such directions. Without all of them, every group has the same mean, so that no linear
    function of the embeddings correlates with the group. Two groups have one: the difference of their means.

    Args:
        image_embeds: Tensor[N, D], unit-norm.
        groups: N groups, names or numbers, G >= 2 different ones.
        dimensions: Number of directions, 1..G - 1; None for all.

    Returns:
        The transformation, with one W for both towers: I - U U^T, where U holds the first left singular vectors of
        the covariance of embeddings and groups.

    Raises:
        ValueError: If there are fewer than two groups, not one for each image, or `dimensions` is out of range; or
            as for `project_out_directions`.

    Source: Shao et al. 2022, arXiv 2203.07893.
    """
    names, number = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2 or len(number) != len(image_embeds):
        raise ValueError(
            f"Expected a group for each of the {len(image_embeds)} images and at least two groups, got {len(number)} "
            f"of {names.tolist()}."
        )
    most = len(names) - 1
    if dimensions is not None and not 1 <= dimensions <= most:
        raise ValueError(f"dimensions must be between 1 and the number of groups - 1 = {most}, got {dimensions!r}.")
    wide = image_embeds.detach().double().cpu()
    member = torch.nn.functional.one_hot(torch.from_numpy(number)).double()
    covariance = (wide - wide.mean(dim=0)).T @ (member - member.mean(dim=0)) / len(wide)
    left, sizes, _ = torch.linalg.svd(covariance, full_matrices=False)
    kept = slice(most if dimensions is None else dimensions)
    return linear_map(complement_projection((left * sizes).T[kept]))
