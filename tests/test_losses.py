"""Losses equal the published ones: values and gradients, to 1e-9 in float64.

The case files are read from the folder named by CLIP_PO_LOSS_CASES, else from tests/loss_cases.
"""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

from clip_po.losses import (
    LOSSES,
    SINGLE_REJECTED,
    LossSettings,
    PreferenceLogps,
    distillation_loss,
    ipo_loss,
    kl_regularization,
    kto_pair_loss,
    preference_loss,
    sigmoid_loss,
)

FOLDER = Path(os.environ.get("CLIP_PO_LOSS_CASES") or Path(__file__).parent / "loss_cases")
CASES = [
    pytest.param(case, id=f"{path.stem}-{number}-{case['kind']}")
    for path in sorted(FOLDER.glob("*.json"))
    for number, case in enumerate(json.loads(path.read_text())["cases"])
]
NAMES = {"dpo": "sigmoid", "ipo": "ipo", "kto": "kto_pair", "ce": "sft"}


def logps_of(case, policy, typographic):
    """Chosen and rejected log-probabilities of a case, as the trainer hands them to the losses."""
    chosen = torch.tensor(case["true"]).unsqueeze(-1)
    rejected = torch.tensor(case["typographic"]).unsqueeze(-1)
    ref = torch.tensor(case["reference_logits_typographic"], dtype=torch.float64).log_softmax(-1)
    policy = policy.log_softmax(-1)
    if case["params"].get("reference_free"):
        ref = torch.zeros_like(ref)
    return PreferenceLogps(
        policy.gather(-1, chosen).squeeze(-1),
        policy.gather(-1, rejected),
        ref.gather(-1, chosen).squeeze(-1),
        ref.gather(-1, rejected),
    )


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_published_ones(case):
    params = case["params"]
    clean, typographic = (
        torch.tensor(case[f"policy_logits_{name}"], dtype=torch.float64, requires_grad=True)
        for name in ("clean", "typographic")
    )
    ref_clean = torch.tensor(case["reference_logits_clean"], dtype=torch.float64).log_softmax(-1)
    kl = kl_regularization(ref_clean, clean.log_softmax(-1)).mean()
    settings = LossSettings(**{k: v for k, v in params.items() if k in LossSettings.__dataclass_fields__})
    losses = preference_loss(logps_of(case, typographic, typographic), [NAMES[case["kind"]]], [1.0], settings, kl)
    loss = losses.mean() + params["lambda_"] * kl
    loss.backward()

    assert loss.item() == pytest.approx(case["loss"], rel=1e-9, abs=1e-9)
    for tensor, name in ((clean, "clean"), (typographic, "typographic")):
        expected = torch.tensor(case[f"grad_{name}"], dtype=torch.float64)
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-9, atol=1e-9)


def random_logps(rejected=1, rows=5, seed=0):
    """Log-probabilities over `rejected` + 2 candidates, of which the first is chosen; leaves that take gradients."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (
        torch.randn(rows, rejected + 2, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2)
    )
    chosen, others = policy[:, 0].clone().requires_grad_(), policy[:, 1:-1].clone().requires_grad_()
    return PreferenceLogps(chosen, others, reference[:, 0], reference[:, 1:-1])


def with_absent(logps):
    """The same with a column of absent texts."""

    def absent(value):
        return torch.full((len(logps.chosen), 1), value, dtype=torch.float64)

    return PreferenceLogps(
        logps.chosen,
        torch.cat([logps.rejected, absent(-torch.inf)], dim=-1),
        logps.ref_chosen,
        torch.cat([logps.ref_rejected, absent(-3.0)], dim=-1),
    )


def test_s_dpo_with_one_rejected_text_is_dpo():
    logps, beta = random_logps(), 0.7
    margin = (logps.chosen - logps.ref_chosen) - (logps.rejected - logps.ref_rejected).squeeze(-1)
    found = sigmoid_loss(logps.chosen_logratios, logps.rejected_logratios, beta)
    torch.testing.assert_close(found, -torch.log(1 / (1 + torch.exp(-beta * margin))))


def test_s_dpo_is_the_softmax_of_the_chosen_among_all_rejected_texts():
    logps, beta = random_logps(rejected=3), 0.7
    ratios = torch.cat([logps.chosen_logratios.unsqueeze(-1), logps.rejected_logratios], dim=-1)
    found = sigmoid_loss(logps.chosen_logratios, logps.rejected_logratios, beta)
    torch.testing.assert_close(found, -(beta * ratios).log_softmax(-1)[:, 0])


def test_smoothed_labels_are_turned_round_by_their_share():
    logps = random_logps()
    chosen, rejected = logps.chosen_logratios, logps.rejected_logratios
    turned = sigmoid_loss(rejected.squeeze(-1), chosen.unsqueeze(-1), 0.7)
    found = sigmoid_loss(chosen, rejected, 0.7, label_smoothing=0.2)
    torch.testing.assert_close(found, 0.8 * sigmoid_loss(chosen, rejected, 0.7) + 0.2 * turned)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_an_absent_rejected_text_changes_neither_loss_nor_gradients(label_smoothing):
    settings = LossSettings(beta=0.5, label_smoothing=label_smoothing)
    found = []
    for change in (lambda logps: logps, with_absent):
        logps = random_logps(rejected=2)
        losses = preference_loss(change(logps), ["sigmoid"], [1.0], settings)
        losses.sum().backward()
        found.append((losses.detach(), logps.chosen.grad, logps.rejected.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
        assert other.isfinite().all()


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("gap", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_values_and_gradients_are_finite_however_far_the_policy_went(loss_type, gap):
    chosen = torch.tensor([-1.0 + min(gap, 0)], requires_grad=True)
    rejected = torch.tensor([[-1.0 - max(gap, 0)]], requires_grad=True)
    logps = PreferenceLogps(
        chosen,
        rejected,
        torch.tensor([-1.0]),
        torch.tensor([[-1.0]]),
        candidates=torch.cat([chosen.unsqueeze(-1), rejected], dim=-1),
        target=torch.tensor([[0.9, 0.1]]).log(),
        embeds=torch.cat([chosen.unsqueeze(-1), rejected], dim=-1),
        target_embeds=torch.tensor([[0.6, -0.8]]),
        desirable=torch.tensor([1]),
        mismatched_kl=torch.tensor(0.2),
    )
    settings = LossSettings(beta=1.0, label_smoothing=1e-3)
    losses = preference_loss(logps, [loss_type], [1.0], settings, torch.tensor(0.1))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad is None or rejected.grad.isfinite().all()


@pytest.mark.parametrize("loss_type", sorted(SINGLE_REJECTED))
def test_pairwise_losses_refuse_two_rejected_texts(loss_type):
    with pytest.raises(ValueError) as error:
        preference_loss(random_logps(rejected=2), [loss_type], [1.0], LossSettings(), torch.tensor(0.0))
    for part in (f"loss_type='{loss_type}'", "up to 2", "one rejected text a row", "loss_type='sigmoid' (S-DPO)"):
        assert part in str(error.value)


def test_kto_needs_its_reference_point():
    with pytest.raises(ValueError, match=r"kto_pair.*reg_dataset.*clean_image"):
        preference_loss(random_logps(), ["kto_pair"], [1.0], LossSettings())


def test_no_gradient_flows_through_ktos_reference_point():
    kl, logps = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), random_logps()
    kto_pair_loss(logps.chosen_logratios, logps.rejected_logratios, kl, 0.7).sum().backward()
    assert kl.grad is None
    assert logps.chosen.grad.abs().min() > 0


def test_ktos_weights_scale_their_own_texts():
    chosen, rejected, kl = torch.tensor([0.4]), torch.tensor([[0.2]]), torch.tensor(0.1)
    only_chosen = kto_pair_loss(chosen, rejected, kl, 0.7, 2.0, 0.0)
    only_rejected = kto_pair_loss(chosen, rejected, kl, 0.7, 0.0, 3.0)
    torch.testing.assert_close(only_chosen, 1 - torch.sigmoid(0.7 * (chosen - kl)))
    torch.testing.assert_close(only_rejected, 1.5 * (1 - torch.sigmoid(0.7 * (kl - rejected[:, 0]))))


def test_ipo_is_zero_at_its_target_margin():
    assert ipo_loss(torch.tensor([3.0]), torch.tensor([[-2.0]]), beta=0.1).item() == 0


def test_sft_reads_no_rejected_text():
    logps = random_logps()
    absent = PreferenceLogps(logps.chosen, logps.rejected.detach() - torch.inf, logps.ref_chosen, logps.ref_rejected)
    torch.testing.assert_close(preference_loss(absent, ["sft"], [1.0], LossSettings()), -logps.chosen)


def test_distillation_draws_the_answers_on_the_attacked_image_to_those_on_the_clean_one():
    target = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    logps = PreferenceLogps(*[torch.zeros(1)] * 4, candidates=logits.log_softmax(-1), target=target)
    losses = preference_loss(logps, ["distillation"], [1.0], LossSettings())
    losses.sum().backward()
    torch.testing.assert_close(losses, distillation_loss(target, torch.full((1, 3), 1 / 3).double().log()))
    # The gradient of KL(target || softmax) by the logits: what the policy says too much of.
    torch.testing.assert_close(logits.grad, 1 / 3 - target.exp())
    assert distillation_loss(target, target).item() == 0


def test_distillation_needs_the_clean_image():
    with pytest.raises(ValueError, match=r"distillation.*clean_image"):
        preference_loss(random_logps(), ["distillation"], [1.0], LossSettings())


def test_losses_are_summed_with_their_weights():
    logps, settings = random_logps(), LossSettings(beta=0.4)
    sigmoid, sft = (preference_loss(logps, [name], [1.0], settings) for name in ("sigmoid", "sft"))
    torch.testing.assert_close(
        preference_loss(logps, ["sigmoid", "sft"], [0.5, 2.0], settings), 0.5 * sigmoid + 2 * sft
    )


def test_kl_is_0_at_equality_and_positive_elsewhere():
    first, second = (torch.randn(2, 6, 5, dtype=torch.float64).log_softmax(-1)).unbind()
    assert kl_regularization(first, first).tolist() == [0.0] * 6
    assert (kl_regularization(first, second) > 0).all()


def test_kl_is_taken_under_the_reference():
    reference, policy = (torch.tensor([[p, 1 - p]], dtype=torch.float64).log() for p in (0.9, 0.5))
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert kl_regularization(reference, policy).item() == pytest.approx(expected)


def test_kl_ignores_absent_candidates_and_keeps_gradients_finite():
    reference = torch.tensor([[0.2, 1.0, -0.5]], dtype=torch.float64).log_softmax(-1)
    logits = torch.tensor([[0.3, -1.0, 0.1, 7.0]], dtype=torch.float64, requires_grad=True)
    padded = torch.cat([reference, torch.full((1, 1), -torch.inf, dtype=torch.float64)], dim=-1)
    policy = logits.masked_fill(padded.isneginf(), -torch.inf).log_softmax(-1)
    found = kl_regularization(padded, policy)
    found.sum().backward()
    torch.testing.assert_close(found, kl_regularization(reference, logits[:, :3].log_softmax(-1)))
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 3] == 0


PAGE = Path(__file__).parents[1] / "docs" / "losses.md"


def test_the_page_lists_every_loss_with_what_it_reads():
    section = PAGE.read_text().split("\n## Table\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", section, re.MULTILINE)
    documented = {name: set(re.findall(r"`(\w+)`", reads)) for name, reads in rows}
    documented["sigmoid_norm"] = documented["sigmoid"]  # "as `sigmoid`"
    assert documented == {name: set(loss.settings | loss.columns) for name, loss in LOSSES.items()}
