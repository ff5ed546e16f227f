"""`model_init` and hyperparameter search: each training starts from the initial model, with a reference of its own."""

import pytest
import torch
from peft import LoraConfig
from samples import PROMPTS, logged, make_preferences, run_config, same, weights
from transformers import CLIPModel

from clip_po.trainer import ContrastivePOTrainer

VISION = r".*vision_model.*\.(q_proj|v_proj)"


@pytest.fixture
def make(clip_folder, tmp_path):
    def make(model_init=None, peft_config=None, **arguments):
        settings = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, **arguments}
        return ContrastivePOTrainer(
            model_init=model_init or (lambda: CLIPModel.from_pretrained(clip_folder)),
            args=run_config(tmp_path / "run", **settings),
            train_dataset=make_preferences(8),
            eval_dataset=make_preferences(4),
            candidate_texts=PROMPTS,
            peft_config=peft_config,
        )

    return make


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=VISION)], ids=["full", "lora"])
def test_a_second_training_is_the_first_again(peft_config, make, clip_folder):
    run = make(peft_config=peft_config)
    run.train()
    first, losses = weights(run.model), logged(run, "loss")
    assert losses[0] == pytest.approx(0.693147, abs=1e-4)
    run.train()
    assert logged(run, "loss") == losses
    assert same(weights(run.model), first)
    initial = CLIPModel.from_pretrained(clip_folder)
    if peft_config is None:
        assert same(weights(run.reference.model), weights(initial))
        assert not same(weights(run.model), weights(initial))


def test_the_reference_belongs_to_the_model_of_each_training(make, clip_folder):
    seeds = iter([1, 1, 2])

    def other_model():
        torch.manual_seed(next(seeds))
        return CLIPModel(CLIPModel.from_pretrained(clip_folder).config)

    run = make(other_model)
    for _ in range(2):
        run.train()
        assert logged(run, "kl")[0] == pytest.approx(0, abs=1e-5)
        assert logged(run, "loss")[0] == pytest.approx(0.693147, abs=1e-4)


def test_each_training_reads_the_arguments_as_they_are_then(make):
    run = make()
    losses = []
    for beta in (0.1, 5.0, 0.1):  # as a search sets them
        run.args.beta = beta
        run.train()
        losses.append(run.evaluate()["eval_loss"])
    assert losses[0] == losses[2] != losses[1]


def test_a_hyperparameter_search_trains_every_trial_from_the_initial_model(make):
    pytest.importorskip("optuna")
    run = make(save_strategy="no")
    best = run.hyperparameter_search(
        hp_space=lambda trial: {"beta": trial.suggest_float("beta", 0.1, 1.0)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=2,
        backend="optuna",
    )
    assert best.objective > 0


def test_trials_that_would_save_checkpoints_are_refused(make):
    run = make(save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=r"Set save_strategy='no'"):
        run.train(trial={"beta": 0.5})
