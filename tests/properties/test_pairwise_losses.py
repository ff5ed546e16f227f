"""TRL's losses for any log-ratios: which way they push, where they are least, and special cases of each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip_po.losses import (
    F_DIVERGENCES,
    apo_zero_loss,
    apo_zero_unpaired_loss,
    bco_pair_loss,
    discopop_loss,
    exo_pair_loss,
    f_divergence_scores,
    hinge_loss,
    kto_loss,
    kto_pair_loss,
    nca_pair_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
    sppo_hard_loss,
)

BETAS = st.floats(1e-3, 10)
LOGRATIO = st.floats(-30, 30)
LOGRATIOS = st.lists(st.tuples(LOGRATIO, LOGRATIO), min_size=1, max_size=5)
SMOOTHING = st.floats(1e-3, 0.49)


def pairs(drawn):
    """Log-ratios of chosen [B] and rejected [B, 1] texts, with gradients."""
    chosen, rejected = torch.tensor(drawn, dtype=torch.float64).T
    return chosen.clone().requires_grad_(), rejected.unsqueeze(-1).clone().requires_grad_()


MONOTONE = {
    "hinge": hinge_loss,
    "robust": lambda chosen, rejected, beta: robust_loss(chosen, rejected, beta, 0.2),
    "bco_pair": bco_pair_loss,
    "apo_zero": apo_zero_loss,
    "simpo": simpo_loss,
    "margin": lambda chosen, rejected, beta: sigmoid_loss(chosen, rejected, beta, margin=1.5),
}


@pytest.mark.parametrize("name", MONOTONE)
@given(LOGRATIOS, BETAS)
def test_the_chosen_text_goes_up_and_the_rejected_one_down(name, drawn, beta):
    chosen, rejected = pairs(drawn)
    MONOTONE[name](chosen, rejected, beta).sum().backward()
    assert (chosen.grad <= 0).all()
    assert (rejected.grad >= 0).all()
    assert chosen.grad.isfinite().all()


@given(LOGRATIO, BETAS, SMOOTHING, st.floats(-3, 3))
def test_exo_is_least_where_the_policy_is_the_smoothed_label(rejected, beta, smoothing, aside):
    best = (math.log1p(-smoothing) - math.log(smoothing)) / beta
    chosen = torch.tensor([rejected + best, rejected + best + aside], dtype=torch.float64)
    least, other = exo_pair_loss(chosen, torch.full((2, 1), rejected, dtype=torch.float64), beta, smoothing)
    assert least.item() == pytest.approx(0, abs=1e-9)
    assert other.item() >= -1e-9


@given(LOGRATIOS, BETAS, st.floats(0, 0.49))
def test_the_mean_of_the_robust_loss_over_flipped_labels_is_the_dpo_loss_of_the_right_ones(drawn, beta, smoothing):
    chosen, rejected = (part.detach() for part in pairs(drawn))
    flipped = robust_loss(rejected.squeeze(-1), chosen.unsqueeze(-1), beta, smoothing)
    mean = (1 - smoothing) * robust_loss(chosen, rejected, beta, smoothing) + smoothing * flipped
    torch.testing.assert_close(mean, sigmoid_loss(chosen, rejected, beta), rtol=1e-6, atol=1e-6)


@given(LOGRATIOS, BETAS)
def test_sppo_and_nca_are_least_at_their_own_log_ratios(drawn, beta):
    chosen, rejected = (part.detach() for part in pairs(drawn))
    half = torch.full_like(chosen, 0.5 / beta)
    assert (sppo_hard_loss(half, -half.unsqueeze(-1), beta) <= sppo_hard_loss(chosen, rejected, beta)).all()
    kept = torch.full_like(
        chosen, math.log(2) / beta
    )  # where the pull up and the pull down of the chosen text balance
    assert (nca_pair_loss(kept, rejected, beta) <= nca_pair_loss(chosen, rejected, beta) + 1e-12).all()


@given(LOGRATIOS, BETAS)
def test_discopop_is_dpo_on_the_wrong_side_and_exponential_on_the_right_one(drawn, beta):
    chosen, rejected = (part.detach() for part in pairs(drawn))
    margins = beta * (chosen - rejected.squeeze(-1))
    losses = discopop_loss(chosen, rejected, beta, tau=0.05)
    dpo = sigmoid_loss(chosen, rejected, beta)
    torch.testing.assert_close(losses[margins < -2], dpo[margins < -2])
    torch.testing.assert_close(losses[margins > 2], torch.exp(-margins[margins > 2]))


@given(LOGRATIOS, BETAS, st.floats(0, 5), st.floats(0, 3), st.floats(0, 3))
def test_a_pair_is_two_texts_of_unpaired_feedback(drawn, beta, kl, desirable, undesirable):
    chosen, rejected = (part.detach() for part in pairs(drawn))
    kl = torch.tensor(kl, dtype=torch.float64)
    right, wrong = torch.ones_like(chosen, dtype=torch.bool), torch.zeros_like(chosen, dtype=torch.bool)
    weights = (desirable, undesirable)
    apart = kto_loss(chosen, right, kl, beta, *weights) + kto_loss(rejected.squeeze(-1), wrong, kl, beta, *weights)
    torch.testing.assert_close(apart / 2, kto_pair_loss(chosen, rejected, kl, beta, *weights))
    apart = apo_zero_unpaired_loss(chosen, right, beta) + apo_zero_unpaired_loss(rejected.squeeze(-1), wrong, beta)
    torch.testing.assert_close(apart, apo_zero_loss(chosen, rejected, beta))


# ---- Grades of rows


@given(LOGRATIOS, BETAS, st.floats(0, 5))
def test_a_margin_moves_the_log_ratio_that_is_asked_for(drawn, beta, margin):
    chosen, rejected = (part.detach() for part in pairs(drawn))
    moved = sigmoid_loss(chosen - margin / beta, rejected, beta)
    torch.testing.assert_close(sigmoid_loss(chosen, rejected, beta, margin=margin), moved)
    assert (sigmoid_loss(chosen, rejected, beta, margin=margin) >= sigmoid_loss(chosen, rejected, beta)).all()


@given(LOGRATIOS, BETAS, st.data())
def test_each_row_has_its_own_margin_and_smoothing(drawn, beta, data):
    chosen, rejected = (part.detach() for part in pairs(drawn))
    rows = st.lists(st.floats(0, 0.5), min_size=len(chosen), max_size=len(chosen))
    margins, smoothing = (torch.tensor(data.draw(rows), dtype=torch.float64) for _ in range(2))
    together = sigmoid_loss(chosen, rejected, beta, smoothing, margins)
    for row in range(len(chosen)):
        one = slice(row, row + 1)
        alone = sigmoid_loss(chosen[one], rejected[one], beta, smoothing[row].item(), margins[row].item())
        torch.testing.assert_close(together[one], alone)


@given(LOGRATIOS, BETAS)
def test_a_tie_draws_the_two_texts_together(drawn, beta):
    chosen, rejected = pairs(drawn)
    ties = torch.full_like(chosen, 0.5)
    losses = sigmoid_loss(chosen, rejected, beta, ties)
    torch.testing.assert_close(losses, sigmoid_loss(rejected.squeeze(-1), chosen.unsqueeze(-1), beta, ties))
    assert (losses >= math.log(2) - 1e-12).all()
    losses.sum().backward()
    ahead = (chosen - rejected.squeeze(-1)).detach()
    assert (chosen.grad * ahead >= -1e-12).all()


@given(LOGRATIOS, BETAS, st.floats(0, 3))
def test_simpo_is_dpo_without_a_reference_and_with_a_margin(drawn, beta, gamma):
    chosen, rejected = (part.detach() for part in pairs(drawn))
    torch.testing.assert_close(
        simpo_loss(chosen, rejected, beta, gamma), sigmoid_loss(chosen, rejected, beta, margin=gamma)
    )


# ---- f-divergences


@pytest.mark.parametrize("name", F_DIVERGENCES)
@given(st.lists(st.floats(-40, 40), min_size=2, max_size=6, unique=True), st.floats(-1, 3))
def test_scores_rise_with_the_log_ratio_are_0_at_equality_and_keep_absent_texts_absent(name, ratios, alpha):
    ratios = torch.tensor(sorted(ratios), dtype=torch.float64)
    scores = f_divergence_scores(ratios, name, alpha)
    assert (scores.diff() >= 0).all()
    assert scores.isfinite().all()
    around = f_divergence_scores(torch.tensor([-1.0, 0.0, 1.0, -torch.inf], dtype=torch.float64), name, alpha)
    below, equal, above, absent = around.tolist()
    assert below < equal < above
    assert equal == pytest.approx(0, abs=1e-12)
    assert absent == -math.inf


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6))
def test_alpha_divergences_include_both_kls(ratios):
    ratios = torch.tensor(ratios, dtype=torch.float64)
    for alpha, name in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        found = f_divergence_scores(ratios, "alpha_divergence", alpha)
        torch.testing.assert_close(found, f_divergence_scores(ratios, name))
