"""Interpolation meets both ends bit for bit; the moving average is the weighted mean, also of a resumed run."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from samples import StopAt, make_preferences, same, tiny_config, weights
from torch.distributions import Beta
from transformers import CLIPModel, TrainerCallback

from clip_po.evaluation.interpolation import interpolate
from clip_po.training.averaging import AVERAGE_FILE, BetaMovingAverageCallback

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=r".*vision_model.*\.(q_proj|v_proj)")
RUN = {"learning_rate": 1e-2, "max_steps": 6}


@pytest.fixture
def aligned(model):
    """The model with another vision tower."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.vision_model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return other


def test_interpolation_meets_both_ends_and_leaves_the_models_alone(model, aligned):
    before = weights(model), weights(aligned)
    assert same(weights(interpolate(model, aligned, 0.0)), before[0])
    assert same(weights(interpolate(model, aligned, 1.0)), before[1])
    assert same(weights(model), before[0])
    assert same(weights(aligned), before[1])


@pytest.mark.parametrize("alpha", [0.3, 0.8, -0.5, 2.0])
def test_interpolation_is_the_formula_and_keeps_equal_weights(model, aligned, alpha):
    mixed = weights(interpolate(model, aligned, alpha))
    for name, weight in weights(model).items():
        expected = (1 - alpha) * weight.double() + alpha * aligned.state_dict()[name].double()
        torch.testing.assert_close(mixed[name].double(), expected, rtol=1e-5, atol=1e-6)
    frozen = [name for name in mixed if not name.startswith("vision_model")]
    assert all(torch.equal(mixed[name], model.state_dict()[name]) for name in frozen)


def test_interpolation_of_half_precision_is_computed_in_float32(model, aligned):
    halves = copy.deepcopy(model).half(), copy.deepcopy(aligned).half()
    mixed = interpolate(*halves, 0.3)
    assert mixed.dtype == torch.float16
    for name, weight in mixed.state_dict().items():
        wide = torch.lerp(halves[0].state_dict()[name].float(), halves[1].state_dict()[name].float(), 0.3)
        assert torch.equal(weight, wide.half())
    assert interpolate(model, halves[1], 1.0).dtype == torch.float32


def test_adapters_are_merged_into_a_copy(model, clip_folder):
    trained = dataclasses.replace(LORA, init_lora_weights=False)
    adapted = get_peft_model(CLIPModel.from_pretrained(clip_folder), trained)
    before = weights(adapted)
    mixed = interpolate(model, adapted, 1.0)
    assert type(mixed) is CLIPModel
    assert same(weights(adapted), before)
    assert same(weights(mixed), weights(adapted.merge_and_unload()))
    assert not same(weights(mixed), weights(model))


def test_models_that_do_not_fit_are_refused(model, aligned):
    with pytest.raises(ValueError, match=r"patch_embedding.weight \(\(32, 3, 8, 8\) and \(32, 3, 16, 16\)\)"):
        interpolate(model, CLIPModel(tiny_config({"patch_size": 16})), 0.5)
    with pytest.raises(ValueError, match=r"vision_config.hidden_act \('quick_gelu' and 'gelu'\)"):
        interpolate(model, CLIPModel(tiny_config({"hidden_act": "gelu"})), 0.5)
    with pytest.raises(ValueError, match="alpha must be a finite number, got nan"):
        interpolate(model, aligned, float("nan"))
    with pytest.raises(TypeError, match=r"aligned must be a transformers.CLIPModel"):
        interpolate(model, model.vision_model, 0.5)


class Steps(TrainerCallback):
    """Keeps the trainable weights at the start and after each step, in the order of the steps."""

    def __init__(self):
        self.steps = []

    def _keep(self, model):
        self.steps.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    def on_train_begin(self, args, state, control, model, **kwargs):
        self._keep(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self._keep(model)


@pytest.mark.parametrize(
    ("beta", "peft_config", "accumulation"), [(0.7, None, 1), (3.0, None, 2), (0.5, LORA, 1), (1.0, LORA, 2)]
)
def test_the_average_is_the_beta_weighted_mean_of_all_steps(make_trainer, tmp_path, beta, peft_config, accumulation):
    seen = Steps()
    callbacks = [seen, BetaMovingAverageCallback(beta)]
    trainer = make_trainer(callbacks=callbacks, peft_config=peft_config, gradient_accumulation_steps=accumulation)
    before = weights(trainer.model)
    trainer.train()
    density = Beta(beta, beta).log_prob((torch.arange(7, dtype=torch.float64) + 0.5) / 7).exp()
    after = weights(trainer.model)
    assert len(seen.steps) == 7
    for name, value in after.items():
        if name in seen.steps[0]:
            steps = torch.stack([step[name].double() for step in seen.steps])
            expected = torch.tensordot(density / density.sum(), steps, dims=1)
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
            assert "k_proj.bias" in name or not torch.equal(value, seen.steps[-1][name])
        else:
            assert torch.equal(value, before[name])
    trainer.save_model(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*model.safetensors")
    for name, value in load_file(file).items():
        key = name.replace(".weight", ".default.weight") if peft_config else name
        assert torch.equal(value, after[key])


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_a_resumed_run_ends_with_the_same_average(make_trainer, peft_config):
    saving = {"save_strategy": "steps", "save_steps": 2, "peft_config": peft_config}
    whole = make_trainer(callbacks=[BetaMovingAverageCallback()], **saving, folder="whole")
    whole.train()
    stopped = make_trainer(callbacks=[BetaMovingAverageCallback(), StopAt(4)], **saving)
    stopped.train()
    resumed = make_trainer(callbacks=[BetaMovingAverageCallback()], **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert same(weights(whole.model), weights(resumed.model))
    assert not same(weights(whole.model), weights(stopped.model))

    elsewhere = f"{stopped.args.output_dir}/checkpoint-2"
    moved = make_trainer(callbacks=[BetaMovingAverageCallback()], **saving, folder="elsewhere")
    moved.train(resume_from_checkpoint=elsewhere)
    assert same(weights(whole.model), weights(moved.model))


def test_a_resume_that_would_average_something_else_is_refused(make_trainer):
    saving = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(callbacks=[BetaMovingAverageCallback(), StopAt(4)], **saving).train()
    for callback, arguments, message in (
        (BetaMovingAverageCallback(0.5), {}, "'beta': '0.7'"),
        (BetaMovingAverageCallback(), {"max_steps": 8}, "'steps': '8'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(callbacks=[callback], **saving, **arguments).train(resume_from_checkpoint=True)
    file = Path(make_trainer().args.output_dir, "checkpoint-4", AVERAGE_FILE)
    assert all(name.startswith(("vision_model", "visual_projection")) for name in load_file(file))
    file.unlink()
    with pytest.raises(FileNotFoundError, match="resume from an earlier one, resume without the callback"):
        make_trainer(callbacks=[BetaMovingAverageCallback()], **saving).train(resume_from_checkpoint=True)


def test_a_resume_that_trains_other_parameters_is_refused(make_trainer):
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    make_trainer(callbacks=[BetaMovingAverageCallback(), StopAt(2)], **saving).train()
    other = make_trainer(
        callbacks=[BetaMovingAverageCallback()], **saving, train_text_model=True, ignore_run_differences=True
    )
    with pytest.raises(ValueError, match=r"other parameters than the trained ones \(such as 'text_model"):
        other.train(resume_from_checkpoint=True)


def test_a_finished_run_that_is_resumed_keeps_its_average(make_trainer):
    """Trainer takes one step too many then; it has no weight."""
    saving = {"save_strategy": "steps", "save_steps": 6}
    whole = make_trainer(callbacks=[BetaMovingAverageCallback()], **saving)
    whole.train()
    again = make_trainer(callbacks=[BetaMovingAverageCallback()], **saving)
    again.train(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(again.model))


def test_the_best_checkpoint_and_the_average_exclude_each_other(make_trainer):
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(ValueError, match="Set load_best_model_at_end=False"):
        make_trainer(callbacks=[BetaMovingAverageCallback()], eval_dataset=make_preferences(4), **best)
    added = make_trainer(eval_dataset=make_preferences(4), **best)
    added.add_callback(BetaMovingAverageCallback())
    with pytest.raises(ValueError, match="Set load_best_model_at_end=False"):
        added.train()
    with pytest.raises(ValueError, match="beta must be a finite number > 0, got 0"):
        BetaMovingAverageCallback(0)
