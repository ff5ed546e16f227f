"""From embeddings to log-probabilities: over the texts of an image, over the images of a text, and over pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_po.candidate_images import images_of_all
from clip_po.losses.global_batch import of_all_processes, of_this_process


def candidate_logps(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    candidates: Tensor | None = None,
    candidate_images: Tensor | None = None,
    logit_bias: Tensor | float | None = None,
) -> Tensor:
    """Compute log pi of candidates, from logit_scale * cos(image, text).

    The policy is the softmax over the candidates. With `logit_bias`, each candidate is right or wrong by itself, with
    log pi = log sigmoid(logit_scale * cos(image, text) + logit_bias).

    Args:
        image_embeds: Tensor[P, D], unit-norm.
        text_embeds: Tensor[M, D], unit-norm.
        logit_scale: CLIP's inverse temperature, after exp; > 0.
        candidates: Tensor[B, N] of positions among the M texts, -1 for none; None for all M texts.
        candidate_images: Tensor[B, N] of positions among the P images, -1 for none: candidate n of row b is the pair
            of image and text at [b, n], so that log pi(x | t) has one text in a row, log pi(y | x) one image. None if
            row b has image b, and P is B.
        logit_bias: The bias of a model that is trained by a sigmoid of each pair; None for the softmax.

    Returns:
        Tensor[B, N] (or [B, M]) in nats, at least float32; -inf for an absent candidate.

    Raises:
        ValueError: If image and text embeddings differ in size.

    Source: Radford et al. 2021, arXiv 2103.00020, Sec. 2.3; with a sigmoid: Zhai et al. 2023, arXiv 2303.15343, Eq. 1;
        as a policy: Afzali et al. 2025, arXiv 2411.08923.
    """
    if image_embeds.shape[-1] != text_embeds.shape[-1]:
        raise ValueError(
            f"image_embeds have {image_embeds.shape[-1]} dimensions, text_embeds {text_embeds.shape[-1]}. Embed "
            "images and texts with the same model."
        )
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    with torch.autocast(image_embeds.device.type, enabled=False):
        logits = logit_scale * image_embeds.to(dtype) @ text_embeds.to(dtype).T
    if candidates is not None and candidate_images is not None:
        absent = (candidates < 0) | (candidate_images < 0)
        logits = logits[candidate_images.clamp(min=0), candidates.clamp(min=0)].masked_fill(absent, -torch.inf)
    elif candidates is not None:
        logits = logits.gather(-1, candidates.clamp(min=0)).masked_fill(candidates < 0, -torch.inf)
    return logits.log_softmax(dim=-1) if logit_bias is None else F.logsigmoid(logits + logit_bias)


def pair_logps(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    counted: Tensor,
    logit_bias: Tensor | float | None = None,
) -> Tensor:
    """Compute log pi(y | x) and log pi(x | y) of pairs over the texts and images of the global batch, as one policy.

    Half of the probability belongs to each direction, so that a KL of the result is the mean of the two KLs. With
    `logit_bias`, a pair has one probability, the same in both directions: those of each image with all texts.

    Args:
        image_embeds: Tensor[B, D], unit-norm: the images of the pairs of this process.
        text_embeds: Tensor[B, D], unit-norm: their texts. B is the same in every process.
        logit_scale: As for `candidate_logps`.
        counted: Tensor[B] of bool, which pairs count. The others are no candidates of other pairs.
        logit_bias: As for `candidate_logps`.

    Returns:
        Tensor[B, 2 * processes * B] in nats, with `logit_bias` Tensor[B, processes * B]; -inf for an absent candidate.
    """
    images, texts, present = map(of_all_processes, (image_embeds, text_embeds, counted.float()))
    own = of_this_process(torch.eye(len(present), dtype=torch.bool, device=present.device))
    absent = ~((present > 0) | own)
    if logit_bias is not None:
        logps = candidate_logps(image_embeds, texts, logit_scale, logit_bias=logit_bias)
        return logps.masked_fill(absent, -torch.inf)
    directions = (
        candidate_logps(image_embeds, texts, logit_scale),
        candidate_logps(text_embeds, images, logit_scale),
    )
    halves = [logps.masked_fill(absent, -torch.inf).log_softmax(dim=-1) - math.log(2) for logps in directions]
    return torch.cat(halves, dim=-1)


def batch_logps(
    image_embeds: Mapping[str, Tensor],
    text_embeds: Tensor,
    reg_text_embeds: Tensor | None,
    logit_scale: Tensor | float,
    batch: Mapping[str, Any],
    shared: bool,
    logit_bias: Tensor | float | None = None,
) -> dict[str, Tensor]:
    """Compute the log-probabilities of a batch.

    Args:
        image_embeds: Tensor[P, D] for "image" and Tensor[B, D] for other images, unit-norm, by name.
        text_embeds: Tensor[M, D], unit-norm: the texts of the batch.
        reg_text_embeds: Tensor[B, D], unit-norm: the texts of the regularization images; not read if they have none.
        logit_scale: As for `candidate_logps`.
        batch: Batch of `DataCollatorForContrastivePreference`, or of `in_batch_candidates`.
        shared: Whether every row has all M texts as candidates.
        logit_bias: As for `candidate_logps`.

    Returns:
        Tensor[B, N] by name of the images: of "image" over the candidates of the preferences, of "reg_image" by
        `pair_logps` if regularization images have texts, and of others over the candidate texts.
    """
    candidates, images = batch.get("candidates"), batch.get("candidate_images")
    logps = {}
    for name, embeds in image_embeds.items():
        if name == "image":
            embeds = images_of_all(embeds, batch)
            logps[name] = candidate_logps(embeds, text_embeds, logit_scale, candidates, images, logit_bias)
        elif name == "reg_image" and "reg_texts" in batch and reg_text_embeds is not None:
            logps[name] = pair_logps(embeds, reg_text_embeds, logit_scale, batch["reg_row_weight"] > 0, logit_bias)
        else:
            own = None if shared else candidates
            logps[name] = candidate_logps(embeds, text_embeds, logit_scale, own, logit_bias=logit_bias)
    return logps
