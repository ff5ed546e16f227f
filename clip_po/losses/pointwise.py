"""Losses of the log-ratio of each text by itself: of pairs, and of unpaired feedback."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_po.losses.logps import single_rejected


def nca_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Compute the noise-contrastive loss, which also keeps the log-ratio of the chosen text from falling.

    The loss is -log sigmoid(beta * chosen) - 0.5 log sigmoid(-beta * chosen) - 0.5 log sigmoid(-beta * rejected).

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        beta: Strength of the pull to the reference, > 0.

    Returns:
        Tensor[B], one loss per preference.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: Chen et al. 2024, arXiv 2402.05369, NCA for K = 2.
    """
    chosen = beta * chosen_logratios
    rejected = beta * single_rejected(chosen_logratios, rejected_logratios, "nca_pair")
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Compute the loss of a binary classifier of texts, whose logit is the reward beta * log-ratio.

    The loss is -log sigmoid(beta * chosen) - log sigmoid(-beta * rejected). As in TRL since 1.0, the paper's reward
    shift, a running mean, is 0.

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        beta: Strength of the pull to the reference, > 0.

    Returns:
        Tensor[B], one loss per preference.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: Jung et al. 2024, arXiv 2404.04656, with delta = 0.
    """
    rejected = single_rejected(chosen_logratios, rejected_logratios, "bco_pair")
    return -F.logsigmoid(beta * chosen_logratios) - F.logsigmoid(-beta * rejected)


def sppo_hard_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Compute the squared distances of the two log-ratios to 1 / (2 beta) and -1 / (2 beta).

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        beta: Strength of the pull to the reference, > 0; 1 / eta in the paper.

    Returns:
        Tensor[B], one loss per preference.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: Wu et al. 2024, arXiv 2405.00675, Eq. 4.7, where the chosen text wins with probability 1.
    """
    rejected = single_rejected(chosen_logratios, rejected_logratios, "sppo_hard")
    return (chosen_logratios - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Compute 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected): the chosen text up, the rejected one down.

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        beta: Strength of the pull to the reference, > 0.

    Returns:
        Tensor[B], 0 to 2, one loss per preference.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 7.
    """
    rejected = single_rejected(chosen_logratios, rejected_logratios, "apo_zero")
    return 1 - torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Compute sigmoid(beta * chosen) + 1 - sigmoid(beta * (chosen - rejected)): both down, the rejected text further.

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        beta: Strength of the pull to the reference, > 0.

    Returns:
        Tensor[B], 0 to 2, one loss per preference.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 8.
    """
    difference = chosen_logratios - single_rejected(chosen_logratios, rejected_logratios, "apo_down")
    return torch.sigmoid(beta * chosen_logratios) + 1 - torch.sigmoid(beta * difference)


def kto_pair_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Compute the KTO loss of pairs: the chosen text is desirable, the rejected text undesirable.

    The loss is the mean over the two texts of desirable_weight * (1 - sigmoid(beta * (chosen - kl))) and
    undesirable_weight * (1 - sigmoid(beta * (kl - rejected))).

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        kl: Tensor[], the reference point z0: KL(reference || policy) of the regularization batch, in nats. No gradient
            flows through it.
        beta: Steepness of the value function, > 0.
        desirable_weight: lambda_D, >= 0.
        undesirable_weight: lambda_U, >= 0.

    Returns:
        Tensor[B], one loss per preference.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: the paired KTO of Afzali et al. 2025, arXiv 2411.08923; KTO: Ethayarajh et al. 2024,
    arXiv 2402.01306, Sec. 4.
    """
    kl = kl.detach()
    rejected = single_rejected(chosen_logratios, rejected_logratios, "kto_pair")
    desirable = 1 - torch.sigmoid(beta * (chosen_logratios - kl))
    undesirable = 1 - torch.sigmoid(beta * (kl - rejected))
    return (desirable_weight * desirable + undesirable_weight * undesirable) / 2


def kto_loss(
    logratios: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Compute the KTO loss of unpaired feedback: texts that were called right or wrong one by one.

    The loss is desirable_weight * (1 - sigmoid(beta * (log-ratio - kl))) for a right text and
    undesirable_weight * (1 - sigmoid(beta * (kl - log-ratio))) for a wrong one.

    Args:
        logratios: Tensor[B], log pi - log ref of the text of each row, in nats.
        desirable: Tensor[B] of bool, whether the text was called right.
        kl: Tensor[], the reference point z0 in nats, >= 0: the mean log-ratio of mismatched images and texts of the
            global batch, or 0 if that is negative. No gradient flows through it.
        beta: Steepness of the value function, > 0.
        desirable_weight: lambda_D, >= 0.
        undesirable_weight: lambda_U, >= 0.

    Returns:
        Tensor[B], one loss per row.

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, Eq. 7, as in TRL's KTOTrainer.
    """
    kl = kl.detach()
    right = desirable_weight * (1 - torch.sigmoid(beta * (logratios - kl)))
    wrong = undesirable_weight * (1 - torch.sigmoid(beta * (kl - logratios)))
    return torch.where(desirable, right, wrong)


def apo_zero_unpaired_loss(
    logratios: Tensor,
    desirable: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Compute `apo_zero_loss` of unpaired feedback, which is `kto_loss` with the reference point 0.

    The loss is desirable_weight * (1 - sigmoid(beta * log-ratio)) for a right text and
    undesirable_weight * sigmoid(beta * log-ratio) for a wrong one.

    Args:
        logratios: Tensor[B], log pi - log ref of the text of each row, in nats.
        desirable: Tensor[B] of bool, whether the text was called right.
        beta: Strength of the pull to the reference, > 0.
        desirable_weight: Weight of right texts, >= 0.
        undesirable_weight: Weight of wrong texts, >= 0.

    Returns:
        Tensor[B], one loss per row.

    Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 7 without pairs, as in TRL's KTOTrainer.
    """
    zero = logratios.new_zeros(())
    return kto_loss(logratios, desirable, zero, beta, desirable_weight, undesirable_weight)
