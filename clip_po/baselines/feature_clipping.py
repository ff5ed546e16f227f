"""Feature clipping: drop the numbers of the embeddings that say most about an attribute.

Source: Wang, Liu and Wang 2021, Are Gender-Neutral Queries Really Gender-Neutral? Mitigating Gender Bias in Image
Search, arXiv 2109.05433 (CLIP-clip).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_po.baselines.linear_map import linear_map
from clip_po.concept.transform import ConceptTransform

_BINS = 20


def mutual_information(image_embeds: Tensor, groups: Sequence[Any] | np.ndarray, bins: int = _BINS) -> np.ndarray:
    """Estimate the mutual information of each number of the embeddings with the group.

    Args:
        image_embeds: Tensor[N, D].
        groups: N groups, names or numbers.
        bins: Number of bins of equally many images into which each number is divided, >= 2.

    Returns:
        Array [D], in nats, >= 0: the plug-in estimate from the counts of bins and groups. It is a little above 0
        for independent numbers too.

    Raises:
        ValueError: If there is not one group for each image, or `bins` is out of range.
    """
    names, number = np.unique(np.asarray(groups), return_inverse=True)
    if len(number) != len(image_embeds) or not 2 <= bins <= len(number):
        raise ValueError(
            f"Expected a group for each of the {len(image_embeds)} images and 2 <= bins <= images, got {len(number)} "
            f"groups and bins={bins!r}."
        )
    values = image_embeds.detach().float().cpu().numpy()
    ranks = values.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    cells = ranks * bins // len(values) * len(names) + number[:, None]
    counts = np.stack([np.bincount(column, minlength=bins * len(names)) for column in cells.T])
    joint = counts.reshape(-1, bins, len(names)) / len(values)
    alone = joint.sum(axis=2, keepdims=True) * joint.sum(axis=1, keepdims=True)
    return (joint * np.log(np.where(joint > 0, joint, alone) / alone)).sum(axis=(1, 2))


def drop_informative_features(
    image_embeds: Tensor, groups: Sequence[Any] | np.ndarray, dropped: int
) -> ConceptTransform:
    """Drop the numbers of the embeddings with the highest mutual information with the group, from both towers.

    Args:
        image_embeds: Tensor[N, D], unit-norm.
        groups: N groups, names or numbers.
        dropped: Number m of features to drop, 0..D - 1.

    Returns:
        The transformation, with one W of D - m rows of the identity for both towers.

    Raises:
        ValueError: If `dropped` is out of range, or as for `mutual_information`.

    Source: Wang et al. 2021, arXiv 2109.05433. The estimate of the mutual information is that of
    `mutual_information`.
    """
    size = image_embeds.shape[1]
    if not 0 <= dropped < size:
        raise ValueError(f"dropped must be between 0 and D - 1 = {size - 1}, got {dropped!r}.")
    ascending = np.argsort(mutual_information(image_embeds, groups), kind="stable")
    return linear_map(torch.eye(size)[np.sort(ascending[: size - dropped])])
