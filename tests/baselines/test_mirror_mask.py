import pytest
import torch
from peft import LoraConfig, get_peft_model
from samples import CLASSES, make_labelled
from torch.nn import functional as F

from clip_po.baselines.mirror_mask import mask_by_mirror, visual_features
from clip_po.encoding import encode_images, encode_texts
from clip_po.evaluation.zero_shot import zero_shot_accuracy


@pytest.fixture
def pixels():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def embed(model, pixels):
    with torch.no_grad():
        return encode_images(model.eval(), pixels)


def by_hand(images, mirrored):
    """Return the filtered embeddings, number by number."""
    rows = [
        [b + a if (a > 0) == (b > 0) else b for a, b in zip(*pair, strict=True)]
        for pair in zip(images.tolist(), mirrored.tolist(), strict=True)
    ]
    return F.normalize(torch.tensor(rows), dim=-1)


def test_numbers_of_one_sign_are_added_and_others_are_those_of_the_mirror_image():
    images = torch.tensor([[0.6, -0.8, 0.0], [1.0, 0.0, 0.0]])
    mirrored = torch.tensor([[0.6, 0.8, 0.0], [-0.6, 0.0, 0.8]])
    torch.testing.assert_close(
        visual_features(images, mirrored), F.normalize(torch.tensor([[1.2, 0.8, 0.0], [-0.6, 0.0, 0.8]]), dim=-1)
    )


def test_the_copy_embeds_images_by_both_views_and_texts_as_before(model, processor, pixels):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masked = mask_by_mirror(model)
    expected = by_hand(embed(model, pixels), embed(model, torch.flip(pixels, [3])))
    torch.testing.assert_close(embed(masked, pixels), expected)
    assert not torch.allclose(embed(masked, pixels), embed(model, pixels), atol=1e-3)
    assert torch.equal(encode_texts(masked, processor, CLASSES), encode_texts(model, processor, CLASSES))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    tokens = processor.tokenizer(CLASSES, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert masked(pixel_values=pixels, **tokens).logits_per_image.shape == (5, len(CLASSES))
        torch.testing.assert_close(masked(pixel_values=pixels, **tokens).image_embeds, expected)
        rows = masked.vision_model(pixels).pooler_output
    assert len(rows) == 10


def test_a_model_in_half_precision_keeps_its_dtype(model, processor, pixels):
    half = mask_by_mirror(model.bfloat16())
    tokens = processor.tokenizer(CLASSES, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert half(pixel_values=pixels.bfloat16(), **tokens).logits_per_image.dtype == torch.bfloat16


def test_what_looks_the_same_in_a_mirror_is_not_changed(model, pixels):
    symmetric = pixels + pixels.flip(-1)
    torch.testing.assert_close(embed(mask_by_mirror(model), symmetric), embed(model, symmetric))


def test_a_model_with_adapters_is_masked(model, pixels):
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*vision_model.*q_proj", init_lora_weights=False))
    expected = by_hand(embed(adapted, pixels), embed(adapted, pixels.flip(-1)))
    torch.testing.assert_close(embed(mask_by_mirror(adapted), pixels), expected)


def test_evaluations_see_the_masked_model(model, processor):
    masked, images = mask_by_mirror(model), make_labelled(8)
    found = zero_shot_accuracy(masked, processor, images, ["a photo of a {}"], disable_tqdm=True)
    texts = encode_texts(masked, processor, [f"a photo of a {name}" for name in CLASSES])
    shown = processor(images=images["image"][:], return_tensors="pt")["pixel_values"]
    expected = by_hand(embed(model, shown), embed(model, shown.flip(-1)))
    assert found.predicted.tolist() == (expected @ texts.T).argmax(-1).tolist()
