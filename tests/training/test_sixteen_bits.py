"""Models in 16 bits: what trains is converted to float32, and no checkpoint holds weights that are not finite."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from samples import logged, make_preferences, same, weights
from tolerances import LOGPS
from transformers import CLIPModel, TrainerCallback

from clip_po.concept.transform import ConceptTransform
from clip_po.config import ContrastivePOConfig
from clip_po.training.averaging import BetaMovingAverageCallback
from clip_po.training.checkpoints import MARK

RUN = {"learning_rate": 2e-5, "max_steps": 2, "logging_steps": 1, "beta": 1.0}
NARROW = [torch.float16, torch.bfloat16]
TARGETS = r".*vision_model.*\.(q_proj|v_proj)"


def lora(**changes):
    return LoraConfig(r=2, target_modules=TARGETS, **changes)


@pytest.fixture(params=NARROW, ids=["float16", "bfloat16"])
def narrow(request, clip_folder, tmp_path):
    """A folder with the tiny CLIP in 16 bits, and its dtype. transformers loads it as it is stored."""
    folder = tmp_path / "narrow"
    CLIPModel.from_pretrained(clip_folder).to(request.param).save_pretrained(folder)
    assert CLIPModel.from_pretrained(folder).dtype == request.param
    return str(folder), request.param


def half_object(folder, dtype):
    return {"model": CLIPModel.from_pretrained(folder)}


WAYS = {
    "object": half_object,
    "name-with-dtype": lambda folder, dtype: {"model": folder, "model_init_kwargs": {"dtype": dtype}},
    "one-parameter": lambda folder, dtype: {
        "model": one_parameter(CLIPModel.from_pretrained(folder, dtype="float32"))
    },
}
HOW = {
    "full": lambda: {},
    "text": lambda: {"train_vision_model": False, "train_text_model": True, "train_logit_scale": True},
    "layers": lambda: {"trainable_layers": 1},
    "lora": lambda: {"peft_config": lora()},
    "lora-and-projection": lambda: {"peft_config": lora(modules_to_save=["visual_projection"])},
    "concept": lambda: {"concept": ConceptTransform(16)},
}


def one_parameter(model):
    model.visual_projection.half()
    return model


@pytest.mark.parametrize(
    ("way", "how"), [*(("object", how) for how in HOW), *((way, "full") for way in WAYS if way != "object")]
)
def test_a_16_bit_model_ends_as_one_given_by_name(make_trainer, narrow, processor, caplog, way, how):
    (folder, dtype), way, how = narrow, WAYS[way], HOW[how]
    trainer = make_trainer(**way(folder, dtype), **how(), processing_class=processor, folder="object")
    assert "float32" in caplog.text
    named = make_trainer(model=folder, **how(), processing_class=processor, folder="name")
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    for run in (trainer, named):
        run.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=0.02 if "concept" in how() else LOGPS)
    assert same(weights(trainer.model), weights(named.model))
    configs = [run.encoder.config.to_dict() for run in (trainer, named)]
    assert all(configs[0][tower]["dtype"] == configs[1][tower]["dtype"] for tower in ("text_config", "vision_config"))
    assert all(value.isfinite().all() for value in weights(trainer.model).values())


def test_most_weights_move(make_trainer, narrow, processor):
    trainer = make_trainer(model=CLIPModel.from_pretrained(narrow[0]), processing_class=processor)
    before = weights(trainer.model)
    trainer.train()
    trained = {
        name: p for name, p in trainer.model.named_parameters() if p.requires_grad and "k_proj.bias" not in name
    }
    moved = torch.cat([(parameter != before[name]).flatten() for name, parameter in trained.items()])
    assert moved.float().mean() > 0.99


def test_adapters_in_16_bits_train_in_float32(make_trainer, narrow, processor):
    adapted = get_peft_model(CLIPModel.from_pretrained(narrow[0]), lora(), autocast_adapter_dtype=False)
    trainer = make_trainer(model=adapted, processing_class=processor)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert isinstance(trainer.model, PeftModel)


def test_a_concept_in_16_bits_trains_in_float32(make_trainer, narrow):
    trainer = make_trainer(concept=ConceptTransform(16).to(narrow[1]))
    trainer.train()
    assert trainer.model.image_weight.dtype == torch.float32
    assert trainer.model.image_weight.isfinite().all()


def test_a_16_bit_reference_is_the_policys_start(make_trainer, narrow, processor):
    reference = CLIPModel.from_pretrained(narrow[0])
    trainer = make_trainer(model=narrow[0], ref_model=reference, processing_class=processor)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=LOGPS)


def test_a_float64_model_stays_in_float64(make_trainer, clip_folder, caplog):
    trainer = make_trainer(model=CLIPModel.from_pretrained(clip_folder, dtype=torch.float64))
    assert trainer.model.dtype == torch.float64
    assert "converted to float32" not in caplog.text


def test_it_is_said_in_one_line(make_trainer, narrow, processor, caplog):
    make_trainer(model=CLIPModel.from_pretrained(narrow[0]), processing_class=processor)
    said = [record.message for record in caplog.records if "converted to float32" in record.message]
    assert len(said) == 1
    assert "\n" not in said[0]
    assert str(narrow[1]).removeprefix("torch.") in said[0]


@pytest.mark.parametrize("name", ["fp16_full_eval", "bf16_full_eval"])
def test_an_evaluation_that_would_convert_the_trained_model_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=True"):
        ContrastivePOConfig(str(tmp_path), **{name: True})


# ---- Checkpoints


class Spoils(TrainerCallback):
    """Puts nan into a weight after a step, as an optimizer does whose eps is 0 in float16."""

    def __init__(self, step):
        self.step = step

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == self.step - 1:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            parameter.data.flatten()[0] = math.nan


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_no_checkpoint_with_nan_is_marked_whole(make_trainer, tmp_path, how):
    trainer = make_trainer(**how(), callbacks=[Spoils(2)], save_strategy="steps", save_steps=1, max_steps=3)
    with pytest.raises(FloatingPointError, match=r"step 2.*not finite.*checkpoint-1.*resume_from_checkpoint"):
        trainer.train()
    assert [mark.parent.name for mark in tmp_path.rglob(MARK)] == ["checkpoint-1"]


@pytest.mark.parametrize("callbacks", [[Spoils(2)], [Spoils(2), BetaMovingAverageCallback()]], ids=["last", "average"])
def test_a_run_whose_last_step_leaves_nan_ends_with_an_error(make_trainer, tmp_path, callbacks):
    trainer = make_trainer(make_preferences(8), callbacks=callbacks)
    with pytest.raises(FloatingPointError, match=r"step 2.*not finite.*start a new run"):
        trainer.train()


def test_the_checkpoint_before_is_not_deleted_for_one_with_nan(make_trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 4}
    trainer = make_trainer(callbacks=[Spoils(3)], **saving)
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert [mark.parent.name for mark in tmp_path.rglob(MARK)] == ["checkpoint-2"]
    resumed = make_trainer(**saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
