"""A reference that follows the policy: where it is after each step, what is computed with it, and after a resume."""

import copy
import math
from types import SimpleNamespace

import pytest
import samples
import torch
from dual_encoders import tiny_dual_encoder
from peft import LoraConfig
from samples import (
    PROMPTS,
    StopAt,
    logged,
    make_image_pairs,
    make_labelled,
    make_preferences,
    make_trainer,
    make_unpaired,
    same,
    weights,
)
from transformers import CLIPModel, TrainerCallback
from trl import SyncRefModelCallback

from clip_po.concept.transform import ConceptTransform
from clip_po.encoding import encode_images, encode_texts
from clip_po.training.reference_sync import REFERENCE_FILE, ReferenceSyncCallback

EVERYTHING = {"train_text_model": True, "train_logit_scale": True}
RUN = {
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.7,
    "ref_model_sync_steps": 2,
    "learning_rate": 1e-3,
    "max_steps": 5,
    "logging_steps": 1,
    "reg_dataset": make_labelled(5),
}


class Policies(TrainerCallback):
    """Keeps a copy of the policy after each step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append(copy.deepcopy(model))


@pytest.mark.parametrize("trained", [{}, EVERYTHING], ids=["vision", "everything"])
def test_the_reference_is_where_trls_callback_moves_a_copy(trained, clip_folder, tmp_path):
    policies, expected = Policies(), CLIPModel.from_pretrained(clip_folder)
    first = copy.deepcopy(expected)
    trainer = make_trainer(clip_folder, tmp_path, callbacks=[policies], **RUN, **trained)
    trainer.train()
    for step in (1, 3):
        SyncRefModelCallback.sync_target_model(policies.after[step], expected, 0.7)
    found = dict(trainer.reference.model.named_parameters())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found[name], parameter, rtol=1e-6, atol=1e-7)
    moved = {name for name, value in first.named_parameters() if not torch.equal(found[name], value)}
    assert any(name.startswith("vision_model") for name in moved)
    assert any(name.startswith("text_model") for name in moved) == bool(trained)
    assert trainer.reference.logit_scale == pytest.approx(expected.logit_scale.exp().item())


@pytest.mark.parametrize("trained", [{}, EVERYTHING], ids=["vision", "everything"])
def test_the_reference_answers_with_its_weights_of_now(trained, clip_folder, tmp_path):
    """Neither embeddings of images nor of texts nor the scale are those of the start."""
    trainer = make_trainer(clip_folder, tmp_path, **RUN, **trained)
    trainer.train()
    assert trainer.train_dataset.reference == {}
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    model, processor = trainer.reference.model, trainer.processing_class
    with torch.no_grad():
        images, texts = encode_images(model, batch["pixel_values"]), encode_texts(model, processor, PROMPTS)
        logits = model.logit_scale.exp() * images @ texts.T
    torch.testing.assert_close(trainer.reference(batch).preference, logits.log_softmax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [{}, EVERYTHING], ids=["vision", "everything"])
def test_a_reference_that_becomes_the_policy_at_each_step_is_at_distance_0(trained, clip_folder, tmp_path):
    arguments = {**RUN, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1, **trained}
    follows = make_trainer(clip_folder, tmp_path / "follows", **arguments)
    follows.train()
    assert max(logged(follows, "kl")) < 1e-6
    stays = make_trainer(clip_folder, tmp_path / "stays", **{**arguments, "ref_model_sync_steps": 100})
    stays.train()
    assert max(logged(stays, "kl")) > 1e-4


OTHER_ROWS = {
    "image-pairs": (lambda: make_image_pairs(9), {"loss_type": "sigmoid", "candidate_texts": None}, math.log(2)),
    "unpaired": (lambda: make_unpaired(9), {"loss_type": "kto"}, 0.5),
}


@pytest.mark.parametrize("case", OTHER_ROWS.values(), ids=OTHER_ROWS)
def test_feedback_of_other_kinds_is_compared_with_the_moved_reference(case, clip_folder, tmp_path):
    """The loss of a policy that equals its reference, at each step."""
    rows, arguments, at_equality = case
    arguments = {**RUN, "reg_dataset": None, "reg_weight": 0.0, "train_dataset": rows(), **arguments}
    every_step = {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    trainer = make_trainer(clip_folder, tmp_path, **{**arguments, **every_step})
    trainer.train()
    assert logged(trainer, "loss/preference") == pytest.approx([at_equality] * 5, abs=1e-6)


def test_scale_and_bias_of_another_architecture_move_too(tmp_path):
    tiny_dual_encoder("siglip", tmp_path / "siglip")
    arguments = {**RUN, **EVERYTHING, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    trainer = make_trainer(tmp_path / "siglip", tmp_path / "run", **arguments)
    trainer.train()
    assert max(logged(trainer, "kl")) < 1e-6
    assert same(weights(trainer.reference.model), weights(trainer.model))
    assert not same(weights(trainer.reference.initial_model), weights(trainer.model))


def test_embeddings_of_a_frozen_vision_tower_are_still_computed_once(clip_folder, tmp_path):
    alone = {"train_vision_model": False, "train_text_model": True}
    trainer = make_trainer(clip_folder, tmp_path, **RUN, **alone)
    trainer.train()
    assert set(trainer.train_dataset.reference) == {"image", "reg_image"}
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    model, processor = trainer.reference.model, trainer.processing_class
    with torch.no_grad():
        logits = model.logit_scale.exp() * batch["ref_image_embeds"] @ encode_texts(model, processor, PROMPTS).T
    torch.testing.assert_close(trainer.reference(batch).preference, logits.log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_another_reference_moves_too(clip_folder, tmp_path):
    torch.manual_seed(5)
    other = CLIPModel(samples.tiny_config())
    policies, expected = Policies(), copy.deepcopy(other)
    trainer = make_trainer(clip_folder, tmp_path, ref_model=other, callbacks=[policies], **RUN)
    trainer.train()
    for step in (1, 3):
        SyncRefModelCallback.sync_target_model(policies.after[step], expected, 0.7)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(dict(other.named_parameters())[name], parameter, rtol=1e-6, atol=1e-7)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    with torch.no_grad():
        images, texts = (
            encode_images(other, batch["pixel_values"]),
            encode_texts(other, trainer.processing_class, PROMPTS),
        )
    logps = (other.logit_scale.exp() * images @ texts.T).log_softmax(-1).detach()
    torch.testing.assert_close(trainer.reference(batch).preference, logps, rtol=1e-5, atol=1e-5)


def test_the_model_before_training_is_kept_for_comparison(clip_folder, tmp_path):
    first = weights(CLIPModel.from_pretrained(clip_folder))
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(clip_folder, tmp_path, **RUN, **saving)
    resumed = make_trainer(clip_folder, tmp_path, **RUN, **saving, overwrite_output_dir=False)
    trainer.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for run in (trainer, resumed):
        assert same(weights(run.reference.initial_model), first)
        assert not same(weights(run.reference.model), first)
    frozen = resumed.reference.initial_model.text_projection.weight
    assert frozen is resumed.model.text_projection.weight  # what does not train is held once


# ---- Resume


@pytest.mark.parametrize("trained", [{}, EVERYTHING], ids=["vision", "everything"])
@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_ends_with_the_same_policy_and_the_same_reference(stop, trained, clip_folder, tmp_path):
    saving = {**RUN, **trained, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(clip_folder, tmp_path / "whole", **saving)
    whole.train()
    make_trainer(clip_folder, tmp_path / "parts", callbacks=[StopAt(stop)], **saving).train()
    resumed = make_trainer(clip_folder, tmp_path / "parts", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(whole.model))
    assert same(weights(resumed.reference.model), weights(whole.reference.model))
    assert resumed.reference.logit_scale == whole.reference.logit_scale


def test_the_same_trainer_can_resume_from_an_earlier_step(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, **RUN, save_strategy="steps", save_steps=1)
    trainer.train()
    policy, reference = weights(trainer.model), weights(trainer.reference.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(trainer.model), policy)
    assert same(weights(trainer.reference.model), reference)


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "other"])
def test_a_checkpoint_without_its_reference_is_refused(lost, clip_folder, tmp_path):
    saving = {**RUN, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(clip_folder, tmp_path, **saving).train()
    file = tmp_path / "checkpoint-1" / REFERENCE_FILE
    if lost:
        file.unlink()
    else:
        (tmp_path / "checkpoint-1" / "model.safetensors").rename(file.with_name("kept"))
        file.write_bytes(file.with_name("kept").read_bytes())
        file.with_name("kept").rename(file.with_name("model.safetensors"))
    with pytest.raises(ValueError, match=r"does not hold the reference of this run.*sync_ref_model"):
        make_trainer(clip_folder, tmp_path, **saving).train(resume_from_checkpoint=str(file.parent))


def test_a_checkpoint_is_still_a_plain_model(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, **RUN, save_strategy="steps", save_steps=5)
    trainer.train()
    assert same(weights(CLIPModel.from_pretrained(tmp_path / "checkpoint-5")), weights(trainer.model))


# ---- What does not fit


REFUSED = {
    "adapters": ({"peft_config": LoraConfig(target_modules=r".*vision_model.*q_proj")}, "trains adapters"),
    "precomputed": ({"precompute_ref_log_probs": True}, "those of another model. Leave precompute_ref_log_probs out"),
    "cache": ({"embeddings_cache": "cache"}, "Leave embeddings_cache out"),
    "nothing-compared": ({"loss_type": "sft", "reg_weight": 0.0, "reg_dataset": None}, "has no effect"),
    "concept": ({"concept": ConceptTransform(16)}, "sync_ref_model=True has no effect: ConceptTrainer"),
    "alpha-0": ({"ref_model_mixup_alpha": 0.0}, r"ref_model_mixup_alpha must lie in \(0, 1\], got 0.0"),
    "no-steps": ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be a whole number >= 1"),
    "off": ({"sync_ref_model": False}, "ref_model_mixup_alpha=0.7 has no effect without sync_ref_model=True"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_a_moving_reference_is_refused(case, clip_folder, tmp_path):
    arguments, says = case
    with pytest.raises(ValueError, match=says):
        make_trainer(clip_folder, tmp_path, train_dataset=make_preferences(4), **{**RUN, **arguments})


def test_sharded_weights_are_refused():
    trainer = SimpleNamespace(model=None, is_fsdp_enabled=True, is_deepspeed_enabled=False)
    with pytest.raises(ValueError, match="FSDP and DeepSpeed shard them"):
        ReferenceSyncCallback(trainer)


def test_a_reference_of_another_shape_is_refused(clip_folder, tmp_path):
    other = CLIPModel(samples.tiny_config(vision={"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="Pass a ref_model of the same architecture"):
        make_trainer(clip_folder, tmp_path, ref_model=other, **RUN)
