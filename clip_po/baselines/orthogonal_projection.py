"""Orthogonal projection: remove the directions of a concept, such as man minus woman, from images and texts.

Source: Bolukbasi et al. 2016, Man is to Computer Programmer as Woman is to Homemaker?, arXiv 1607.06520 (neutralize).
For CLIP: Chuang et al. 2023, Debiasing Vision-Language Models via Biased Prompts, arXiv 2302.00070.
"""

from __future__ import annotations

from torch import Tensor

from clip_po.baselines.linear_map import complement_projection, linear_map
from clip_po.concept.transform import ConceptTransform


def project_out_directions(directions: Tensor) -> ConceptTransform:
    """Remove the span of directions from the embeddings of images and texts.

    Everything along the directions is lost, also where it is asked for: without man minus woman, a model can't tell
    "a photo of a man" from "a photo of a woman".

    Args:
        directions: Tensor[M, D], such as differences of the embeddings of prompts; of any length, and they may depend
            on each other.

    Returns:
        The transformation, with one W = I - V V^T for both towers, where V is an orthonormal basis of the span.

    Raises:
        ValueError: If a direction is not finite, or they are all zero or span all D dimensions.

    Source: Bolukbasi et al. 2016, arXiv 1607.06520; for CLIP Chuang et al. 2023, arXiv 2302.00070.
    """
    return linear_map(complement_projection(directions))
