"""The losses for any log-probabilities: which way they push, their limits in beta, and what they don't depend on."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from clip_po.losses import (
    LOSSES,
    SINGLE_REJECTED,
    LossSettings,
    PreferenceLogps,
    ipo_loss,
    kl_regularization,
    kto_pair_loss,
    preference_loss,
    sigmoid_loss,
)
from clip_po.policy import CandidateLogps, candidate_logps, preference_logps

OF_LOGPS = [name for name in LOSSES if name != "embedding_distillation"]
"""The losses of log-probabilities. `embedding_distillation` reads embeddings alone."""

BETAS = st.floats(1e-3, 10)
LOGRATIO = st.floats(-30, 30)
LOGRATIOS = st.lists(st.tuples(LOGRATIO, LOGRATIO), min_size=1, max_size=5)


def pairs(drawn):
    """Log-ratios of chosen [B] and rejected [B, 1] texts, with gradients."""
    chosen, rejected = torch.tensor(drawn, dtype=torch.float64).T
    return chosen.clone().requires_grad_(), rejected.unsqueeze(-1).clone().requires_grad_()


@st.composite
def batches(draw, single=False):
    """Logits of a policy and a reference [B, N], whose candidates may be absent, and positions among them."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    rejected = 1 if single else draw(st.integers(1, columns - 1))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([0.1, 3.0, 40.0]))
    policy, reference = scale * torch.randn(2, rows, columns, generator=numbers, dtype=torch.float64)
    order = torch.stack([torch.randperm(columns, generator=numbers) for _ in range(rows)])
    chosen, wrong = order[:, 0], order[:, 1 : 1 + rejected].clone()
    if rejected > 1 and draw(st.booleans()):
        wrong[0, -1] = -1  # a row with fewer rejected texts
    return policy, reference, chosen, wrong


def as_losses_take_them(policy, reference, chosen, rejected):
    logps = [logits.log_softmax(dim=-1) for logits in (policy, reference)]
    batch = {"chosen": chosen, "rejected": rejected}
    found = preference_logps(CandidateLogps(logps[0], None), CandidateLogps(logps[1], logps[1]), batch)
    return judged(found)


def judged(logps):
    """The same, where the chosen texts are also called right one by one, for the losses of unpaired feedback."""
    desirable = torch.ones(len(logps.chosen), dtype=torch.long)
    return dataclasses.replace(logps, desirable=desirable, mismatched_kl=torch.tensor(0.2, dtype=torch.float64))


def every_loss(logps, beta):
    """Each loss that can be asked, by name, Tensor[B]."""
    names = [name for name in OF_LOGPS if logps.rejected.shape[1] == 1 or name not in SINGLE_REJECTED]
    settings, kl = LossSettings(beta=beta, label_smoothing=0.1), torch.tensor(0.3, dtype=torch.float64)
    return {name: LOSSES[name].compute(logps, kl, settings) for name in names}


@given(LOGRATIOS, BETAS, st.floats(0, 0.49), st.floats(0, 5))
def test_losses_pull_the_chosen_text_up_and_push_the_rejected_one_down(drawn, beta, smoothing, kl):
    reference_point = torch.tensor(kl, dtype=torch.float64)
    for name in ("sigmoid", "smoothed", "ipo", "kto_pair"):
        chosen, rejected = pairs(drawn)
        losses = {
            "sigmoid": lambda c, r: sigmoid_loss(c, r, beta),
            "smoothed": lambda c, r: sigmoid_loss(c, r, beta, smoothing),
            "ipo": lambda c, r: ipo_loss(c, r, beta),
            "kto_pair": lambda c, r: kto_pair_loss(c, r, reference_point, beta),
        }[name](chosen, rejected)
        losses.sum().backward()
        margin = (chosen - rejected.squeeze(-1)).detach()
        # Where these two have what they want, they turn round: at their optimum in the margin.
        optimum = {
            "smoothed": (math.log1p(-smoothing) - math.log(smoothing)) / beta if smoothing > 0 else math.inf,
            "ipo": 1 / (2 * beta),
        }.get(name, math.inf)
        wanted = (optimum - margin).sign()
        wanted = torch.where((optimum - margin).abs() < 1e-6 * (1 + margin.abs()), chosen.grad.neg().sign(), wanted)
        assert (chosen.grad * wanted <= 0).all()
        assert (rejected.grad.squeeze(-1) * wanted >= 0).all()
        if name == "sigmoid":
            assert (chosen.grad < 0).all()  # however good it is already
        assert torch.isfinite(chosen.grad).all()


@given(LOGRATIOS, st.integers(1, 5))
def test_without_beta_no_text_is_preferred(drawn, count):
    chosen, rejected = pairs(drawn)
    several = rejected.detach().expand(-1, count)
    assert sigmoid_loss(chosen.detach(), several, 1e-13).numpy() == pytest.approx(math.log(1 + count))
    halves = kto_pair_loss(chosen.detach(), rejected.detach(), torch.tensor(1.0), 1e-13, 3.0, 5.0)
    assert halves.numpy() == pytest.approx((3 + 5) / 4)


@given(LOGRATIOS)
def test_at_a_large_beta_only_a_wrong_order_costs(drawn):
    chosen, rejected = (part.detach() for part in pairs(drawn))
    hinge = (rejected.squeeze(-1) - chosen).clamp(min=0)
    torch.testing.assert_close(sigmoid_loss(chosen, rejected, 1e9) / 1e9, hinge, atol=1e-8, rtol=0)


@given(st.lists(LOGRATIO, min_size=1, max_size=5), BETAS, st.floats(-1, 1))
def test_ipo_is_least_at_a_margin_of_half_of_one_over_beta(drawn, beta, aside):
    rejected = torch.tensor(drawn, dtype=torch.float64).unsqueeze(-1)
    at = [rejected.squeeze(-1) + 1 / (2 * beta) + step for step in (0.0, aside, -aside)]
    best, right, left = (ipo_loss(chosen, rejected, beta) for chosen in at)
    assert best.numpy() == pytest.approx(0, abs=1e-20)
    torch.testing.assert_close(right, left)
    assert right.numpy() == pytest.approx(aside**2, abs=1e-9)


@given(LOGRATIOS, BETAS, st.floats(0, 0.49))
def test_s_dpo_with_one_rejected_text_is_dpo(drawn, beta, smoothing):
    chosen, rejected = (part.detach() for part in pairs(drawn))
    margin = beta * (chosen - rejected.squeeze(-1))
    dpo = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    torch.testing.assert_close(sigmoid_loss(chosen, rejected, beta, smoothing), dpo)
    absent = torch.full_like(rejected, -math.inf)
    torch.testing.assert_close(sigmoid_loss(chosen, torch.cat([absent, rejected], 1), beta, smoothing), dpo)


@given(batches(), BETAS, st.floats(-50, 50))
def test_a_constant_added_to_the_logits_changes_nothing(batch, beta, constant):
    policy, reference, chosen, rejected = batch
    rows, columns = policy.shape
    identity = torch.eye(columns, dtype=torch.float64)
    found = []
    for added in (0.0, constant):
        images = torch.cat([policy, torch.ones(rows, 1, dtype=torch.float64)], dim=1)
        texts = torch.cat([identity, torch.full((columns, 1), added, dtype=torch.float64)], dim=1)
        logps = preference_logps(
            CandidateLogps(candidate_logps(images, texts, 1.0), None),
            CandidateLogps(reference.log_softmax(-1), reference.log_softmax(-1)),
            {"chosen": chosen, "rejected": rejected},
        )
        found.append(every_loss(judged(logps), beta))
    for name, losses in found[0].items():
        torch.testing.assert_close(losses, found[1][name], rtol=1e-6, atol=1e-8)


@given(batches(), BETAS, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_changes_nothing(batch, beta, random):
    policy, reference, chosen, rejected = batch
    order = torch.tensor(random.sample(range(policy.shape[1]), policy.shape[1]))
    place = order.argsort()
    moved = (policy[:, order], reference[:, order], place[chosen], torch.where(rejected < 0, -1, place[rejected]))
    found = [every_loss(as_losses_take_them(*which), beta) for which in (batch, moved)]
    for name, losses in found[0].items():
        torch.testing.assert_close(losses, found[1][name])


@given(batches(), BETAS, st.randoms(use_true_random=False))
def test_rows_and_rejected_texts_may_come_in_any_order(batch, beta, random):
    policy, reference, chosen, rejected = batch
    rows = torch.tensor(random.sample(range(len(policy)), len(policy)))
    columns = torch.tensor(random.sample(range(rejected.shape[1]), rejected.shape[1]))
    moved = (policy[rows], reference[rows], chosen[rows], rejected[rows][:, columns])
    found = [every_loss(as_losses_take_them(*which), beta) for which in (batch, moved)]
    for name, losses in found[0].items():
        torch.testing.assert_close(losses[rows], found[1][name])


@given(batches())
def test_a_divergence_is_0_for_equals_and_else_above_and_absent_texts_don_t_count(batch):
    policy, reference, *_ = (part.log_softmax(-1) if part.is_floating_point() else part for part in batch)
    kl = kl_regularization(reference, policy)
    assert (kl >= -1e-9).all()
    assert kl_regularization(policy, policy).numpy() == pytest.approx(0, abs=1e-12)
    absent = torch.full((len(policy), 2), -math.inf, dtype=torch.float64)
    wider = [torch.cat([part, absent], dim=1).requires_grad_() for part in (reference, policy)]
    torch.testing.assert_close(kl_regularization(*wider), kl)
    kl_regularization(*wider).sum().backward()
    assert torch.isfinite(wider[1].grad).all()


@given(batches(single=True), BETAS, st.lists(st.floats(0, 4), min_size=len(OF_LOGPS), max_size=len(OF_LOGPS)))
def test_weights_scale_each_loss(batch, beta, weights):
    logps, kl = as_losses_take_them(*batch), torch.tensor(0.3, dtype=torch.float64)
    settings = LossSettings(beta=beta, label_smoothing=0.1)
    total = preference_loss(logps, OF_LOGPS, weights, settings, kl)
    apart = every_loss(logps, beta)
    torch.testing.assert_close(total, sum(w * apart[name] for w, name in zip(weights, OF_LOGPS, strict=True)))


@given(batches(), BETAS)
def test_no_gradient_is_nan_with_absent_texts(batch, beta):
    policy, reference, chosen, rejected = batch
    policy = policy.clone().requires_grad_()
    logps: PreferenceLogps = as_losses_take_them(policy, reference, chosen, rejected)
    sum(losses.sum() for losses in every_loss(logps, beta).values()).backward()
    assert torch.isfinite(policy.grad).all()
