"""Unpaired feedback: the reference point of KTO, and advice on the weights of right and wrong texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

FEWEST_PAIRS = 1e-8
"""Replaces a number of pairs that is 0."""

ADVISED_RATIO = (1.0, 4 / 3)
"""Recommended range of (desirable_weight * right texts) / (undesirable_weight * wrong texts)."""


def mismatched_kl(
    logratios: Tensor, batch: Mapping[str, Any], shared: bool, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """Compute the reference point of `kto`: the mean log-ratio of mismatched images and texts, at least 0.

    The mean runs over all pairs of an image of one row and the text of another row of the global batch, if the two
    texts differ. TRL's KTOTrainer takes of these the pairs of each row with the next one, which is another estimate of
    the same number. If each row has `candidates` of its own, the texts of other rows are not among them, and the mean
    runs over all candidates of a row but its text.

    Args:
        logratios: Tensor[B, N], log pi - log ref of the candidates, in nats. No gradient flows through it.
        batch: `desirable`, `counted` and `chosen`, Tensor[B] each. Only rows of unpaired feedback that count are read.
        shared: Whether a position among the candidates means the same text in every row of every process.
        total: Sums a tensor over processes, all of which must call the function.

    Returns:
        Tensor[], in nats; 0 if there is no such pair.

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, Sec. 4.1.
    """
    logratios = logratios.detach()
    reads = (batch["desirable"] >= 0) & (batch["counted"] > 0)
    own = batch["chosen"].clamp(min=0)
    present = logratios.isfinite()
    times = present.to(logratios.dtype)
    if shared:
        used = logratios.new_zeros(logratios.shape[1]).index_add(0, own, reads.to(logratios.dtype))
        times = times * total(used)
    times = times.scatter(1, own.unsqueeze(-1), 0.0) * reads.unsqueeze(-1)
    sums = total(torch.stack([(times * logratios.masked_fill(~present, 0.0)).sum(), times.sum()]))
    return (sums[0] / sums[1].clamp(min=FEWEST_PAIRS)).clamp(min=0)


def ratio_advice(right: int, wrong: int, desirable_weight: float, undesirable_weight: float) -> str:
    """Return which weights suit the numbers of right and wrong texts.

    Args:
        right: Number of texts that were called right.
        wrong: Number of texts that were called wrong.
        desirable_weight: As in `ContrastivePOConfig`.
        undesirable_weight: As in `ContrastivePOConfig`.

    Returns:
        One line; empty if the weights are as recommended, or either number is 0.

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, Eq. 9, as in TRL's KTOTrainer.
    """
    if not right or not wrong:
        return ""
    low, high = ADVISED_RATIO
    balance = undesirable_weight * wrong / right
    wanted = round(low * balance, 2), round(high * balance, 2)
    counter = desirable_weight * right / wrong
    other = round(counter / high, 2), round(counter / low, 2)
    if wanted[0] <= desirable_weight <= wanted[1] or other[0] <= undesirable_weight <= other[1]:
        return ""
    return (
        f"There are {right:,} right and {wrong:,} wrong texts. To balance them, set desirable_weight between "
        f"{wanted[0]} and {wanted[1]}, or undesirable_weight between {other[0]} and {other[1]}, not both (KTO)."
    )
