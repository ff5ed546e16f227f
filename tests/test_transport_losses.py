"""The losses that sort the rows of a batch: against plain loops, and what does not enter the order."""

import dataclasses

import pytest
import torch

from clip_po.losses import LossSettings, PreferenceLogps, aot_loss, preference_loss, sigmoid_loss

BETA, SMOOTHING = 0.6, 0.1
SETTINGS = LossSettings(beta=BETA, label_smoothing=SMOOTHING)
BOTH = ["aot", "aot_unpaired"]


def random_logps(rows=7, seed=0):
    """Log-probabilities with gradients: chosen [B], rejected [B, 1], and the reference's."""
    generator = torch.Generator().manual_seed(seed)
    values = 2 * torch.randn(4, rows, generator=generator, dtype=torch.float64)
    chosen, rejected = values[0].clone().requires_grad_(), values[1].unsqueeze(-1).clone().requires_grad_()
    return PreferenceLogps(chosen, rejected, values[2], values[3].unsqueeze(-1))


def rows_of(logps, kept):
    parts = {f.name: getattr(logps, f.name) for f in dataclasses.fields(logps)}
    return PreferenceLogps(**{name: None if part is None else part[kept] for name, part in parts.items()})


def compared(logps):
    """What each loss sorts, by name: two lists."""
    rejected, ref_rejected = logps.rejected.squeeze(-1), logps.ref_rejected.squeeze(-1)
    return {
        "aot": (logps.chosen - rejected, logps.ref_chosen - ref_rejected),
        "aot_unpaired": (logps.chosen - logps.ref_chosen, rejected - ref_rejected),
    }


def expected(logps, loss_type):
    """The mean over ranks of the smoothed logistic loss of the differences of sorted values, in plain Python."""
    upper, lower = (sorted(part.tolist()) for part in compared(logps)[loss_type])
    margins = torch.tensor([BETA * (high - low) for high, low in zip(upper, lower, strict=True)], dtype=torch.float64)
    right, wrong = 1 / (1 + torch.exp(-margins)), 1 / (1 + torch.exp(margins))
    return (-(1 - SMOOTHING) * right.log() - SMOOTHING * wrong.log()).mean().item()


@pytest.mark.parametrize("loss_type", BOTH)
def test_the_mean_is_that_over_sorted_values(loss_type):
    logps = random_logps()
    losses = preference_loss(logps, [loss_type], [1.0], SETTINGS)
    assert losses.mean().item() == pytest.approx(expected(logps, loss_type), rel=1e-12)


@pytest.mark.parametrize("loss_type", BOTH)
def test_the_loss_of_a_row_follows_the_row(loss_type):
    logps, order = random_logps(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    losses, moved = (preference_loss(part, [loss_type], [1.0], SETTINGS) for part in (logps, rows_of(logps, order)))
    torch.testing.assert_close(moved, losses[order])


@pytest.mark.parametrize("mask", ["counted", "labelled"])
@pytest.mark.parametrize("loss_type", BOTH)
def test_rows_that_do_not_count_change_nothing(loss_type, mask):
    """Values beyond all others, which would move the ranks."""
    logps = random_logps()
    counted = torch.tensor([True, False, True, True, False, True, True])
    shifted = torch.where(counted, logps.chosen, logps.chosen.detach() - 100)
    full = dataclasses.replace(logps, chosen=shifted, **{mask: counted})
    losses = preference_loss(full, [loss_type], [1.0], SETTINGS)
    alone = preference_loss(rows_of(logps, counted), [loss_type], [1.0], SETTINGS)
    torch.testing.assert_close(losses[counted], alone)
    found, *_ = torch.autograd.grad((losses * counted).sum(), logps.chosen)
    wanted, *_ = torch.autograd.grad(alone.sum(), logps.chosen)
    torch.testing.assert_close(found, wanted)


def test_a_single_row_is_dpo():
    logps = random_logps(rows=1)
    dpo = sigmoid_loss(logps.chosen_logratios, logps.rejected_logratios, BETA, SMOOTHING)
    for loss_type in BOTH:
        torch.testing.assert_close(preference_loss(logps, [loss_type], [1.0], SETTINGS), dpo)


def test_policy_and_reference_may_agree_on_other_rows():
    """The same preferences with the same strengths, in another order of rows: the distributions are equal."""
    strengths = torch.tensor([0.5, -1.0, 2.0])
    losses = aot_loss(strengths, strengths[[2, 0, 1]], BETA)
    torch.testing.assert_close(losses, torch.full((3,), 2.0).log())


def test_gradients_reach_both_texts_of_all_rows():
    logps = random_logps()
    preference_loss(logps, ["aot_unpaired"], [1.0], SETTINGS).sum().backward()
    assert (logps.chosen.grad < 0).all()
    assert (logps.rejected.grad > 0).all()
