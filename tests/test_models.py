"""The model that trains: loaded, frozen where it does not train, and what is refused."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from samples import picture, tiny_config, tiny_processor
from transformers import AutoProcessor, BertConfig, BertModel, CLIPModel, CLIPVisionModelWithProjection

from clip_po.config import ContrastivePOConfig
from clip_po.encoding import encode_images
from clip_po.models import (
    check_processor,
    default_output_dir,
    image_size,
    load_model,
    load_policy,
    load_processor,
)
from clip_po.reference import initial_policy
from clip_po.trainable import choose_trainable

VISION = r".*vision_model.*\.(q_proj|v_proj)"
BOTH = ["q_proj", "v_proj"]


def lora(targets=VISION, **changes):
    return LoraConfig(r=2, target_modules=targets, **changes)


@pytest.fixture
def args(tmp_path):
    def make(**arguments):
        return ContrastivePOConfig(str(tmp_path / "run"), **arguments)

    return make


def parts_that_train(model):
    return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}


def unsaid(error, parts):
    return [part for part in parts if part not in str(error.value)]


# ---- Loading


def test_a_folder_is_loaded_in_float32_whatever_it_was_saved_in(model, tmp_path):
    model.half().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.dtype == torch.float32
    assert load_model(str(tmp_path), dtype=torch.float16).dtype == torch.float16


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    BertModel(
        BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(TypeError) as error:
        load_model(str(tmp_path))
    assert not unsaid(error, [repr(str(tmp_path)), "is a 'bert' model", "'clip'", "openai/clip-vit-base-patch32"])


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        load_model(str(tmp_path / "nowhere"))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Unrecognized model in .*config\.json"):
        load_model(str(tmp_path))


def test_pickled_weights_are_not_read(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(tmp_path))


def test_the_models_arguments_reach_it(clip_folder, args):
    model = load_policy(str(clip_folder), None, args(model_init_kwargs={"attn_implementation": "eager"}), None)
    assert model.config._attn_implementation == "eager"


def test_arguments_for_a_model_that_is_an_object_already_are_warned_of(model, args, caplog):
    load_policy(model, None, args(model_init_kwargs={"attn_implementation": "eager"}), None)
    assert "model_init_kwargs are ignored" in caplog.text


# ---- What trains


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        ({}, set()),
        ({"train_text_model": True}, {"text_model", "text_projection"}),
        ({"train_logit_scale": True}, {"logit_scale"}),
    ],
)
def test_the_vision_side_trains_and_the_rest_on_demand(arguments, more, model, args):
    choose_trainable(model, args(**arguments))
    assert parts_that_train(model) == {"vision_model", "visual_projection"} | more


def test_new_adapters_are_all_that_trains(model, args):
    adapted = load_policy(model, None, args(), lora())
    assert isinstance(adapted, PeftModel)
    trains = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trains == {name for name in dict(adapted.named_parameters()) if "lora_" in name}


@pytest.mark.parametrize(("seeds", "same"), [((1, 1), True), ((1, 2), False)])
def test_new_adapters_start_from_the_seed(seeds, same, clip_folder, args):
    first, second = (load_policy(str(clip_folder), None, args(seed=seed), lora()).state_dict() for seed in seeds)
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], second[name]) is same


def test_adapters_may_be_trained_on(model, args, tmp_path, clip_folder):
    get_peft_model(model, lora()).save_pretrained(tmp_path)
    adapted = PeftModel.from_pretrained(CLIPModel.from_pretrained(clip_folder), tmp_path, is_trainable=True)
    assert load_policy(adapted, None, args(), None) is adapted


def test_adapters_on_both_towers_are_accepted_where_the_text_tower_trains(model, args):
    adapted = load_policy(model, None, args(train_text_model=True), lora(BOTH))
    assert any("text_model" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)


def test_adapters_name_the_hubs_base_model_instead_of_a_folder(clip_folder, args):
    config = lora()
    adapted = load_policy(str(clip_folder), None, args(base_model_id="openai/clip-vit-base-patch32"), config)
    assert adapted.peft_config["default"].base_model_name_or_path == "openai/clip-vit-base-patch32"


def test_another_model_may_be_the_reference(model, clip_folder, args):
    assert load_policy(model, CLIPModel.from_pretrained(clip_folder), args(), None) is model


def test_new_adapters_are_off_in_the_reference(model, args):
    pixels = torch.randn(2, 3, 32, 32)
    config = lora()
    base = encode_images(model, pixels).detach()
    adapted = load_policy(model, None, args(), config)
    reference = initial_policy(adapted, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert torch.equal(encode_images(reference, pixels), base)
    assert not torch.allclose(encode_images(adapted, pixels), base)


def test_trained_adapters_stay_on_in_the_reference(model):
    pixels = torch.randn(2, 3, 32, 32)
    adapted = get_peft_model(model, lora(init_lora_weights=False)).eval()
    reference = initial_policy(adapted, None)
    assert torch.equal(encode_images(reference, pixels), encode_images(adapted, pixels))


# ---- What is refused


def frozen_adapters(model, clip_folder, folder):
    get_peft_model(model, lora()).save_pretrained(folder)
    return PeftModel.from_pretrained(CLIPModel.from_pretrained(clip_folder), folder)


def prepare(model, ref_model, args, peft_config):
    choose_trainable(load_policy(model, ref_model, args, peft_config), args)


REFUSED = {
    "vision-model-alone": (
        lambda m, *_: {"model": CLIPVisionModelWithProjection(tiny_config().vision_config)},
        {},
        TypeError,
        "model must be a transformers.CLIPModel",
        "CLIPVisionModelWithProjection",
        "Convert an open_clip checkpoint to the Hugging Face layout",
    ),
    "reference-without-two-towers": (
        lambda m, *_: {"ref_model": CLIPVisionModelWithProjection(tiny_config().vision_config)},
        {},
        TypeError,
        "ref_model must be a transformers.CLIPModel",
        "CLIPVisionModelWithProjection",
    ),
    "reference-is-the-model": (
        lambda m, *_: {"ref_model": m},
        {},
        ValueError,
        "model and ref_model are the same object",
        "Leave ref_model out",
        "load it a second time",
    ),
    "reference-is-inside-the-adapters": (
        lambda m, *_: {"model": get_peft_model(m, lora()), "ref_model": m},
        {},
        ValueError,
        "model and ref_model",
        "inside its adapters",
        "Leave ref_model out",
    ),
    "new-adapters-on-adapters": (
        lambda m, *_: {"model": get_peft_model(m, lora()), "peft_config": lora()},
        {},
        ValueError,
        "peft_config was given with a PeftModel",
        "Leave peft_config out",
        "merge_and_unload()",
    ),
    "frozen-adapters": (
        lambda *given: {"model": frozen_adapters(*given)},
        {},
        ValueError,
        "PeftModel has no trainable parameters",
        "is_trainable=True",
    ),
    "new-adapters-on-the-frozen-text-tower": (
        lambda m, *_: {"peft_config": lora(BOTH)},
        {},
        ValueError,
        "8 trainable adapter parameters are in the text tower",
        r"target_modules=r'.*vision_model.*\.(q_proj|v_proj)'",
        "train_text_model=True",
    ),
    "adapters-on-the-frozen-text-projection": (
        lambda m, *_: {"model": get_peft_model(m, lora(["text_projection"]))},
        {},
        ValueError,
        "are in the text tower",
        "text_projection",
    ),
    "logit-scale-with-new-adapters": (
        lambda m, *_: {"peft_config": lora()},
        {"train_logit_scale": True},
        ValueError,
        "train_logit_scale=True with adapters",
        "Leave it frozen",
    ),
    "logit-scale-with-adapters": (
        lambda m, *_: {"model": get_peft_model(m, lora())},
        {"train_logit_scale": True},
        ValueError,
        "train_logit_scale=True with adapters",
        "train the full model",
    ),
    "arguments-of-the-model-as-a-string": (
        lambda m, clip_folder, _: {"model": str(clip_folder)},
        {"model_init_kwargs": "attn_implementation=eager"},
        ValueError,
        "model_init_kwargs must be a dict",
        "'attn_implementation=eager'",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_together_is_refused_with_a_remedy(case, model, clip_folder, args, tmp_path):
    make, arguments, kind, *parts = case
    given = {"model": model, "ref_model": None, "peft_config": None, **make(model, clip_folder, tmp_path)}
    with pytest.raises(kind) as error:
        prepare(given["model"], given["ref_model"], args(**arguments), given["peft_config"])
    assert not unsaid(error, parts)


# ---- Processors


def test_the_processor_comes_from_where_the_model_came_from(model, args, processor):
    loaded = load_processor(model, args())
    assert torch.equal(
        loaded(images=picture(0), return_tensors="pt")["pixel_values"],
        processor(images=picture(0), return_tensors="pt")["pixel_values"],
    )


def test_a_model_without_a_processor_asks_for_one(model, args, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        load_processor(CLIPModel.from_pretrained(tmp_path), args())
    assert not unsaid(error, ["No processor was given", str(tmp_path), "processing_class=AutoProcessor"])


def test_the_models_own_processor_is_accepted(model, processor):
    check_processor(processor, model)
    check_processor(processor, get_peft_model(model, lora()))


def test_a_processor_of_another_image_size_is_refused(model):
    with pytest.raises(ValueError) as error:
        check_processor(tiny_processor(size=48), model)
    assert not unsaid(error, ["images of 48 pixels", "the model reads 32 x 32", "of the same checkpoint"])


@pytest.mark.parametrize("half", ["image_processor", "tokenizer"])
def test_half_a_processor_is_refused(half, model, processor):
    with pytest.raises(TypeError) as error:
        check_processor(getattr(processor, half), model)
    assert not unsaid(error, ["processing_class must be a processor", type(getattr(processor, half)).__name__])


def test_a_tokenizer_of_more_tokens_than_the_model_knows_is_refused(model):
    processor = tiny_processor()
    processor.tokenizer.add_tokens([f"token{number}" for number in range(20)])
    with pytest.raises(ValueError) as error:
        check_processor(processor, model)
    assert not unsaid(error, ["has 74 tokens", "only 64", "of the same checkpoint"])


@pytest.mark.parametrize("cropped", [True, False])
def test_the_size_of_images_is_that_after_cropping(cropped):
    processor = tiny_processor(32)
    processor.image_processor.do_center_crop = cropped
    processor.image_processor.size = {"shortest_edge": 40}
    assert image_size(processor) == (32 if cropped else 40)


def test_a_saved_processor_is_loaded_by_its_kind(clip_folder, model):
    check_processor(AutoProcessor.from_pretrained(clip_folder), model)


# ---- Names


@pytest.mark.parametrize(
    ("name", "folder"),
    [("openai/clip-vit-base-patch32", "clip-vit-base-patch32-PO"), ("/models/mine/", "mine-PO"), ("clip", "clip-PO")],
)
def test_output_is_named_after_the_model(name, folder):
    assert default_output_dir(name) == folder


def test_output_of_a_model_without_a_name_is_named_clip():
    assert default_output_dir(CLIPModel(tiny_config())) == "clip-PO"
