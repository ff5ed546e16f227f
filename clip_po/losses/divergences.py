"""Divergences: KL(reference || policy) as a regularization, and the f-divergences that may replace DPO's KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_EXPONENT = 80.0
"""Exponents are cut here, so that an exponential of float32 stays finite."""


def kl_regularization(ref_logps: Tensor, policy_logps: Tensor) -> Tensor:
    """Compute KL(reference || policy) over the candidate texts of each regularization image.

    Args:
        ref_logps: Tensor[B, N], log ref(y | x) in nats; -inf for an absent candidate.
        policy_logps: Tensor[B, N], log pi(y | x); -inf for the same candidates.

    Returns:
        Tensor[B], >= 0, one divergence per image. The caller takes the mean over the batch.

    Source: the regularization of Afzali et al. 2025, arXiv 2411.08923.
    """
    present = ~ref_logps.isneginf()
    ratios = ref_logps.masked_fill(~present, 0.0) - policy_logps.masked_fill(~present, 0.0)
    return (ref_logps.exp() * ratios).sum(dim=-1)


def bernoulli_kl(ref_logps: Tensor, policy_logps: Tensor) -> Tensor:
    """Compute KL(reference || policy) where each candidate is right or wrong by itself, summed over the candidates.

        sum_y ref(y) log(ref(y) / pi(y)) + (1 - ref(y)) log((1 - ref(y)) / (1 - pi(y)))

    Args:
        ref_logps: Tensor[B, N], log ref(y | x) in nats, < 0; -inf for an absent candidate.
        policy_logps: Tensor[B, N], log pi(y | x); -inf for the same candidates.

    Returns:
        Tensor[B], >= 0, one divergence per image.

    Source: the KL of Bernoulli distributions, in the place of that of the softmax in Afzali et al. 2025,
        arXiv 2411.08923, for models trained as in Zhai et al. 2023, arXiv 2303.15343.
    """
    absent = ref_logps.isneginf()
    found = [logps.masked_fill(absent, -1.0) for logps in (ref_logps, policy_logps)]
    (right, other_right), (wrong, other_wrong) = found, [_log_complement(logps) for logps in found]
    kl = right.exp() * (right - other_right) + wrong.exp() * (wrong - other_wrong)
    return kl.masked_fill(absent, 0.0).sum(dim=-1)


def _log_complement(logps: Tensor) -> Tensor:
    """Return log(1 - p) of log p, exactly near both ends."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).tiny)
    near_one = logps > -math.log(2)
    # The branch that is not used must be finite too, or its gradient would be nan.
    small, large = logps.masked_fill(near_one, -1.0), logps.masked_fill(~near_one, -0.1)
    return torch.where(near_one, (-torch.expm1(large)).log(), torch.log1p(-small.exp()))


def _alpha_score(logratios: Tensor, alpha: float) -> Tensor:
    if math.isclose(alpha, 1.0, rel_tol=0.0, abs_tol=1e-6):
        return logratios
    return torch.expm1(((alpha - 1) * logratios).clamp(max=LARGEST_EXPONENT)) / (alpha - 1)


F_DIVERGENCES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda logratios, alpha: logratios,
    "forward_kl": lambda logratios, alpha: 1 - torch.exp((-logratios).clamp(max=LARGEST_EXPONENT)),
    "js_divergence": lambda logratios, alpha: math.log(2) + F.logsigmoid(logratios),
    "alpha_divergence": _alpha_score,
}
"""Score of a log-ratio, and of alpha, by name of the divergence: f'(pi / ref) up to a constant."""


def f_divergence_scores(logratios: Tensor, f_divergence_type: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """Replace log-ratios by the scores f'(pi / ref) of another divergence between policy and reference.

    DPO's reward is beta * log(pi / ref) because it holds the policy to the reference by KL(pi || ref). With an
    f-divergence in its place, the reward is beta * f'(pi / ref). It is known up to a constant for each image, so only
    losses of the difference between two texts can use it.

    Args:
        logratios: Tensor[...], log pi - log ref, in nats; -inf for an absent text.
        f_divergence_type: A name in `F_DIVERGENCES`. With t = pi / ref, the score is log t for "reverse_kl", 1 - 1 / t
            for "forward_kl", log(2 t / (t + 1)) for "js_divergence", and (t^(alpha - 1) - 1) / (alpha - 1) for
            "alpha_divergence", which is log t at alpha = 1.
        alpha: alpha of "alpha_divergence".

    Returns:
        Tensor[...]; -inf for an absent text.

    Source: Wang et al. 2023, arXiv 2309.16240, Table 1, as in TRL's DPOTrainer.
    """
    absent = logratios.isneginf()
    scores = F_DIVERGENCES[f_divergence_type](logratios.masked_fill(absent, 0.0), alpha)
    return scores.masked_fill(absent, -torch.inf)
