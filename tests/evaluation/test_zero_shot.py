import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from clip_po.encoding import encode_texts, evaluating
from clip_po.evaluation.zero_shot import class_embeddings, classify, zero_shot_accuracy

TEMPLATES = ["a photo of a {}", "the {}"]


def pixels(processor, dataset):
    return processor.image_processor([row["image"] for row in dataset], return_tensors="pt")["pixel_values"]


def test_text_embeddings_are_the_models_own(model, processor):
    texts = ["a cat", "the photo of a dog", "car"]
    tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, pixel_values=torch.zeros(1, 3, 32, 32)).text_embeds
    got = encode_texts(model, processor, texts, batch_size=2)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(3))
    assert not got.requires_grad


def test_a_text_longer_than_the_context_is_cut(model, processor):
    assert encode_texts(model, processor, ["cat" * 100]).shape == (1, 8)


def test_embeddings_can_take_part_in_a_later_backward_pass(model, processor):
    weight = torch.ones(8, requires_grad=True)
    (encode_texts(model, processor, ["cat"]) * weight).sum().backward()
    assert weight.grad is not None


def test_class_embeddings_are_normalized_means_over_templates(model, processor):
    got = class_embeddings(model, processor, ["cat", "dog"], TEMPLATES)
    each = encode_texts(model, processor, ["a photo of a dog", "the dog"])
    torch.testing.assert_close(got[1], each.mean(0) / each.mean(0).norm())
    assert got.shape == (2, 8)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (["cat"], [], "templates must be a list"),
        (["cat"], "a {}", "templates must be a list"),
        (["cat"], ["a photo"], r"templates\[0\].*exactly one .*, got 'a photo' with 0"),
        (["cat"], ["{} or {}"], "exactly one .* with 2"),
        ([], TEMPLATES, "class_names must be a list"),
        ("cat", TEMPLATES, "class_names must be a list"),
    ],
)
def test_wrong_prompts_are_refused(model, processor, names, templates, message):
    with pytest.raises(ValueError, match=message):
        class_embeddings(model, processor, names, templates)


def test_logits_are_the_models_own(model, processor, dataset):
    texts = ["a cat", "dog"]
    inputs = processor(text=texts, images=[row["image"] for row in dataset], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        got = classify(model, inputs["pixel_values"], encode_texts(model, processor, texts))
    torch.testing.assert_close(got, expected)


def test_logits_of_a_model_in_half_precision_are_float32(model, processor, dataset):
    texts = encode_texts(model, processor, ["cat", "dog"])
    with torch.no_grad():
        logits = classify(model.to(torch.bfloat16), pixels(processor, dataset), texts)
    assert logits.dtype == torch.float32


def test_adapters_of_a_peft_model_stay_active(model, processor, dataset):
    texts = encode_texts(model, processor, ["cat", "dog"])
    images = pixels(processor, dataset)
    with torch.no_grad():
        plain = classify(model, images, texts)
        lora = get_peft_model(model, LoraConfig(target_modules=r".*vision_model.*q_proj", init_lora_weights=False))
        lora.eval()
        adapted = classify(lora, images, texts)
        with lora.disable_adapter():
            switched_off = classify(lora, images, texts)
    assert not torch.allclose(plain, adapted, atol=1e-3)
    torch.testing.assert_close(switched_off, plain)
    result = zero_shot_accuracy(lora, processor, dataset, ["{}"], disable_tqdm=True)
    with torch.no_grad():
        expected = classify(lora, images, class_embeddings(lora, processor, ["cat", "dog", "car"], ["{}"]))
    np.testing.assert_array_equal(result.predicted, expected.argmax(1))


def test_evaluation_leaves_every_module_in_its_own_mode(model):
    model.train()
    model.text_model.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert model.vision_model.training
    assert not model.text_model.training
    assert torch.is_grad_enabled()


def test_accuracy_counts_right_answers(model, processor, dataset):
    result = zero_shot_accuracy(model, processor, dataset, TEMPLATES, disable_tqdm=True)
    with torch.no_grad():
        texts = class_embeddings(model, processor, ["cat", "dog", "car"], TEMPLATES)
        expected = classify(model, pixels(processor, dataset), texts).argmax(1).numpy()
    labels = np.array(dataset["label"])
    np.testing.assert_array_equal(result.predicted, expected)
    np.testing.assert_array_equal(result.label, labels)
    assert result.accuracy.value == pytest.approx((expected == labels).mean())
    assert result.accuracy.low <= result.accuracy.value <= result.accuracy.high
    assert list(result.per_class) == ["cat", "dog", "car"]
    for number, name in enumerate(result.per_class):
        share = (expected == number)[labels == number].mean()
        assert result.per_class[name].value == pytest.approx(share)


def test_answers_depend_neither_on_batch_size_nor_on_workers(model, processor, dataset):
    whole = zero_shot_accuracy(model, processor, dataset, TEMPLATES, disable_tqdm=True)
    for arguments in ({"batch_size": 1}, {"batch_size": 5, "num_workers": 1}):
        other = zero_shot_accuracy(model, processor, dataset, TEMPLATES, disable_tqdm=True, **arguments)
        np.testing.assert_array_equal(whole.predicted, other.predicted)
        assert whole.accuracy == other.accuracy


def test_columns_may_have_any_names_and_a_class_no_images(model, processor, dataset):
    renamed = dataset.select([0, 1, 3]).rename_columns({"image": "photo", "label": "what"})
    result = zero_shot_accuracy(
        model, processor, renamed, TEMPLATES, image_column="photo", label_column="what", disable_tqdm=True
    )
    assert np.isnan(result.per_class["car"].value)


def test_an_empty_data_set_is_refused(model, processor, dataset):
    with pytest.raises(ValueError, match="no rows"):
        zero_shot_accuracy(model, processor, dataset.select([]), TEMPLATES, disable_tqdm=True)


def test_a_model_without_towers_is_refused(processor):
    with pytest.raises(TypeError, match="Linear"):
        encode_texts(torch.nn.Linear(2, 2), processor, ["cat"])
