"""The interface to two-tower models, for every supported architecture. See also `test_architectures.py`."""

import json
import re
import shutil

import pytest
import torch
import transformers
from dual_encoders import KINDS, POSITIONS, SUPPORTED, tiny_dual_encoder
from peft import LoraConfig, PeftModel
from samples import PROMPTS, make_trainer, picture, run_config, same
from transformers import AutoModel, CLIPConfig, CLIPModel

from clip_po import models as loading
from clip_po.data.images import to_pixels
from clip_po.data.patches import pack_patches, unpack_patches
from clip_po.dual_encoder import as_dual_encoder
from clip_po.encoding import encode_images, encode_texts, tokenize, unit_norm
from clip_po.families import FAMILIES
from clip_po.models import load_model, read_processor
from clip_po.trainable import choose_trainable, tower_of, trained_linear_layers

TEXT_ALONE = {"train_vision_model": False, "train_text_model": True}
IMAGES = [picture(number) for number in range(3)]


@pytest.fixture(scope="module", params=SUPPORTED)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    tiny_dual_encoder(kind, folder)
    return str(folder)


def embeddings(model, processor):
    with torch.no_grad():
        return encode_images(model.eval(), to_pixels(processor, IMAGES)), encode_texts(model, processor, PROMPTS)


def test_every_family_has_a_tiny_model():
    assert set(KINDS) == set(FAMILIES)


def test_one_call_of_the_model_gives_its_embeddings_and_logits_with_gradients(folder):
    model, processor = load_model(folder), read_processor(folder)
    encoder = as_dual_encoder(model)
    inputs = encoder.inputs(to_pixels(processor, IMAGES), tokenize(encoder, processor, PROMPTS))
    outputs = model(**inputs)
    images, texts = map(unit_norm, encoder.features_of(outputs))
    torch.testing.assert_close(images, outputs.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(texts, outputs.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder.logits(images, texts), outputs.logits_per_image, atol=1e-4, rtol=0)
    pairs = outputs.logits_per_image[:, :3].diagonal()
    torch.testing.assert_close(encoder.pair_logits(images, texts[:3]), pairs, atol=1e-4, rtol=0)
    encoder.logits(images, texts)[0, 1].backward()
    reached = {tower_of(name) for name, weight in model.named_parameters() if weight.grad is not None}
    assert reached == {"vision", "text", None}
    assert all(getattr(model, name).grad is not None for name in encoder.scales)
    assert (images.shape[1], encoder.token_limit) == (encoder.dim, POSITIONS)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK"])
def test_images_of_any_mode_are_those_of_their_colors(folder, mode):
    processor = read_processor(folder)
    image = picture(0, 40).convert(mode)
    colors = to_pixels(processor, [image.convert("RGB")])
    torch.testing.assert_close(to_pixels(processor, [image]), colors, atol=0.02, rtol=0)


def test_an_embedding_depends_on_the_text_alone(folder):
    model, processor = load_model(folder), read_processor(folder)
    together = encode_texts(model, processor, ["a cat", "", "a much longer text"])
    torch.testing.assert_close(together[:1], encode_texts(model, processor, ["a cat"]), atol=1e-6, rtol=0)
    assert together.isfinite().all()


def test_both_towers_train_on_request_and_no_parameter_waits_for_a_gradient(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, max_steps=1, learning_rate=1e-3, train_text_model=True)
    reached = set()
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            weight.register_hook(lambda gradient, name=name: reached.add(name))
    trainer.train()
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {tower_of(name) for name in trained} == {"vision", "text"}
    assert reached == trained  # DDP would wait for the others


def test_training_starts_at_the_reference(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, max_steps=1, logging_steps=1, disable_dropout=True)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)


def test_adapters_are_in_the_linear_layers_of_the_vision_tower(folder, tmp_path):
    model = load_model(folder)
    targets = trained_linear_layers(model, run_config(tmp_path))
    trainer = make_trainer(
        model, tmp_path, max_steps=2, learning_rate=1e-2, peft_config=LoraConfig(r=2, target_modules=targets)
    )
    adapted = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {tower_of(name) for name in adapted} == {"vision"}
    trainer.train()
    assert all(bool(weight.any()) for name, weight in trainer.model.named_parameters() if ".lora_B." in name)
    trainer.save_model(str(tmp_path / "saved"))
    processor = read_processor(folder)
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), tmp_path / "saved")
    first, second = (dict(enumerate(embeddings(found, processor))) for found in (plain, trainer.model))
    assert same(first, second)


def test_the_last_block_trains_alone(folder, tmp_path):
    model = load_model(folder)
    choose_trainable(model, run_config(tmp_path, trainable_layers=1))
    blocks = {
        (tower_of(name), int(number)): weight.requires_grad
        for name, weight in model.named_parameters()
        for number in re.findall(r"[.](?:layers?|blocks)[.](\d+)[.]", name)[:1]
    }
    last = max(number for tower, number in blocks if tower == "vision")
    assert {block for block, trains in blocks.items() if trains} == {("vision", last)}
    assert not [n for n, weight in model.named_parameters() if weight.requires_grad and "embeddings" in n]


def test_a_trained_scale_stays_below_its_bound(folder):
    model = load_model(folder)
    encoder = as_dual_encoder(model)
    for name in encoder.scales:
        getattr(model, name).data.fill_(1e-9 if name == "temperature" else 50.0)
    encoder.bound_scale()
    assert encoder.scale.item() == pytest.approx(min(encoder.largest_scale, torch.tensor(50.0).exp().item()), rel=1e-5)


def test_patches_travel_as_one_tensor():
    shapes = torch.tensor([[2, 3], [1, 5]])
    inputs = {
        "pixel_values": torch.randn(2, 6, 12),
        "pixel_attention_mask": torch.tensor([[1] * 6, [1] * 5 + [0]]),
        "spatial_shapes": shapes,
    }
    found = unpack_patches(pack_patches(inputs))
    assert all(torch.equal(found[name], value) for name, value in inputs.items())
    sixteen = unpack_patches(pack_patches(inputs).bfloat16())
    assert torch.equal(sixteen["spatial_shapes"], shapes)


class WithTowers(CLIPModel):
    """A subclass of its own, outside of transformers."""


def test_a_subclass_is_of_the_family_of_its_base():
    config = CLIPConfig(
        text_config={"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 8},
        vision_config={"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1},
    )
    assert as_dual_encoder(WithTowers(config)).class_name == "CLIPModel"


def test_the_families_are_those_of_transformers():
    for kind, family in FAMILIES.items():
        if kind in SUPPORTED:
            model_class = getattr(transformers, family.class_name)
            assert model_class.config_class.model_type == kind


def test_scales_normalizations_and_positions_do_not_decay(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    parameters = dict(trainer.model.named_parameters())
    decay = set(trainer.get_decay_parameter_names(trainer.model)) & parameters.keys()
    modules = dict(trainer.model.named_modules())
    normalizations = [name for name, module in modules.items() if "norm" in type(module).__name__.lower()]
    assert decay
    assert not {name for name in decay if name.rpartition(".")[0] in normalizations}
    assert not {name for name in decay if parameters[name].ndim < 2}


def test_refused_adapters_name_targets_that_work(folder, tmp_path):
    def trainer(targets):
        config = LoraConfig(r=2, target_modules=targets)
        return make_trainer(load_model(folder), tmp_path, peft_config=config)

    for targets in ("no_such_layer", trained_linear_layers(load_model(folder), run_config(tmp_path, **TEXT_ALONE))):
        with pytest.raises(ValueError, match="target_modules=r'") as error:
            trainer(targets)
        (advised,) = re.findall(r"target_modules=r'(.+?)'", str(error.value))
        assert trainer(advised).model.peft_config


def test_the_model_card_says_how_to_load_the_model(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    trainer.save_model()
    trainer.create_model_card(model_name=str(tmp_path))
    (code,) = re.findall(r"```python\n(.+?)```", (tmp_path / "README.md").read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(code.replace(f'"{tmp_path.name}"', repr(str(tmp_path))), names)
    assert type(names["model"]) is type(trainer.encoder)
    loaded, trained = embeddings(names["model"], names["processor"]), embeddings(trainer.model, read_processor(folder))
    assert same(dict(enumerate(loaded)), dict(enumerate(trained)))


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers"])
def test_a_config_that_is_larger_than_its_weights_is_refused(folder, field, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config["text_config"][field] = 10**9
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{field}.*1000000000.*Correct it"):
        load_model(str(tmp_path / "copy"))


def test_a_family_that_transformers_does_not_have_yet_is_named(folder, kind, monkeypatch):
    monkeypatch.setattr(loading, "CONFIG_MAPPING", {})
    with pytest.raises(TypeError, match=rf"is a '{kind}' model, which transformers .* does not have\. Update"):
        load_model(folder)
