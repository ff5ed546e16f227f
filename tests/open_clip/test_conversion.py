"""Conversion between open_clip and transformers, against open_clip itself."""

import json
import math

import numpy as np
import pytest
import torch
from harmful import Program
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from samples import IMAGE_SIZE, make_trainer, picture, tiny_config, tiny_processor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from clip_po.cli.main import main
from clip_po.encoding import encode_images, encode_texts
from clip_po.open_clip import from_open_clip, to_open_clip
from clip_po.open_clip.architecture import architecture, clip_config, open_clip_config
from clip_po.open_clip.preprocessing import image_processor, preprocess_cfg
from clip_po.open_clip.weights import to_open_clip as renamed

TEXTS = ["a photo of a cat", "dog", "b"]
VOCABULARY = 54  # of the tiny tokenizer
END = 1

VISION = {"image_size": IMAGE_SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 3.0}
TEXT = {"context_length": 32, "vocab_size": VOCABULARY, "width": 24, "heads": 2, "layers": 3}
POOLED = {"pool_type": "eos", "eos_id": END}


def model_cfg(vision=None, text=None, **overrides):
    return {
        "embed_dim": 16,
        "vision_cfg": {**VISION, **(vision or {})},
        "text_cfg": {**TEXT, **POOLED, **(text or {})},
        **overrides,
    }


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_processor().tokenizer.save_pretrained(folder)
    return str(folder)


def written(folder, weights, config, name="open_clip_model.safetensors", preprocess=None):
    """Write a checkpoint of open_clip."""
    folder.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / name)
    else:
        torch.save(weights, folder / name)
    file = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(file))
    return folder


def random_model(open_clip, config):
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    model = kind(**config).eval()
    for parameter in model.parameters():  # initial biases, norms and class embeddings are too plain to be mixed up
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(model.logit_scale, 2.0)
    return model


def pixels():
    return 4 * torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def token_ids(padding=0):
    """Texts as open_clip's tokenizer pads them."""
    ids = tiny_processor().tokenizer(TEXTS)["input_ids"]
    return torch.tensor([[*row, *[padding] * (TEXT["context_length"] - len(row))] for row in ids])


def check_same_embeddings(theirs, ours):
    """The embeddings of a model of open_clip and of a CLIPModel, normalized, to 1e-5."""
    with torch.no_grad():
        images, texts = theirs.encode_image(pixels(), normalize=True), theirs.encode_text(token_ids(), normalize=True)
    torch.testing.assert_close(encode_images(ours, pixels()).detach(), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(encode_texts(ours, tiny_processor(), TEXTS), texts, atol=1e-5, rtol=0)
    assert images.std(dim=0).mean() > 1e-3
    assert texts.std(dim=0).mean() > 1e-3
    torch.testing.assert_close(ours.logit_scale.detach(), theirs.logit_scale.detach().reshape(()))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({}, "open_clip_model.safetensors"),
        ({"quick_gelu": True}, "open_clip_pytorch_model.bin"),
        ({"custom_text": True}, "open_clip_model.safetensors"),
        ({"nonscalar_logit_scale": True}, "open_clip_model.safetensors"),
        ({"vision": {"norm_kwargs": {"eps": 0.1}}}, "open_clip_model.safetensors"),
        (
            {"vision": {"act_kwargs": {"approximate": "tanh"}}, "text": {"act_kwargs": {"approximate": "tanh"}}},
            "open_clip_model.safetensors",
        ),
        ({"vision": {"patch_dropout": 0.5}}, "open_clip_model.safetensors"),
    ],
)
def test_a_checkpoint_of_open_clip_has_the_same_embeddings(open_clip, tmp_path, words, overrides, name):
    config = model_cfg(**overrides)
    theirs = random_model(open_clip, dict(config))
    source = written(tmp_path / "theirs", theirs.state_dict(), config, name)
    returned = from_open_clip(str(source), str(tmp_path / "ours"), tokenizer=words)
    loaded = CLIPModel.from_pretrained(tmp_path / "ours")
    check_same_embeddings(theirs, loaded)
    check_same_embeddings(theirs, returned)
    processor = CLIPProcessor.from_pretrained(tmp_path / "ours")
    assert processor.tokenizer(TEXTS)["input_ids"] == tiny_processor().tokenizer(TEXTS)["input_ids"]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_a_checkpoint_of_transformers_has_the_same_embeddings_in_open_clip(open_clip, tmp_path, activation):
    config = tiny_config({"hidden_act": activation})
    config.text_config.hidden_act = activation
    config.text_config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    ours = CLIPModel(config).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.save_pretrained(tmp_path / "ours")
    tiny_processor().save_pretrained(tmp_path / "ours")
    flags = ["--model_name_or_path", f"{tmp_path}/ours", "--to", "open_clip", "--output_dir", f"{tmp_path}/theirs"]
    assert main(["convert", *flags]) == 0
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'theirs'}").eval()
    check_same_embeddings(theirs, ours)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'theirs'}")
    assert torch.equal(tokenizer(TEXTS), token_ids(padding=tiny_processor().tokenizer.pad_token_id))
    # and back
    from_open_clip(str(tmp_path / "theirs"), str(tmp_path / "again"))
    again = CLIPModel.from_pretrained(tmp_path / "again")
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in ours.state_dict().items())
    assert again.config.text_config.eos_token_id == END


def test_adapters_are_merged_for_open_clip(open_clip, tmp_path):
    config = tiny_config()
    CLIPModel(config).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        CLIPModel.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_processor().save_pretrained(tmp_path / "adapter")
    to_open_clip(str(tmp_path / "adapter"), str(tmp_path / "theirs"))
    check_same_embeddings(open_clip.create_model(f"local-dir:{tmp_path / 'theirs'}").eval(), adapted)


def test_the_architectures_are_those_of_open_clip(open_clip):
    for name in ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-L-14-336", "ViT-H-14", "ViT-bigG-14", "ViT-g-14"):
        assert architecture(name) == open_clip.get_model_config(name)
        config = clip_config(architecture(name))
        with torch.device("meta"):
            theirs = open_clip.CLIP(**architecture(name))
            ours = CLIPModel(config)
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
        assert config.vision_config.num_attention_heads == theirs.visual.transformer.resblocks[0].attn.num_heads


# CLIPModel can express these with the tokenizer that their files hold.
OTHER_TOKENIZER = ("ViT-L-14-worldwide", "ViT-L-14-worldwide-quickgelu")


def test_every_other_architecture_of_open_clip_is_refused_by_name_or_key(open_clip):
    refused = 0
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        try:
            architecture(name)
        except ValueError:
            refused += 1
            if name not in OTHER_TOKENIZER:
                with pytest.raises(ValueError, match="has"):
                    clip_config(config)
        else:
            clip_config(config)
    assert refused > 80


def test_a_configuration_survives_the_way_back():
    for name in ("ViT-B-16-quickgelu", "ViT-bigG-14", "ViT-e-14"):
        config = clip_config(architecture(name))
        again = clip_config(open_clip_config(config, named_tokenizer=False))
        assert again.vision_config.to_dict() == config.vision_config.to_dict()
        assert again.text_config.to_dict() == config.text_config.to_dict()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"vision": {"layers": [3, 4, 6, 3]}}, "layers"),
        ({"vision": {"timm_model_name": "vit_base"}}, "timm_model_name"),
        ({"vision": {"pool_type": "avg"}}, "pool_type"),
        ({"vision": {"ls_init_value": 1e-4}}, "ls_init_value"),
        ({"vision": {"attentional_pool": True}}, "attentional_pool"),
        ({"vision": {"image_size": [32, 64]}}, "image_size"),
        ({"vision": {"act_kwargs": {"approximate": "tanh"}}, "quick_gelu": True}, "act_kwargs"),
        ({"text": {"hf_model_name": "roberta-base"}}, "hf_model_name"),
        ({"text": {"pool_type": "last"}}, "pool_type"),
        ({"text": {"eos_id": 2}}, "MetaClip2Model"),
        ({"text": {"proj_bias": True}}, "proj_bias"),
        ({"text": {"no_causal_mask": True}}, "no_causal_mask"),
        ({"multimodal_cfg": {"layers": 2}}, "multimodal_cfg"),
        ({"init_logit_bias": -10}, "init_logit_bias"),
        ({"vision": {"layers": 10**9}}, "layers"),
        ({"vision": {"width": "wide"}}, "width"),
    ],
)
def test_what_clip_model_cannot_express_is_refused_by_its_key(overrides, key):
    with pytest.raises((ValueError, TypeError), match=key):
        clip_config(model_cfg(**overrides))


def test_weights_of_another_architecture_are_refused_by_name(tmp_path, words):
    config = clip_config(model_cfg())
    ours = CLIPModel(config)
    weights = renamed(ours.state_dict(), config)
    for changed, message in (
        ({key: w for key, w in weights.items() if key != "visual.ln_pre.bias"}, r"missing.*visual\.ln_pre\.bias"),
        ({**weights, "visual.ln_extra": torch.zeros(2)}, r"not in it.*visual\.ln_extra"),
        ({**weights, "visual.proj": torch.zeros(32, 8)}, r"visual_projection\.weight with \[8, 32\] in place"),
    ):
        source = written(tmp_path / "theirs", changed, model_cfg())
        with pytest.raises(ValueError, match=message):
            from_open_clip(str(source), str(tmp_path / "ours"), tokenizer=words)
        assert not list((tmp_path / "ours").iterdir())


def test_a_checkpoint_of_open_clips_training_is_read(tmp_path, words):
    config = clip_config(model_cfg())
    ours = CLIPModel(config).eval()
    weights = {f"module.{name}": weight for name, weight in renamed(ours.state_dict(), config).items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": {}}, tmp_path / "epoch_3.pt")
    (tmp_path / "model.json").write_text(json.dumps(model_cfg()))  # as in open_clip's model_configs
    flags = ["--model_name_or_path", f"{tmp_path}/epoch_3.pt", "--arch", f"{tmp_path}/model.json"]
    assert main(["convert", *flags, "--tokenizer", words, "--output_dir", f"{tmp_path}/ours"]) == 0
    found = CLIPModel.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in ours.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "{0}/harmful.pt", "--arch", "ViT-B-32"], "not readable as weights alone"),
        (["--model_name_or_path", "{0}/weights.pt", "--arch", "ViT-B-31"], "'ViT-B-31' is unknown"),
        (["--model_name_or_path", "{0}/weights.pt"], "open_clip_config.json"),
        (["--model_name_or_path", "{0}/none.pt", "--arch", "ViT-B-32"], "no open_clip checkpoint"),
        (["--model_name_or_path", "{0}/weights.pt", "--arch", "ViT-B-32", "--to", "open_clip"], "--arch has no"),
        (["--model_name_or_path", "{0}/weights.pt", "--arch", "ViT-B-32"], "The tokenizer of"),
    ],
)
def test_errors_of_the_command(tmp_path, words, capsys, flags, message):
    torch.save(Program(tmp_path / "harmed"), tmp_path / "harmful.pt")
    torch.save({}, tmp_path / "weights.pt")
    given = [flag.format(tmp_path) for flag in flags]
    tokenizer = [] if "open_clip" in given else ["--tokenizer", words]
    if "harmful" in given[1]:  # the weights are read after the tokenizer has been checked
        (tmp_path / "model.json").write_text(json.dumps(model_cfg()))
        given[3] = f"{tmp_path}/model.json"
    assert main(["convert", *given, *tokenizer, "--output_dir", f"{tmp_path}/ours"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "harmed").exists()


def test_a_folder_with_files_is_not_written_to(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds config\.json"):
        from_open_clip("weights.safetensors", str(tmp_path), "ViT-B-32")


def expected_pixels(image, size, mean, std, resample, squash):
    """open_clip's transform for inference, by Pillow and numpy alone."""
    width, height = image.size
    short = min(width, height)
    sides = (size, size) if squash else (int(width * size / short), int(height * size / short))
    resized = image.resize(sides, resample)
    left, top = (round((side - size) / 2) for side in resized.size)
    cropped = resized.crop((left, top, left + size, top + size))
    return ((np.asarray(cropped) / 255 - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("cfg", "mean", "std", "resample", "squash"),
    [
        ({}, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 3, False),
        ({"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}, (0.5,) * 3, (0.5,) * 3, 2, False),
        ({"mean": [0.5] * 3, "std": [0.4] * 3, "resize_mode": "squash"}, (0.5,) * 3, (0.4,) * 3, 3, True),
    ],
)
def test_images_are_prepared_as_open_clip_prepares_them(cfg, mean, std, resample, squash):
    processor = image_processor(cfg, 24)
    image = picture(3).resize((50, 36), Image.Resampling.BICUBIC)
    found = processor(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(found, expected_pixels(image, 24, mean, std, resample, squash), atol=1e-5)
    assert image_processor(preprocess_cfg(processor, 24), 24).to_dict() == processor.to_dict()


@pytest.mark.parametrize(
    ("cfg", "message"), [({"resize_mode": "longest"}, "resize_mode"), ({"interpolation": "area"}, "interpolation")]
)
def test_other_preprocessing_of_open_clip_is_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        image_processor(cfg, 24)


def test_an_image_processor_that_open_clip_lacks_is_refused():
    processor = tiny_processor().image_processor
    with pytest.raises(ValueError, match="shortest_edge"):
        preprocess_cfg(processor, 64)
    processor.do_normalize = False
    with pytest.raises(ValueError, match="do_normalize=False"):
        preprocess_cfg(processor, IMAGE_SIZE)


def test_towers_with_different_activations_are_refused():
    with pytest.raises(ValueError, match="quick_gelu"):
        open_clip_config(tiny_config({"hidden_act": "gelu"}), named_tokenizer=True)


@pytest.mark.parametrize(("width", "inner"), [(1664, 8192), (1408, 6144), (7, 13), (896, 3584)])
def test_the_ratio_of_the_mlp_gives_its_width_back(width, inner):
    config = tiny_config({"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 1})
    ratio = open_clip_config(config, named_tokenizer=True)["vision_cfg"]["mlp_ratio"]
    assert int(width * ratio) == inner
    assert math.isclose(ratio, inner / width)


def test_the_result_loads_in_sentence_transformers(tmp_path, words):
    import sentence_transformers  # takes seconds

    config = clip_config(model_cfg())
    torch.manual_seed(0)
    source = written(tmp_path / "theirs", renamed(CLIPModel(config).state_dict(), config), model_cfg())
    ours = from_open_clip(str(source), str(tmp_path / "ours"), tokenizer=words)
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    texts = torch.tensor(loaded.encode(TEXTS, normalize_embeddings=True))
    torch.testing.assert_close(texts, encode_texts(ours, tiny_processor(), TEXTS), atol=1e-5, rtol=0)
    images = [picture(number, side=40) for number in range(3)]
    found = torch.tensor(loaded.encode(images))
    values = image_processor({}, IMAGE_SIZE)(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(F.normalize(found, dim=-1), encode_images(ours, values).detach(), atol=1e-5, rtol=0)


def test_an_aligned_checkpoint_loads_in_sentence_transformers(tmp_path):
    import sentence_transformers  # takes seconds

    trainer = make_trainer(CLIPModel(tiny_config()), tmp_path, processing_class=tiny_processor(), max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "aligned")
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "aligned"), device="cpu")
    texts = torch.tensor(loaded.encode(TEXTS, normalize_embeddings=True))
    torch.testing.assert_close(texts, encode_texts(trainer.model, tiny_processor(), TEXTS), atol=1e-5, rtol=0)


SENTENCES = [
    "a photo of a cat",
    "A Photo,  of: a CAT!?",
    "it's 2026 (naïve café) 😀",
    "supercalifragilistic " * 30,
    "",
]


def clip_tokenizer(open_clip):
    """CLIP's byte-pair encoding for transformers, from the vocabulary that comes with open_clip."""
    own = open_clip.get_tokenizer("ViT-B-32")
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in own.encoder.items()}
    return own, CLIPTokenizer(vocab=vocabulary, merges=[*own.bpe_ranks], model_max_length=77)


def test_with_the_default_tokenizer_texts_have_the_same_ids_and_embeddings(open_clip, tmp_path):
    own, tokenizer = clip_tokenizer(open_clip)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = {"context_length": 77, "vocab_size": 49_408, "width": 24, "heads": 2, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}  # pooled at the highest id
    theirs = random_model(open_clip, dict(config))
    source = written(tmp_path / "theirs", theirs.state_dict(), config)
    ours = from_open_clip(str(source), str(tmp_path / "ours"), tokenizer=str(tmp_path / "tokenizer"))
    processor = CLIPProcessor.from_pretrained(tmp_path / "ours")
    ids = own(SENTENCES)
    for text, row in zip(SENTENCES, ids.tolist(), strict=True):
        read = processor.tokenizer(text, truncation=True)["input_ids"]
        assert read == row[: row.index(49_407) + 1]
    with torch.no_grad():
        expected = theirs.encode_text(ids, normalize=True)
    torch.testing.assert_close(encode_texts(ours, processor, SENTENCES), expected, atol=1e-5, rtol=0)
    back = to_open_clip(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert not {"hf_tokenizer_name", "pool_type", "eos_id"} & set(back["model_cfg"]["text_cfg"])
    again = open_clip.create_model(f"local-dir:{tmp_path / 'back'}").eval()
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in theirs.state_dict().items())
    assert isinstance(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'back'}"), type(own))
