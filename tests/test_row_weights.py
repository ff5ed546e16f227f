"""Row weights scale losses: the sum of weight times loss over the number of rows, however they are batched."""

import pytest
import torch
from samples import logged, make_labelled, make_preferences, same, weights
from tolerances import LOGPS, RUNS

from clip_po.concept.transform import ConceptTransform

RUN = {"learning_rate": 0.0, "max_steps": 1, "logging_steps": 1, "lr_scheduler_type": "constant"}
WEIGHTS = [2.0, 0.5, 0.0, 1.0, 3.0, 0.0, 0.25, 1.0, 1.0, 0.0, 0.0, 0.0, 4.0]
BATCHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


def weighted(row_weights):
    """As many preferences as weights."""
    return make_preferences(len(row_weights)).add_column("weight", row_weights)


def in_order(make_trainer, row_weights, **arguments):
    """A run over the rows in their order that changes no weight of the model."""
    trainer = make_trainer(weighted(row_weights), train_sampling_strategy="sequential", **arguments)
    trainer.train()
    return trainer


@pytest.mark.numeric
def test_the_loss_is_the_sum_of_weight_times_loss_over_the_number_of_rows(make_trainer):
    trainer = make_trainer(weighted(WEIGHTS), reg_weight=0.5, loss_type="sft")
    rows = [trainer.train_dataset[number] for number in range(len(WEIGHTS))]
    alone = [trainer.compute_loss(trainer.model, trainer.data_collator([{**row, "weight": 1.0}])) for row in rows]
    together = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    # The policy is its reference, so that the KL is 0 and a loss is that of the preference.
    expected = sum(weight * loss.item() for weight, loss in zip(WEIGHTS, alone, strict=True)) / len(WEIGHTS)
    assert together.item() == pytest.approx(expected, abs=10 * LOGPS)


@pytest.mark.numeric
@pytest.mark.parametrize("batch_size", [1, 4, 13])
@pytest.mark.parametrize("factor", [0.25, 3.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "kto_pair", "distillation"])
def test_a_uniform_weight_scales_loss_and_gradient(make_trainer, batch_size, factor, loss_type):
    run = {"per_device_train_batch_size": batch_size, "loss_type": loss_type, "reg_weight": 0.0, "max_grad_norm": 0.0}
    one, scaled = (
        in_order(make_trainer, [weight] * 13, reg_dataset=make_labelled(13), **run) for weight in (1.0, factor)
    )
    for name in ("loss", "loss/preference", "grad_norm"):
        assert logged(scaled, name)[0] == pytest.approx(factor * logged(one, name)[0], rel=RUNS, abs=LOGPS), name
    assert logged(scaled, "logps/chosen") == pytest.approx(logged(one, "logps/chosen"), abs=LOGPS)


@pytest.mark.numeric
def test_weights_shift_the_balance_with_the_kl(make_trainer):
    light, heavy = (in_order(make_trainer, [weight] * 4, loss_type="sft") for weight in (0.5, 2.0))
    assert logged(heavy, "loss/preference")[0] == pytest.approx(4 * logged(light, "loss/preference")[0], rel=RUNS)
    assert logged(heavy, "loss/regularization")[0] == pytest.approx(logged(light, "loss/regularization")[0], abs=LOGPS)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["model", "concept"])
def test_every_batch_size_and_accumulation_trains_the_same_on_weighted_rows(make_trainer, kind):
    """13 rows: steps of 8 and of 5, the rest of which is padding that does not count."""
    runs = []
    for size, accumulation in BATCHES:
        trainer = make_trainer(
            weighted(WEIGHTS),
            concept=ConceptTransform(16) if kind == "concept" else None,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
            optim="sgd",
            learning_rate=1e-2,
        )
        trainer.train()
        runs.append((weights(trainer.model), trainer.state.log_history))
    (first, first_logs), *others = runs
    for other, logs in others:
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, rtol=RUNS, atol=LOGPS)
        for one, two in zip(first_logs[:-1], logs[:-1], strict=True):
            for name in ("loss", "loss/preference", "loss/regularization", "logps/chosen", "rewards/margins"):
                assert two[name] == pytest.approx(one[name], rel=RUNS, abs=LOGPS), name


@pytest.mark.numeric
@pytest.mark.parametrize("batch_size", [1, 5, 13])
def test_an_evaluation_counts_weights_as_a_training_does_at_every_batch_size(make_trainer, batch_size):
    rows = weighted(WEIGHTS)
    found = make_trainer(rows, eval_dataset=rows, per_device_eval_batch_size=batch_size, loss_type="sft").evaluate()
    trained = in_order(make_trainer, WEIGHTS, per_device_train_batch_size=13, loss_type="sft")
    for name in ("loss", "loss/preference", "logps/chosen"):
        assert found[f"eval_{name}"] == pytest.approx(logged(trained, name)[0], abs=10 * LOGPS), name


@pytest.mark.numeric
def test_padding_and_skipped_rows_are_no_rows(make_trainer):
    """4 rows in batches of 3: the second batch holds one row and two that repeat others."""
    short = in_order(make_trainer, [2.0] * 4, per_device_train_batch_size=3, max_steps=2, loss_type="sft")
    for name in ("loss", "loss/preference"):
        assert logged(short, name)[1] == pytest.approx(-2 * logged(short, "logps/chosen")[1], abs=10 * LOGPS), name


@pytest.mark.numeric
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 1), (1, 2)])
def test_a_step_of_rows_of_weight_0_pulls_no_logged_mean(make_trainer, batch_size, accumulation):
    run = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation, "loss_type": "sft"}
    rows = batch_size * accumulation
    nothing = [1.0] * rows + [0.0] * rows
    pulled = in_order(make_trainer, nothing, max_steps=2, logging_steps=2, **run)
    plain = in_order(make_trainer, nothing, max_steps=1, logging_steps=1, **run)
    for name in ("loss", "loss/preference", "logps/chosen", "logps/rejected", "kl"):
        assert logged(pulled, name)[0] == pytest.approx(logged(plain, name)[0], abs=LOGPS), name


def test_a_run_of_rows_of_weight_0_trains_the_regularization_alone(make_trainer):
    trainer = in_order(make_trainer, [0.0] * 4, learning_rate=1e-2, optim="sgd", max_steps=2)
    assert logged(trainer, "loss") == pytest.approx(logged(trainer, "loss/regularization"), abs=LOGPS)
    assert logged(trainer, "loss/preference") == []


def test_a_row_of_weight_0_is_the_same_as_one_whose_loss_is_left_out(make_trainer):
    """At batch 1, its step changes nothing if the KL has no weight."""
    settings = {"learning_rate": 1e-2, "optim": "sgd", "reg_weight": 0.0, "per_device_train_batch_size": 1}
    longer = in_order(make_trainer, [1.0, 0.0], max_steps=2, **settings)
    shorter = in_order(make_trainer, [1.0, 0.0], max_steps=1, **settings)
    assert same(weights(longer.model), weights(shorter.model))


@pytest.mark.numeric
def test_a_weight_has_an_effect_at_batch_1(make_trainer):
    """The steps of plain SGD are proportional to the weights of the rows."""
    settings = {"learning_rate": 1e-3, "optim": "sgd", "reg_weight": 0.0, "max_grad_norm": 0.0}
    moved = []
    for weight in (1.0, 0.25):
        trainer = make_trainer(weighted([weight]), per_device_train_batch_size=1, **settings)
        before = weights(trainer.model)
        trainer.train()
        moved.append({name: value - before[name] for name, value in weights(trainer.model).items()})
    for name, step in moved[0].items():
        torch.testing.assert_close(moved[1][name], 0.25 * step, rtol=RUNS, atol=1e-7)
    assert any(step.abs().max() > 1e-5 for step in moved[0].values())
