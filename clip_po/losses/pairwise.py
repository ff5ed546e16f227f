"""Losses of the difference between the log-ratios of the chosen and the rejected text."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_po.losses.logps import check_shapes, single_rejected


def smoothed_log_loss(logits: Tensor, label_smoothing: Tensor | float = 0.0) -> Tensor:
    """Compute -(1 - label_smoothing) log sigmoid(logits) - label_smoothing log sigmoid(-logits).

    Args:
        logits: Tensor[B], log-odds of the preference.
        label_smoothing: Probability in [0, 0.5] that a preference is wrong, one for all or Tensor[B].

    Returns:
        Tensor[B], one loss per preference.

    Source: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def sigmoid_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float,
    label_smoothing: Tensor | float = 0.0,
    margin: Tensor | float = 0.0,
) -> Tensor:
    """Compute the DPO loss, or its softmax form S-DPO if there are several rejected texts.

    With m = -log sum_l exp(beta * (rejected_l - chosen)) - margin, which for one rejected text is
    beta * (chosen - rejected) - margin, the loss is
    -(1 - label_smoothing) log sigmoid(m) - label_smoothing log sigmoid(-m).

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, R], log pi_l - log ref_l; -inf for an absent text.
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: Probability that a preference is wrong (conservative DPO): one in [0, 0.5) for all, or
            Tensor[B] in [0, 0.5], where 0.5 is a tie.
        margin: By how much the reward of the chosen text must be above that of each rejected one, >= 0: one for all,
            or Tensor[B].

    Returns:
        Tensor[B], one loss per preference.

    Raises:
        ValueError: If the shapes do not match.

    Source: Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; S-DPO: Chen et al. 2024, arXiv 2406.09215;
    label smoothing: Mitchell 2023, "A note on DPO with noisy preferences"; margin: Touvron et al. 2023,
    arXiv 2307.09288, Eq. 2, for DPO: Amini et al. 2024, arXiv 2402.10571 (ODPO).
    """
    check_shapes(chosen_logratios, rejected_logratios)
    difference = -torch.logsumexp(beta * (rejected_logratios - chosen_logratios.unsqueeze(-1)), dim=-1)
    return smoothed_log_loss(difference - margin, label_smoothing)


def hinge_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Compute the hinge loss max(0, 1 - beta * (chosen - rejected)).

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        beta: Reciprocal of the margin in nats, > 0. A pair beyond the margin has no gradient.

    Returns:
        Tensor[B], one loss per preference.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: SLiC-HF: Zhao et al. 2023, arXiv 2305.10425, on log-ratios as in RSO: Liu et al. 2023, arXiv 2309.06657.
    """
    return torch.relu(1 - beta * (chosen_logratios - single_rejected(chosen_logratios, rejected_logratios, "hinge")))


def ipo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Compute the IPO loss, the squared distance of the log-ratio margin to 1 / (2 beta).

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        beta: Regularization strength, tau in the paper, > 0.

    Returns:
        Tensor[B], one loss per preference.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: Azar et al. 2023, arXiv 2310.12036, Eq. 17.
    """
    margin = chosen_logratios - single_rejected(chosen_logratios, rejected_logratios, "ipo")
    return (margin - 1 / (2 * beta)) ** 2


def exo_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Compute KL(policy || label) over the two texts, the reverse of the KL that DPO minimizes.

    The policy is softmax(beta * log-ratios) over chosen and rejected text, the label (1 - label_smoothing,
    label_smoothing).

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: Probability in (0, 0.5) that a preference is wrong, epsilon in the paper, which recommends
            1e-3.

    Returns:
        Tensor[B], >= 0, one loss per preference.

    Raises:
        ValueError: If there is more than one rejected text, or `label_smoothing` is 0, where the loss is infinite.

    Source: Ji et al. 2024, arXiv 2402.00856, Eq. 16.
    """
    logits = beta * (chosen_logratios - single_rejected(chosen_logratios, rejected_logratios, "exo_pair"))
    if not label_smoothing > 0:
        raise ValueError(
            f"loss_type='exo_pair' is infinite with label_smoothing={label_smoothing}. The paper recommends 1e-3."
        )
    right = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return right + wrong


def robust_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Compute the DPO loss without the bias of labels that are flipped at a known rate.

    With m = beta * (chosen - rejected) and e = label_smoothing, the loss is
    (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e). Its mean over flipped labels is the DPO loss of the
    right ones.

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: Probability in [0, 0.5) that a preference is wrong. With 0 this is the DPO loss.

    Returns:
        Tensor[B], one loss per preference. It may be negative.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: Chowdhury et al. 2024, arXiv 2403.00409.
    """
    logits = beta * (chosen_logratios - single_rejected(chosen_logratios, rejected_logratios, "robust"))
    clean = -(1 - label_smoothing) * F.logsigmoid(logits)
    flipped = -label_smoothing * F.logsigmoid(-logits)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def discopop_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, tau: float = 0.05) -> Tensor:
    """Compute the log-ratio modulated loss, which a language model found: a blend of DPO and the exponential loss.

    With m = beta * (chosen - rejected) and w = sigmoid(m / tau), the loss is (1 - w) * -log sigmoid(m) + w * exp(-m).

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        beta: Strength of the pull to the reference, > 0.
        tau: Width of the blend, in (0, 1].

    Returns:
        Tensor[B], one loss per preference.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: Lu et al. 2024, arXiv 2406.08414, Eq. 5.
    """
    logits = beta * (chosen_logratios - single_rejected(chosen_logratios, rejected_logratios, "discopop"))
    # w * exp(-m) in one exponent, because 0 * inf is nan for a pair that is far on the wrong side.
    exponential = torch.exp(F.logsigmoid(logits / tau) - logits)
    return -F.logsigmoid(logits) * torch.sigmoid(-logits / tau) + exponential


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    beta: float,
    gamma: float = 0.5,
    label_smoothing: Tensor | float = 0.0,
    margin: Tensor | float = 0.0,
) -> Tensor:
    """Compute the SimPO loss -log sigmoid(beta * (log pi_w - log pi_l) - gamma), which needs no reference.

    A text is one action of the policy, so that its log-probability is not divided by a length.

    Args:
        chosen_logps: Tensor[B], log pi_w, in nats.
        rejected_logps: Tensor[B, 1], log pi_l.
        beta: Scale of the log-probabilities, > 0.
        gamma: Margin that every preference must have, >= 0.
        label_smoothing: As in `sigmoid_loss`.
        margin: Margin beyond `gamma`, as in `sigmoid_loss`.

    Returns:
        Tensor[B], one loss per preference.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: Meng et al. 2024, arXiv 2405.14734, Eq. 6.
    """
    difference = chosen_logps - single_rejected(chosen_logps, rejected_logps, "simpo")
    return smoothed_log_loss(beta * difference - gamma - margin, label_smoothing)
