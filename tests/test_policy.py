"""The model as a policy: one forward through the model itself, a softmax over the candidates."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from samples import PROMPTS, tiny_config
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from clip_po.candidates import CandidateTexts
from clip_po.data.collator import DataCollatorForContrastivePreference
from clip_po.data.pairs import PreferencePairs
from clip_po.encoding import CachedTextEmbeddings, encode_images, encode_texts
from clip_po.models import dual_encoder
from clip_po.policy import (
    CandidateLogps,
    Policy,
    candidate_logps,
    preference_logps,
    regularization_kl,
)
from clip_po.reference import frozen_copy

VISION_LORA = LoraConfig(r=2, target_modules=r".*vision_model.*\.(q_proj|v_proj)")


def unit(*shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def batch_of(preferences, processor, candidate_texts=None, rows=4):
    collator = DataCollatorForContrastivePreference(processor, candidate_texts)
    pairs = PreferencePairs(preferences, "clean_image", CandidateTexts(candidate_texts))
    return collator([pairs[index] for index in range(rows)])


def freeze_text(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("text_model", "text_projection", "logit_scale")))
    return model


# ---- Candidates


def test_logps_are_a_plain_softmax_of_scaled_cosines():
    images, texts = unit(3, 8), unit(5, 8)
    expected = torch.log_softmax(20.0 * images @ texts.T, dim=-1)
    torch.testing.assert_close(candidate_logps(images, texts, 20.0), expected)


def test_candidates_are_gathered_and_absent_ones_masked():
    images, texts = unit(2, 8), unit(5, 8)
    found = candidate_logps(images, texts, 20.0, torch.tensor([[3, 0, 4], [2, 1, -1]]))
    logits = 20.0 * images @ texts.T
    torch.testing.assert_close(found[0], logits[0, [3, 0, 4]].log_softmax(-1))
    torch.testing.assert_close(found[1, :2], logits[1, [2, 1]].log_softmax(-1))
    assert found[1, 2] == -torch.inf


def test_masked_candidates_leave_gradients_finite():
    images = unit(2, 8).requires_grad_()
    found = candidate_logps(images, unit(5, 8), 20.0, torch.tensor([[3, 0, 4], [2, 1, -1]]))
    found[:, 0].sum().backward()
    assert images.grad.isfinite().all()


def test_autocast_and_half_precision_leave_logps_in_float32():
    images, texts = unit(3, 8), unit(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = candidate_logps(images, texts, 100.0)
    torch.testing.assert_close(found, candidate_logps(images, texts, 100.0), rtol=0, atol=0)
    assert candidate_logps(images.bfloat16(), texts.bfloat16(), 100.0).dtype == torch.float32


def test_chosen_and_rejected_are_picked_from_both_policies():
    policy, reference = torch.arange(6.0).view(2, 3), -torch.arange(6.0).view(2, 3)
    batch = {"chosen": torch.tensor([2, 0]), "rejected": torch.tensor([[0, 1], [1, -1]])}
    logps = preference_logps(CandidateLogps(policy, None), CandidateLogps(reference, None), batch)
    assert logps.chosen.tolist() == [2.0, 3.0]
    assert logps.rejected.tolist() == [[0.0, 1.0], [4.0, -torch.inf]]
    assert logps.ref_chosen.tolist() == [-2.0, -3.0]
    assert logps.ref_rejected[0].tolist() == [0.0, -1.0]
    assert logps.ref_rejected[1, 0] == -4.0


def test_kl_is_0_without_ordinary_images():
    logps = unit(3, 4).log_softmax(-1)
    assert regularization_kl(CandidateLogps(logps, None), CandidateLogps(logps, None)).tolist() == [0.0] * 3


def test_kl_compares_the_ordinary_images_alone():
    same, one, other = (torch.randn(2, 3).log_softmax(-1) for _ in range(3))
    assert regularization_kl(CandidateLogps(one, same), CandidateLogps(other, same)).tolist() == [0.0, 0.0]
    assert (regularization_kl(CandidateLogps(same, one), CandidateLogps(same, other)) > 0).all()


# ---- The forward


@pytest.mark.parametrize("candidate_texts", [None, PROMPTS])
def test_one_forward_equals_separate_forwards_of_images_and_texts(model, processor, preferences, candidate_texts):
    batch = batch_of(preferences, processor, candidate_texts)
    policy = Policy(processor, CandidateTexts(candidate_texts), CachedTextEmbeddings(model, processor))
    with torch.no_grad():
        found = policy(model, model, batch)
        texts = encode_texts(model, processor, candidate_texts or batch["texts"])
        for logps, key in ((found.preference, "pixel_values"), (found.regularization, "reg_pixel_values")):
            images = encode_images(model, batch[key])
            torch.testing.assert_close(
                logps, candidate_logps(images, texts, model.logit_scale.exp(), batch.get("candidates"))
            )


def test_logps_are_those_of_the_models_own_logits(model, processor, preferences):
    batch = batch_of(preferences, processor, PROMPTS)
    tokens = processor(text=PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = Policy(processor, CandidateTexts(PROMPTS), CachedTextEmbeddings(model, processor))(model, model, batch)
        expected = model(**tokens, pixel_values=batch["pixel_values"]).logits_per_image.log_softmax(-1)
    torch.testing.assert_close(found.preference, expected)


def test_frozen_and_training_text_towers_give_the_same_logps(model, processor, preferences):
    batch = batch_of(preferences, processor)
    with torch.no_grad():
        frozen = Policy(processor, CandidateTexts(None), CachedTextEmbeddings(model, processor))(model, model, batch)
        training = Policy(processor, CandidateTexts(None), None)(model, model, batch)
    torch.testing.assert_close(frozen.preference, training.preference)
    torch.testing.assert_close(frozen.regularization, training.regularization)


def test_without_ordinary_images_there_are_no_logps_of_them(model, processor, preferences):
    batch = batch_of(preferences, processor)
    del batch["reg_pixel_values"]
    assert (
        Policy(processor, CandidateTexts(None), CachedTextEmbeddings(model, processor))(
            model, model, batch
        ).regularization
        is None
    )


def test_the_model_is_called_once_and_as_itself(model, processor, preferences):
    calls = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.vision_model.register_forward_hook(lambda *_: calls.append("vision"))
    frozen = CachedTextEmbeddings(model, processor)
    Policy(processor, CandidateTexts(None), frozen)(model, model, batch_of(preferences, processor))
    assert calls == ["vision", "model"]


@pytest.mark.parametrize("text_trains", [False, True])
def test_gradients_reach_the_towers_that_train(model, processor, preferences, text_trains):
    if not text_trains:
        freeze_text(model)
    policy = Policy(processor, CandidateTexts(None), None if text_trains else CachedTextEmbeddings(model, processor))
    policy(model, model, batch_of(preferences, processor)).preference[:, 0].sum().backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    vision = {"vision_model", "visual_projection"}
    assert moved == (vision | {"text_model", "text_projection", "logit_scale"} if text_trains else vision)


# ---- Texts


def test_frozen_texts_are_encoded_once_each(model, processor):
    encoded = []
    model.text_model.register_forward_hook(lambda _, args, kwargs, out: encoded.append(len(out[0])), with_kwargs=True)
    texts = CachedTextEmbeddings(model, processor)
    first = texts(["a", "b", "a"])
    again = texts(["b", "c", "a"])
    texts(["c", "b"])
    assert encoded == [2, 1]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[0], again[2])


def test_embeddings_of_texts_are_unit_norm_and_in_order_whatever_the_batch_size(model, processor):
    whole, parts = (encode_texts(model, processor, PROMPTS, batch_size=size) for size in (256, 3))
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(whole.norm(dim=-1), torch.ones(4))
    assert not whole.requires_grad


def test_text_longer_than_the_tower_reads_is_cut(model, processor):
    long = "dog " * 200
    assert encode_texts(model, processor, [long, "dog"]).shape == (2, 16)


# ---- Towers and copies


@pytest.mark.parametrize("name", ["model", "ref_model"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: CLIPVisionModelWithProjection(tiny_config().vision_config),
        lambda: CLIPTextModelWithProjection(tiny_config().text_config),
        lambda: torch.nn.Linear(2, 2),
    ],
)
def test_a_model_without_two_towers_is_refused(make, name):
    other = make()
    with pytest.raises(TypeError) as error:
        dual_encoder(other, name)
    for part in (
        f"{name} must be a transformers.CLIPModel",
        f"got {type(other).__name__}",
        "both towers",
        "open_clip",
    ):
        assert part in str(error.value)


def test_the_dual_encoder_of_adapters_is_the_model_with_them_active(model, processor, preferences):
    pixels = batch_of(preferences, processor)["pixel_values"]
    adapted = get_peft_model(model, VISION_LORA)
    before = encode_images(adapted, pixels)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert isinstance(dual_encoder(adapted), CLIPModel)
    assert not torch.allclose(encode_images(adapted, pixels), before)


def test_a_frozen_copy_shares_what_is_frozen_and_keeps_apart_what_trains(model):
    copied = frozen_copy(freeze_text(model))
    copies = dict(copied.named_parameters())
    for name, parameter in model.named_parameters():
        assert (copies[name] is parameter) is not parameter.requires_grad
        assert torch.equal(copies[name], parameter)


def test_a_frozen_copy_neither_trains_nor_stops_the_model_from_training(model):
    trains = [parameter.requires_grad for parameter in freeze_text(model).parameters()]
    copied = frozen_copy(model.train())
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert not copied.training
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


def test_a_frozen_copy_of_adapters_holds_the_base_once(model):
    adapted = get_peft_model(model, VISION_LORA)
    copies = dict(frozen_copy(adapted).named_parameters())
    apart = {name for name, parameter in adapted.named_parameters() if copies[name] is not parameter}
    assert apart == {name for name in copies if "lora_" in name}
