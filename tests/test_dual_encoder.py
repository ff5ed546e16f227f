"""Every supported architecture: embeddings and logits as plain transformers computes them, training, and reloading."""

import pytest
import torch
from architectures import KINDS, LIMIT, tiny_dual_encoder
from peft import LoraConfig, PeftModel
from samples import PROMPTS, make_trainer, picture, run_config, same, weights
from transformers import AutoModel

from clip_po.data.images import to_pixels
from clip_po.dual_encoder import FAMILIES, as_dual_encoder
from clip_po.encoding import encode_images, encode_texts, tokenize, unit_norm
from clip_po.models import check_processor, load_model, read_processor
from clip_po.policy import candidate_logps
from clip_po.trainable import tower_of, trained_linear_layers

IMAGES = [picture(number) for number in range(3)]
PLAIN_TEXTS = {  # as the documentation of transformers says for each model
    "siglip": {"padding": "max_length"},
    "siglip2": {"padding": "max_length"},
}
WITHOUT_MASK = ("siglip", "siglip2")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return str(tiny_dual_encoder(kind, tmp_path_factory.mktemp(kind)))


def plain_outputs(folder, kind, images=IMAGES, texts=PROMPTS):
    """What transformers itself computes, without this package."""
    model, processor = AutoModel.from_pretrained(folder).eval(), read_processor(folder)
    options = {"padding": True, **PLAIN_TEXTS.get(kind, {})}
    tokens = processor.tokenizer(texts, truncation=True, max_length=LIMIT, return_tensors="pt", **options)
    if kind in WITHOUT_MASK:
        del tokens["attention_mask"]
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        return model(**tokens, **processor.image_processor(images, return_tensors="pt"))


def embeddings(model, processor):
    with torch.no_grad():
        return encode_images(model.eval(), to_pixels(processor, IMAGES)), encode_texts(model, processor, PROMPTS)


def test_every_family_has_a_tiny_model():
    assert set(KINDS) == set(FAMILIES)


def test_embeddings_and_logits_are_those_of_plain_transformers(folder, kind):
    model, processor = load_model(folder), read_processor(folder)
    check_processor(processor, model)
    encoder, plain = as_dual_encoder(model), plain_outputs(folder, kind)
    images, texts = embeddings(model, processor)
    torch.testing.assert_close(images, plain.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(texts, plain.text_embeds, atol=1e-6, rtol=0)
    with torch.no_grad():
        logits = encoder.logits(images, texts)
        pairs = encoder.pair_logits(images, texts[:3])
        logps = candidate_logps(images, texts, encoder.scale)
    torch.testing.assert_close(logits, plain.logits_per_image, atol=1e-4, rtol=0)
    torch.testing.assert_close(pairs, plain.logits_per_image[:, :3].diagonal(), atol=1e-4, rtol=0)
    torch.testing.assert_close(logps, plain.logits_per_image.log_softmax(dim=-1), atol=1e-4, rtol=0)
    assert images.shape[1] == encoder.dim
    assert encoder.token_limit == LIMIT


def test_one_call_of_the_model_gives_the_embeddings_with_gradients(folder, kind):
    model, processor = load_model(folder), read_processor(folder)
    encoder, plain = as_dual_encoder(model), plain_outputs(folder, kind)
    inputs = encoder.inputs(to_pixels(processor, IMAGES), tokenize(encoder, processor, PROMPTS))
    image_features, text_features = encoder.features_of(model(**inputs))
    torch.testing.assert_close(unit_norm(image_features), plain.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(unit_norm(text_features), plain.text_embeds, atol=1e-6, rtol=0)
    (unit_norm(image_features)[0] @ unit_norm(text_features)[1]).backward()
    reached = {tower_of(name) for name, weight in model.named_parameters() if weight.grad is not None}
    assert reached == {"vision", "text"}


def test_an_embedding_depends_on_the_text_alone(folder):
    model, processor = load_model(folder), read_processor(folder)
    together = encode_texts(model, processor, ["a cat", "a much longer text"])
    alone = encode_texts(model, processor, ["a cat"])
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=0)
    cut = encode_texts(model, processor, ["a" * 500, "b" * 500])
    assert cut.isfinite().all()
    assert not torch.equal(cut[0], cut[1])


def test_three_steps_train_the_vision_tower_and_load_in_plain_transformers(folder, tmp_path):
    before, processor = load_model(folder), read_processor(folder)
    images, texts = embeddings(before, processor)
    trainer = make_trainer(folder, tmp_path, max_steps=3, learning_rate=1e-3)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    trained, loaded = (
        embeddings(model, processor) for model in (trainer.model, AutoModel.from_pretrained(tmp_path / "saved"))
    )
    assert torch.equal(loaded[0], trained[0])
    assert torch.equal(loaded[1], texts)
    assert (loaded[0] - images).abs().max() > 1e-3
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, weights(before)[name])}
    assert {tower_of(name) for name in changed} == {"vision"}
    buffers = {name for name, _ in before.named_buffers()}
    assert not changed & buffers


def test_both_towers_train_on_request(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, max_steps=2, learning_rate=1e-3, train_text_model=True)
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert {tower_of(name) for name in changed} == {"vision", "text"}
    idle = [n for n, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None and n not in changed]
    assert not idle  # DDP would wait for their gradients


def test_a_loaded_model_starts_with_the_loss_of_no_change(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, max_steps=1, logging_steps=1, beta=0.1)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert first["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)


def test_adapters_are_in_the_linear_layers_of_the_vision_tower(folder, tmp_path):
    model = load_model(folder)
    targets = trained_linear_layers(model, run_config(tmp_path))
    trainer = make_trainer(
        model, tmp_path, max_steps=3, learning_rate=1e-2, peft_config=LoraConfig(r=2, target_modules=targets)
    )
    adapted = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert adapted
    assert {tower_of(name) for name in adapted} == {"vision"}
    before = weights(trainer.model)
    trainer.train()
    idle = [name for name in adapted if ".lora_B." in name and torch.equal(before[name], weights(trainer.model)[name])]
    assert not idle
    trainer.save_model(str(tmp_path / "saved"))
    processor = read_processor(folder)
    trained = embeddings(trainer.model, processor)
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), tmp_path / "saved")
    loaded = embeddings(plain, processor)
    assert same(dict(enumerate(loaded)), dict(enumerate(trained)))
