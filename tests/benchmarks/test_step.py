"""What makes a step cheap, as behaviour and not as time; and that the straight step computes the same."""

import importlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from samples import PROMPTS, make_preferences, tiny_config
from tolerances import LOGPS, RUNS, largest, rounding
from transformers import CLIPModel

RUN = {"train_dataset": make_preferences(4)}


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.numeric
def test_the_straight_step_has_the_loss_and_gradients_of_the_trainer(make_trainer, model, processor, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    baseline = importlib.import_module("baseline")
    torch.manual_seed(1)
    other = CLIPModel(tiny_config())  # else both policies start equal, and every log-ratio is 0
    straight = baseline.StraightStep(model, processor, PROMPTS, beta=0.1)
    straight.reference.load_state_dict(other.state_dict())
    trainer = make_trainer(model=CLIPModel.from_pretrained(model.config.name_or_path), ref_model=other)
    batch = batch_of(trainer)
    theirs, ours = straight.loss(batch), trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LOGPS)
    theirs.backward()
    ours.backward()
    straights = gradients(straight.model)
    assert any(name.startswith("text_model") for name in straights)
    assert gradients(trainer.model)
    error = rounding(scale=largest(straights.values()))
    for name, gradient in gradients(trainer.model).items():
        torch.testing.assert_close(gradient, straights[name], rtol=RUNS, atol=error, msg=name)


def test_below_the_first_adapter_no_graph_is_built(make_trainer, model):
    last = LoraConfig(r=2, target_modules=r".*vision_model.*\.layers\.1\..*\.(q_proj|v_proj)")
    trainer = make_trainer(model=model, peft_config=last)
    tower = trainer.encoder.vision_model
    graph = {}
    for name, block in {
        "embeddings": tower.embeddings,
        0: tower.encoder.layers[0],
        1: tower.encoder.layers[1],
    }.items():
        block.register_forward_hook(lambda module, inputs, out, name=name: graph.__setitem__(name, out.requires_grad))
    trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    assert graph == {"embeddings": False, 0: False, 1: True}


def test_a_step_runs_the_tower_once_and_neither_the_reference_nor_the_texts(make_trainer, model):
    trainer = make_trainer(model=model)
    batch = batch_of(trainer)
    trainer.compute_loss(trainer.model, batch)  # encodes the texts
    rows = {"policy": [], "reference": [], "texts": []}
    towers = {
        "policy": trainer.encoder.vision_model,
        "reference": trainer.reference.model.vision_model,
        "texts": trainer.encoder.text_model,
    }
    for name, tower in towers.items():
        tower.embeddings.register_forward_hook(lambda module, args, out, name=name: rows[name].append(len(out)))
    trainer.compute_loss(trainer.model, batch).backward()
    assert rows == {"policy": [8], "reference": [], "texts": [1]}
    assert trainer.encoder.text_model.embeddings.token_embedding.weight.grad is None
