"""Metrics: DPOTrainer's names, and means over rows."""

import pytest
import torch
from samples import logged, make_preferences

from clip_po.data.digits import MODEL_PATH
from clip_po.losses import PreferenceLogps
from clip_po.metrics import RunningMeans, loss_of_parts, preference_metrics

NOTHING = -torch.inf
RUN = {"logging_steps": 1}


def metrics(chosen, rejected, ref_chosen=None, ref_rejected=None, weight=None, beta=1.0):
    chosen, rejected = torch.tensor(chosen), torch.tensor(rejected)
    logps = PreferenceLogps(
        chosen,
        rejected,
        torch.tensor(ref_chosen) if ref_chosen else torch.zeros_like(chosen),
        torch.tensor(ref_rejected) if ref_rejected else torch.zeros_like(rejected),
    )
    weight = torch.tensor(weight) if weight else torch.ones_like(chosen)
    return preference_metrics(logps, beta, weight)


def means(*batches):
    running = RunningMeans()
    for batch in batches:
        running.add(batch)
    return running.pop(lambda sums: sums)


def test_names_are_those_of_dpotrainer():
    assert set(metrics([-1.0], [[-2.0]])) == {
        "logps/chosen",
        "logps/rejected",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
    }


def test_reward_is_beta_times_the_log_ratio():
    found = means(metrics([-1.0], [[-2.0]], ref_chosen=[-1.5], ref_rejected=[[-1.0]], beta=0.5))
    assert found["rewards/chosen"] == 0.25
    assert found["rewards/rejected"] == -0.5
    assert found["rewards/margins"] == 0.75
    assert found["logps/chosen"] == -1.0
    assert found["logps/rejected"] == -2.0


def test_of_several_rejected_texts_the_mean_is_taken_over_those_present():
    found = means(metrics([-1.0], [[-2.0, -4.0, NOTHING]]))
    assert found["rewards/rejected"] == found["logps/rejected"] == -3.0
    assert found["rewards/margins"] == 2.0


@pytest.mark.parametrize(
    ("rejected", "accurate"), [([-2.0, -3.0], 1.0), ([-0.5, -9.0], 0.0), ([-2.0, NOTHING], 1.0), ([-1.0, -2.0], 0.0)]
)
def test_a_row_is_accurate_where_the_chosen_text_is_above_every_rejected_one(rejected, accurate):
    assert means(metrics([-1.0], [rejected]))["rewards/accuracies"] == accurate


@pytest.mark.parametrize("beta", [0.01, 1.0])
@pytest.mark.parametrize(("margin", "accurate"), [(-1e-5, 0.0), (0.0, 0.0), (1e-6, 0.0), (3e-5, 0.0), (1e-3, 1.0)])
def test_a_tie_is_no_win_and_neither_is_rounding(margin, accurate, beta):
    """At the first step, log-ratios are 0 but for the rounding of log-probabilities up to 100."""
    found = metrics([-1.0 + margin], [[-2.0]], ref_chosen=[-1.0], ref_rejected=[[-2.0]], beta=beta)
    assert means(found)["rewards/accuracies"] == accurate


def test_rows_without_rejected_texts_count_only_for_the_chosen():
    found = means(metrics([-1.0, -3.0], [[-2.0], [NOTHING]]))
    assert found["rewards/chosen"] == -2.0
    assert found["rewards/rejected"] == -2.0
    assert found["rewards/margins"] == 1.0
    assert found["rewards/accuracies"] == 1.0


def test_names_without_a_row_are_left_out():
    assert set(means(metrics([-1.0], [[NOTHING]]))) == {"logps/chosen", "rewards/chosen"}


def test_the_loss_is_the_sum_of_its_parts():
    means = {"loss/preference": 0.5, "logps/chosen": -2.0, "loss/regularization": 0.25, "loss/penalty": 1.0}
    assert loss_of_parts(means) == 1.75
    assert loss_of_parts({"kl": 1.0}) == 0


def test_padding_does_not_count():
    assert means(metrics([-1.0, -9.0], [[-2.0], [-0.1]], weight=[1.0, 0.0])) == means(metrics([-1.0], [[-2.0]]))


def test_means_are_over_rows_and_not_over_batches():
    whole = metrics([-1.0, -2.0, -6.0], [[-2.0], [-1.0], [-3.0]])
    parts = [
        {name: (value[cut], weight[cut]) for name, (value, weight) in whole.items()}
        for cut in (slice(0, 2), slice(2, 3))
    ]
    assert means(*parts) == means(whole)
    assert means(whole)["logps/chosen"] == -3.0


def test_metrics_hold_no_graph():
    chosen = torch.tensor([-1.0], requires_grad=True)
    logps = PreferenceLogps(chosen, chosen.unsqueeze(-1) - 1, torch.zeros(1), torch.zeros(1, 1))
    found = preference_metrics(logps, 1.0, torch.ones(1))
    assert not any(value.requires_grad for value, _ in found.values())


def test_popping_forgets():
    running = RunningMeans()
    running.add(metrics([-1.0], [[-2.0]]))
    running.pop(lambda sums: sums)
    assert running.pop(lambda sums: sums) == {}
    running.add(metrics([-5.0], [[-2.0]]))
    assert running.pop(lambda sums: sums)["logps/chosen"] == -5.0


def test_processes_are_summed_before_the_division():
    running = RunningMeans()
    running.add({"kl": (torch.tensor([1.0, 2.0]), torch.ones(2))})
    of_the_other = torch.tensor([[9.0, 1.0]], dtype=torch.float64)
    assert running.pop(lambda sums: sums + of_the_other) == {"kl": 4.0}


def test_many_small_rows_lose_no_digits():
    running = RunningMeans()
    running.add({"kl": (torch.tensor([1e8]), torch.ones(1))})
    for _ in range(100):
        running.add({"kl": (torch.tensor([1.0]), torch.ones(1))})
    assert running.pop(lambda sums: sums)["kl"] == (1e8 + 100) / 101


def test_no_preference_is_won_before_the_first_step(make_trainer):
    """The embedded model: its policy and reference see batches of other sizes, so that their last bits differ."""
    trainer = make_trainer(make_preferences(24), model=MODEL_PATH, per_device_train_batch_size=24, max_steps=1)
    trainer.train()
    assert logged(trainer, "rewards/accuracies") == [0.0]
