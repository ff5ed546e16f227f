"""Losses that compare distributions over the batch instead of pairs: alignment via optimal transport (AOT)."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_po.losses.logps import single_rejected
from clip_po.losses.pairwise import smoothed_log_loss


def aot_loss(
    policy_logratios: Tensor,
    ref_logratios: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    counted: Tensor | None = None,
) -> Tensor:
    """Compute the loss by which the policy's preferences dominate the reference's, as distributions over the batch.

    The rows are sorted twice, by the log-ratio of chosen to rejected text under the policy and under the reference.
    The k-th smallest value of the one must be above the k-th smallest of the other. The whole batch belongs together:
    part of it has other k-th values.

    Args:
        policy_logratios: Tensor[B], log pi_w - log pi_l, in nats.
        ref_logratios: Tensor[B], log ref_w - log ref_l.
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: Probability in [0, 0.5) that a preference is wrong.
        counted: Tensor[B] of bool, the rows that are sorted; None for all.

    Returns:
        Tensor[B], one loss per row: that of its own value of `policy_logratios` and the value of the same rank.
        log 2, without gradient, for a row that does not count.

    Source: Melnyk et al. 2024, arXiv 2406.05882, the paired variant.
    """
    return smoothed_log_loss(beta * _above_same_rank(policy_logratios, ref_logratios, counted), label_smoothing)


def aot_unpaired_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    counted: Tensor | None = None,
) -> Tensor:
    """Compute the loss by which chosen texts dominate rejected texts, as distributions over the batch.

    The log-ratios of chosen texts are sorted, and those of rejected texts. The k-th smallest value of the one must be
    above the k-th smallest of the other, whichever rows they come from.

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: Probability in [0, 0.5) that a preference is wrong.
        counted: Tensor[B] of bool, the rows that are sorted; None for all.

    Returns:
        Tensor[B], one loss per row: that of its own chosen text and the rejected text of the same rank. log 2, without
        gradient, for a row that does not count.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: Melnyk et al. 2024, arXiv 2406.05882, the unpaired variant.
    """
    rejected = single_rejected(chosen_logratios, rejected_logratios, "aot_unpaired")
    return smoothed_log_loss(beta * _above_same_rank(chosen_logratios, rejected, counted), label_smoothing)


def _above_same_rank(upper: Tensor, lower: Tensor, counted: Tensor | None) -> Tensor:
    """Return each value of `upper` minus the value of the same rank in `lower`; 0 for a row that does not count."""
    counted = torch.ones_like(upper, dtype=torch.bool) if counted is None else counted
    # Rows that do not count are the last of both orders, so that the others have the ranks 0 to their number - 1.
    ranks = upper.masked_fill(~counted, torch.inf).argsort(stable=True).argsort()
    same_rank = lower.masked_fill(~counted, torch.inf).sort(stable=True).values[ranks]
    return upper.where(counted, 0.0) - same_rank.where(counted, 0.0)
