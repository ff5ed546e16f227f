"""`embeddings_cache` never serves embeddings that this model would not compute."""

import copy

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from samples import IMAGE_SIZE, make_preferences, picture, tiny_config, tiny_processor
from tolerances import LOGPS
from transformers import CLIPModel

from clip_po.candidates import CandidateTexts
from clip_po.data.embedding_cache import image_digest
from clip_po.data.images import to_pixels
from clip_po.reference import ReferencePolicy, embedder_digest

RUN = {"max_steps": 1, "precompute_ref_log_probs": True, "logging_steps": 1}
CHANGES = {int: lambda v: v * 2 or 1, float: lambda v: v * 2 or 0.5, bool: lambda v: not v}
NAMED = {"hidden_act": "relu", "_attn_implementation": "eager"}


def digest(model, processor=None):
    processor = processor or tiny_processor()
    return embedder_digest(ReferencePolicy(model.eval(), processor, CandidateTexts()), processor, "no")


def embeds(model, processor=None):
    pixels = to_pixels(processor or tiny_processor(), [picture(n, 48) for n in range(4)])
    with torch.no_grad():
        return model.eval().get_image_features(pixels).pooler_output


def with_config(model, field, value):
    """The same weights under a changed configuration; None where they do not fit or the model refuses."""
    config = copy.deepcopy(model.config)
    try:
        setattr(config.vision_config, field, value)
        other = CLIPModel(config)
        other.load_state_dict(model.state_dict())
        embeds(other)
    except (RuntimeError, ValueError, TypeError, KeyError, ZeroDivisionError):
        return None
    return other


def test_each_field_of_the_configuration_that_changes_an_embedding_changes_the_name():
    torch.manual_seed(0)
    model = CLIPModel(tiny_config())
    before, name = embeds(model), digest(model)
    assert digest(copy.deepcopy(model)) == name
    changed = set()
    for field, value in model.config.vision_config.to_dict().items():
        change = NAMED.get(field, CHANGES[type(value)](value) if type(value) in CHANGES else None)
        other = None if change is None else with_config(model, field, change)
        if other is not None and not torch.equal(embeds(other), before):
            changed.add(field)
            assert digest(other) != name, field
    assert {"num_attention_heads", "layer_norm_eps", "hidden_act"} <= changed


@pytest.mark.parametrize("setting", [{"lora_alpha": 64}, {"lora_alpha": 16, "use_rslora": True}])
def test_so_does_the_scaling_of_adapters_with_the_same_factors(setting):
    def adapted(**settings):
        torch.manual_seed(0)
        base = CLIPModel(tiny_config())
        config = LoraConfig(r=4, target_modules=r".*vision_model.*\.q_proj", init_lora_weights=False, **settings)
        torch.manual_seed(1)
        return get_peft_model(base, config)

    assert digest(adapted(lora_alpha=16)) == digest(adapted(lora_alpha=16))
    assert digest(adapted(lora_alpha=16)) != digest(adapted(**setting))


def test_so_does_a_hook_in_the_tower():
    torch.manual_seed(0)
    model = CLIPModel(tiny_config())
    name = digest(model)
    model.vision_model.encoder.layers[0].register_forward_hook(lambda _module, _inputs, output: output * 2)
    assert digest(model) != name


def test_so_does_every_setting_of_the_processor():
    torch.manual_seed(0)
    model, name = CLIPModel(tiny_config()), None
    for field, value in {
        "resample": 0,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1.0, 2.0, 3.0],
        "rescale_factor": 0.5,
        "do_normalize": False,
        "size": {"shortest_edge": IMAGE_SIZE + 8},
    }.items():
        processor = tiny_processor()
        name = name or digest(model, processor)
        setattr(processor.image_processor, field, value)
        assert digest(model, processor) != name, field


def test_so_does_the_way_a_column_is_decoded():
    rows = make_preferences(3).select_columns(["image"])
    assert image_digest(rows, "image") == image_digest(make_preferences(3), "image")
    gray = rows.cast_column("image", datasets.Image(mode="L"))
    assert image_digest(gray, "image") != image_digest(rows, "image")


@pytest.mark.parametrize("field", ["num_attention_heads", "layer_norm_eps", "hidden_act"])
def test_a_run_with_another_configuration_starts_at_its_own_reference(make_trainer, clip_folder, tmp_path, field):
    cache = {"embeddings_cache": str(tmp_path / "cache")}
    model = CLIPModel.from_pretrained(clip_folder)
    make_trainer(model=model, **cache).train()
    value = {"num_attention_heads": 4, "layer_norm_eps": 0.1, "hidden_act": "relu"}[field]
    trainer = make_trainer(
        model=with_config(CLIPModel.from_pretrained(clip_folder), field, value),
        **cache,
        processing_class=tiny_processor(),
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=LOGPS)
    assert first["kl"] == pytest.approx(0.0, abs=LOGPS)
