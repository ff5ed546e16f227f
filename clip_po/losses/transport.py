"""Losses that compare distributions over the batch instead of pairs: alignment via optimal transport (AOT)."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_po.losses.pairwise import smoothed_log_loss


def aot_loss(
    upper: Tensor,
    lower: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    counted: Tensor | None = None,
) -> Tensor:
    """Compute the loss by which one set of values dominates another one, as distributions over the batch.

    Both are sorted. The k-th smallest value of `upper` must be above the k-th smallest of `lower`, whichever rows they
    come from. The whole batch belongs together: part of it has other k-th values.

    Args:
        upper: Tensor[B], in nats. The paired variant compares how much policy and reference prefer the chosen text:
            log pi_w - log pi_l. The unpaired variant compares chosen with rejected texts: log pi_w - log ref_w.
        lower: Tensor[B]: log ref_w - log ref_l in the paired variant, log pi_l - log ref_l in the unpaired one.
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: Probability in [0, 0.5) that a preference is wrong.
        counted: Tensor[B] of bool, the rows that are sorted; None for all.

    Returns:
        Tensor[B], one loss per row: that of its own value in `upper` and the value of the same rank in `lower`. log 2,
        without gradient, for a row that does not count.

    Source: Melnyk et al. 2024, arXiv 2406.05882.
    """
    return smoothed_log_loss(beta * _above_same_rank(upper, lower, counted), label_smoothing)


def _above_same_rank(upper: Tensor, lower: Tensor, counted: Tensor | None) -> Tensor:
    """Return each value of `upper` minus the value of the same rank in `lower`; 0 for a row that does not count."""
    counted = torch.ones_like(upper, dtype=torch.bool) if counted is None else counted
    # Rows that do not count are the last of both orders, so that the others have the ranks 0 to their number - 1.
    ranks = upper.masked_fill(~counted, torch.inf).argsort(stable=True).argsort()
    same_rank = lower.masked_fill(~counted, torch.inf).sort(stable=True).values[ranks]
    return upper.where(counted, 0.0) - same_rank.where(counted, 0.0)
