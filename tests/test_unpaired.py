"""Unpaired feedback: KTO with its reference point from mismatched pairs, and what the policy chooses among."""

import datasets
import pytest
import torch
from samples import PROMPTS, logged, make_image_pairs, make_unpaired, weights
from tolerances import LOGPS, RUNS
from transformers.utils import logging

from clip_po.candidates import in_batch_candidates
from clip_po.unpaired import mismatched_kl, ratio_advice

RUN = {
    "candidate_texts": None,
    "reg_weight": 0.0,
    "loss_type": "kto",
    "learning_rate": 1e-2,
    "optim": "sgd",
    "max_steps": 4,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
}


def moved(trainer):
    """The trainer, its policy away from its reference."""
    with torch.no_grad():
        for parameter in trainer.model.vision_model.parameters():
            parameter.mul_(1.3)
    return trainer


def batch_of(trainer, indices):
    return trainer.data_collator([trainer.train_dataset[index] for index in indices])


def logratios(trainer, batch):
    with torch.no_grad():
        policy = trainer.policy(trainer.model, trainer.encoder, batch).preference
        return policy - trainer.reference(batch).preference


@pytest.mark.numeric
def test_the_loss_is_kto_with_the_mean_of_mismatched_pairs(make_trainer):
    """Row by row, by the formulas of Ethayarajh et al. 2024."""
    trainer = moved(
        make_trainer(make_unpaired(8), candidate_texts=PROMPTS, beta=0.7, desirable_weight=1.5, undesirable_weight=0.5)
    )
    rows = list(trainer.train_dataset.preferences.dataset)
    batch = batch_of(trainer, range(8))
    ratios = logratios(trainer, batch).tolist()
    place = [PROMPTS.index(row["text"]) for row in rows]
    pairs = [ratios[i][place[j]] for i in range(8) for j in range(8) if place[i] != place[j]]
    point = max(0.0, sum(pairs) / len(pairs))
    losses = []
    for row, own, ratio in zip(rows, place, ratios, strict=True):
        side = 0.7 * (ratio[own] - point) if row["label"] else 0.7 * (point - ratio[own])
        losses.append((1.5 if row["label"] else 0.5) * (1 - torch.sigmoid(torch.tensor(side)).item()))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(sum(losses) / 8, abs=10 * LOGPS)


@pytest.mark.numeric
@pytest.mark.parametrize("sign", [1, -1])
def test_the_reference_point_of_two_rows_is_that_of_trl(sign):
    """TRL pairs each image with the text of the next row: (log pi - log ref).mean().clamp(min=0)."""
    ratios = sign * torch.tensor([[0.1, 0.4, 0.9], [0.2, 0.7, -0.3]], requires_grad=True)
    batch = {"desirable": torch.tensor([1, 0]), "counted": torch.ones(2), "chosen": torch.tensor([0, 2])}
    found = mismatched_kl(ratios, batch, shared=True, total=lambda sums: sums)
    cycled = torch.stack([ratios[0, 2], ratios[1, 0]]).mean().clamp(min=0)
    assert found.item() == pytest.approx(cycled.item())
    assert not found.requires_grad


def test_padding_and_pairs_do_not_count_in_the_reference_point():
    ratios = torch.tensor([[0.1, 0.5], [0.2, 0.3], [9.0, 9.0], [9.0, 9.0]])
    batch = {
        "desirable": torch.tensor([1, 0, 1, -1]),
        "counted": torch.tensor([1.0, 1.0, 0.0, 1.0]),
        "chosen": torch.tensor([0, 1, 0, 1]),
    }
    assert mismatched_kl(ratios, batch, True, lambda sums: sums).item() == pytest.approx((0.5 + 0.2) / 2)
    same_text = {**batch, "chosen": torch.zeros(4, dtype=torch.long)}
    assert mismatched_kl(ratios, same_text, True, lambda sums: sums).item() == 0


def test_the_reference_point_of_own_candidates_is_over_the_others_of_the_row():
    ratios = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.3, float("nan")]])
    batch = {"desirable": torch.tensor([1, 0]), "counted": torch.ones(2), "chosen": torch.tensor([0, 1])}
    found = mismatched_kl(ratios, batch, False, lambda sums: sums)
    assert found.item() == pytest.approx((0.5 + 0.3 + 0.2) / 3)


CHOICES = {
    "the 4 candidate_texts": {"candidate_texts": PROMPTS},
    "the candidates of each row": {"candidates": PROMPTS},
    "in_batch_candidates=True": {},
    "the texts of the global batch.": {"in_batch_candidates": True},
}


@pytest.mark.parametrize("says", CHOICES)
def test_the_trainer_says_which_texts_the_policy_chooses_among(make_trainer, says, caplog):
    logging.enable_propagation()
    given = dict(CHOICES[says])
    rows = make_unpaired(6)
    own = given.pop("candidates", None)
    if own is not None:
        rows = rows.add_column("candidates", [own] * 6)
    trainer = make_trainer(rows, **given)
    assert says in caplog.text
    batch = batch_of(trainer, range(4))
    if trainer.args.in_batch_candidates:
        batch = in_batch_candidates(batch, trainer.candidates.identity)
    assert logratios(trainer, batch).shape == (4, 4)


@pytest.mark.numeric
def test_candidates_given_in_three_ways_train_the_same(make_trainer):
    """A batch of 8 rows holds all four texts, so that the three policies are one."""
    settings = {"loss_type": "apo_zero_unpaired", "per_device_train_batch_size": 8}
    runs = [
        make_trainer(make_unpaired(16), candidate_texts=PROMPTS, **settings),
        make_trainer(make_unpaired(16).add_column("candidates", [PROMPTS] * 16), **settings),
        make_trainer(make_unpaired(16), **settings),
    ]
    for trainer in runs:
        trainer.train()
    for other in runs[1:]:
        for name, value in weights(runs[0].model).items():
            torch.testing.assert_close(weights(other.model)[name], value, rtol=RUNS, atol=LOGPS)


@pytest.mark.numeric
@pytest.mark.parametrize("towers", [{}, {"train_text_model": True, "train_vision_model": False}])
def test_cached_embeddings_train_the_same(make_trainer, towers):
    runs = [make_trainer(make_unpaired(13), precompute_ref_log_probs=cached, **towers) for cached in (False, True)]
    for trainer in runs:
        trainer.train()
    for name, value in weights(runs[0].model).items():
        torch.testing.assert_close(weights(runs[1].model)[name], value, rtol=RUNS, atol=LOGPS)


def test_training_raises_right_texts_and_lowers_wrong_ones(make_trainer):
    settings = {"max_steps": 30, "beta": 1.0, "optim": "adamw_torch", "learning_rate": 1e-3}
    rows = make_unpaired(8)
    trainer = make_trainer(rows, candidate_texts=PROMPTS, eval_dataset=rows, per_device_train_batch_size=8, **settings)
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_rewards/chosen"] > 0.2
    assert found["eval_rewards/rejected"] < -0.2
    assert logged(trainer, "mismatched_kl")[0] == pytest.approx(0, abs=LOGPS)


def test_the_metrics_of_right_and_wrong_texts_are_means_over_their_rows(make_trainer):
    trainer = moved(make_trainer(make_unpaired(6), candidate_texts=PROMPTS, eval_dataset=make_unpaired(6), beta=2.0))
    ratios = logratios(trainer, batch := batch_of(trainer, range(6)))
    own = ratios.gather(1, batch["chosen"].unsqueeze(-1))[:, 0]
    right = batch["desirable"] == 1
    found = trainer.evaluate()
    assert found["eval_rewards/chosen"] == pytest.approx(2 * own[right].mean().item(), abs=10 * LOGPS)
    assert found["eval_rewards/rejected"] == pytest.approx(2 * own[~right].mean().item(), abs=10 * LOGPS)
    assert "eval_rewards/margins" not in found


def test_each_loss_reads_its_own_rows_of_a_mixed_run(make_trainer):
    rows = datasets.concatenate_datasets([make_unpaired(4), make_image_pairs(4)])
    both = make_trainer(rows, loss_type=["sigmoid", "kto"], in_batch_candidates=True)
    batch = batch_of(both, range(8))
    pairs = make_trainer(make_image_pairs(4), loss_type="sigmoid", in_batch_candidates=True)
    loss = both.compute_loss(both.model, batch).item()
    of_pairs = pairs.compute_loss(pairs.model, batch_of(pairs, range(4))).item()
    # The policy is its reference: 0.5 for each text of KTO, log(2) for each pair.
    assert of_pairs == pytest.approx(0.6931, abs=1e-3)
    assert loss == pytest.approx((4 * 0.5 + 4 * of_pairs) / 8, abs=1e-4)


REFUSED = {
    "no loss of unpaired rows": (lambda: make_unpaired(4), "sigmoid", "Use loss_type='kto' or 'apo_zero_unpaired'"),
    "a loss without rows": (lambda: make_unpaired(4), ["kto", "sigmoid"], r"loss_type=\['sigmoid'\] reads no row"),
    "kto of pairs": (lambda: make_image_pairs(4), "kto", "'kto_pair'"),
    "no clean image": (
        lambda: make_image_pairs(4),
        ["sigmoid", "distillation"],
        "rows of two images, which have none",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_losses_that_do_not_suit_the_rows_are_refused(make_trainer, kind):
    make, loss, says = REFUSED[kind]
    with pytest.raises(ValueError, match=says):
        make_trainer(make(), loss_type=loss)


@pytest.mark.parametrize(
    ("right", "wrong", "weights_given", "balanced"),
    [
        (10, 10, (1.0, 1.0), True),
        (10, 20, (1.0, 1.0), False),
        (10, 20, (2.0, 1.0), True),
        (10, 20, (2.66, 1.0), True),
        (10, 20, (2.9, 1.0), False),
        (20, 10, (1.0, 1.5), True),
        (20, 10, (1.0, 1.0), False),
        (0, 5, (1.0, 1.0), True),
    ],
)
def test_the_advice_is_that_of_trl(right, wrong, weights_given, balanced):
    """desirable_weight * right / (undesirable_weight * wrong) in [1, 4/3], by TRL's rounding."""
    assert (ratio_advice(right, wrong, *weights_given) == "") == balanced


def test_the_advice_names_the_range():
    said = ratio_advice(300, 100, 1.0, 1.0)
    assert "300 right and 100 wrong" in said
    assert "desirable_weight between 0.33 and 0.44" in said
    assert "undesirable_weight between 2.25 and 3.0" in said


def test_texts_of_rows_that_do_not_count_are_no_candidates(make_trainer):
    trainer = make_trainer(make_unpaired(4))
    rows = [trainer.train_dataset[index] for index in range(4)]
    rows[3]["counted"] = 0.0
    batch = in_batch_candidates(trainer.data_collator(rows), trainer.candidates.identity)
    assert batch["texts"] == PROMPTS[:3]
    assert batch["chosen"].tolist() == [0, 1, 2, 0]
    alone = in_batch_candidates(trainer.data_collator(rows[:3]), trainer.candidates.identity)
    torch.testing.assert_close(logratios(trainer, batch)[:3], logratios(trainer, alone))
