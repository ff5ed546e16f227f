"""Losses that need no rejected text: cross-entropy, and distillation of the reference."""

from __future__ import annotations

from torch import Tensor

from clip_po.losses.divergences import kl_regularization


def sft_loss(chosen_logps: Tensor) -> Tensor:
    """Compute the cross-entropy on the chosen text: the baseline CE of the paper, under TRL's name.

    Args:
        chosen_logps: Tensor[B], log pi(y_w | x), in nats.

    Returns:
        Tensor[B], one loss per preference.
    """
    return -chosen_logps


def distillation_loss(target_logps: Tensor, policy_logps: Tensor) -> Tensor:
    """Compute KL(reference on the clean image || policy on the attacked image).

    The reference's answer on the clean image is the soft target, so no label is needed.

    Args:
        target_logps: Tensor[B, N], log ref(y | x_clean) in nats; -inf for an absent candidate.
        policy_logps: Tensor[B, N], log pi(y | x); -inf for the same candidates.

    Returns:
        Tensor[B], >= 0, one loss per image.

    Source: soft targets of Hinton et al. 2015, arXiv 1503.02531, at temperature 1. The model before alignment is its
    own teacher, on another view of the image.
    """
    return kl_regularization(target_logps, policy_logps)


def embedding_distillation_loss(target_embeds: Tensor, policy_embeds: Tensor) -> Tensor:
    """Compute 1 - cos(embedding under the reference on the clean image, embedding under the policy).

    The target is the reference's embedding of the clean image. It belongs to no task, so that what the model knows
    about any text is preserved: the answers to all texts depend on the embedding alone. No label is needed.

    Args:
        target_embeds: Tensor[B, D], unit-norm. No gradient flows through it.
        policy_embeds: Tensor[B, D], unit-norm: of the attacked image as a loss, of the clean image as a
            regularization.

    Returns:
        Tensor[B], 0 to 2, one loss per image.

    Source: the feature distillation of Romero et al. 2015 (FitNets), arXiv 1412.6550, on unit-norm embeddings, where
    1 - cos is half the squared distance. The model before alignment is its own teacher.
    """
    return 1 - (target_embeds.detach() * policy_embeds).sum(dim=-1)
