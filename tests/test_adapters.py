"""Adapters of every kind start from the model as it is, and load in plain PEFT as they were trained."""

import math

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from samples import PROMPTS, picture, same, tiny_processor, weights
from tolerances import LOGPS
from transformers import CLIPModel

from clip_po.adapters import add_adapters
from clip_po.models import load_any
from clip_po.reference import initial_policy

RUN = {"max_steps": 3, "learning_rate": 0.05, "logging_steps": 1}
TARGETS = r".*vision_model.*\.(q_proj|v_proj)"


def lora(**settings):
    return LoraConfig(r=4, target_modules=TARGETS, **settings)


def of(kind, **settings):
    return lambda: getattr(peft, kind)(target_modules=TARGETS, **settings)


KINDS = {
    **{f"lora-{weights}": lambda weights=weights: lora(init_lora_weights=weights) for weights in (True, "gaussian")},
    **{name: lambda name=name: lora(init_lora_weights=name) for name in ("pissa", "pissa_niter_4", "olora", "eva")},
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True),
    "pissa-dora": lambda: lora(init_lora_weights="pissa", use_dora=True),
    "olora-ranks": lambda: lora(init_lora_weights="olora", rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5}),
    "pissa-modules-to-save": lambda: lora(init_lora_weights="pissa", modules_to_save=["visual_projection"]),
    **({"lora-bias": lambda: lora(bias="lora_only")} if Version(peft.__version__) >= Version("0.21") else {}),
    "lora-conv": lambda: LoraConfig(r=4, target_modules=r".*vision_model.*(patch_embedding|q_proj)"),
    "modules-to-save": lambda: lora(modules_to_save=["visual_projection"]),
    "loha": of("LoHaConfig", r=4),
    "lokr": of("LoKrConfig", r=4),
    "ia3": of("IA3Config", feedforward_modules=[]),
    "boft": of("BOFTConfig", boft_block_size=4),
    "oft": of("OFTConfig", r=4, oft_block_size=0),
    "vera": of("VeraConfig", r=4),
    "hra": of("HRAConfig", r=4),
    "fourier": of("FourierFTConfig", n_frequency=20, init_weights=True),
    "randlora": of("RandLoraConfig", r=4),
    "c3a": of("C3AConfig", block_size=8, init_weights=True),
    "layer-norms": lambda: peft.LNTuningConfig(target_modules=r".*vision_model.*layer_norm1"),
}


def embeddings(model):
    encoder = model.eval().get_base_model() if isinstance(model, PeftModel) else model.eval()
    processor = tiny_processor()
    inputs = processor(
        images=[picture(number) for number in range(3)], text=PROMPTS, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        outputs = encoder(**inputs)
    return torch.cat([outputs.image_embeds, outputs.text_embeds])


def close(first, second, bound=1e-5):
    return (first - second).abs().max() <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_from_the_model_and_plain_peft_loads_what_was_trained(
    make_trainer, clip_folder, kind, tmp_path
):
    base = embeddings(CLIPModel.from_pretrained(clip_folder))
    trainer = make_trainer(
        model=CLIPModel.from_pretrained(clip_folder),
        peft_config=KINDS[kind](),
        processing_class=tiny_processor(),
        loss_type="sigmoid",
    )
    assert close(embeddings(trainer.model), base)
    assert close(embeddings(trainer.reference.model), base)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss/preference"] == pytest.approx(math.log(2), abs=LOGPS)
    assert first["kl"] == pytest.approx(0.0, abs=LOGPS)
    assert close(embeddings(trainer.reference.model), base)
    trained = embeddings(trainer.model)
    assert not close(trained, base)
    trainer.save_model(str(tmp_path / "saved"))
    torch.manual_seed(123)
    assert close(
        embeddings(PeftModel.from_pretrained(CLIPModel.from_pretrained(clip_folder), tmp_path / "saved")), trained
    )
    assert close(embeddings(load_any(str(tmp_path / "saved"))), trained)


@pytest.mark.parametrize("initial", ["pissa", "olora", "pissa_niter_2"])
def test_adapters_that_change_the_base_resume_exactly(make_trainer, initial):
    arguments = {"peft_config": lora(init_lora_weights=initial), "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(folder="whole", **arguments)
    whole.train()
    cut = make_trainer(folder="cut", **arguments)
    cut.train()
    resumed = make_trainer(folder="cut", **arguments)
    resumed.train(resume_from_checkpoint=str(cut.args.output_dir + "/checkpoint-2"))
    assert same(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: lora(init_lora_weights=False), "before any training"),
        (of("FourierFTConfig", n_frequency=10), "before any training"),
        (lambda: lora(init_lora_weights="corda"), "would not load as they were trained"),
        (lambda: lora(use_dora=True, init_lora_weights=False), "before any training"),
        (of("VBLoRAConfig", vector_length=8, num_vectors=16), "before any training"),
        (of("LoHaConfig", init_weights=False), "before any training"),
        (of("PolyConfig"), r"does not fit the model \(ValueError: task_ids"),
        (lambda: peft.XLoraConfig(adapters={}, hidden_size=32), "does not fit the model"),
        (lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=10), "could not be resumed exactly"),
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=2), "virtual tokens"),
        (lambda: peft.PrefixTuningConfig(num_virtual_tokens=2), "virtual tokens"),
        (lambda: LoraConfig(target_modules=["no_such_layer"]), "Target layers of its vision tower"),
        (lambda: LoraConfig(target_modules=["vision_model"]), "Target layers of its vision tower"),
    ],
)
def test_adapters_that_would_not_start_or_load_so_are_refused(make_trainer, config, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(peft_config=config())


def test_a_model_with_adapters_that_would_load_otherwise_is_refused(make_trainer, model):
    adapted = get_peft_model(model, lora(init_lora_weights="pissa_niter_2"))
    with pytest.raises(ValueError, match="draws anew"):
        make_trainer(model=adapted)


def test_lora_ga_is_refused(make_trainer):
    try:
        config = lora(init_lora_weights="lora_ga")
    except ValueError:
        pytest.skip("this version of peft has no LoRA-GA")
    with pytest.raises(ValueError, match="init_lora_weights='lora_ga' computes new base weights"):
        make_trainer(peft_config=config)


def test_eva_without_data_is_named(make_trainer, caplog):
    make_trainer(peft_config=lora(init_lora_weights="eva"))
    assert "init_lora_weights='eva' saw no data" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda adapted: adapted.merge_adapter(), r"\['default'\] of the PeftModel are merged.*unmerge_adapter"),
        (lambda adapted: adapted.base_model.disable_adapter_layers(), "are disabled.*enable_adapter_layers"),
    ],
    ids=["merged", "disabled"],
)
def test_adapters_that_take_no_part_are_refused(make_trainer, model, change, said):
    adapted = get_peft_model(model, lora(init_lora_weights=False))
    change(adapted)
    with pytest.raises(ValueError, match=said):
        make_trainer(model=adapted)


def test_an_active_adapter_of_another_name_comes_back_as_it_was_trained(make_trainer, clip_folder, caplog):
    def adapted():
        torch.manual_seed(3)
        model = get_peft_model(CLIPModel.from_pretrained(clip_folder), lora(init_lora_weights=False))
        model.add_adapter("second", lora(init_lora_weights=False))
        model.set_adapter("second")
        return model

    settings = {"save_strategy": "steps", "save_steps": 2, "processing_class": tiny_processor()}
    trainer = make_trainer(model=adapted(), **settings)
    assert "Only the active one, 'second'" in caplog.text
    trainer.train()
    trainer.save_model()
    trained = embeddings(trainer.model)
    for loaded in (load_any(trainer.args.output_dir), load_any(f"{trainer.args.output_dir}/checkpoint-3")):
        assert close(embeddings(loaded), trained)
    resumed = make_trainer(model=adapted(), folder="run", **settings)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    assert close(embeddings(resumed.model), trained, 0.0)
    several = adapted()
    several.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one adapter is trained and saved"):
        make_trainer(model=several, processing_class=tiny_processor())


def test_a_reference_of_unchanged_weights_shares_them(model):
    adapted = add_adapters(model, lora(), seed=0)
    reference = initial_policy(adapted, lora())
    layer = "base_model.model.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert dict(reference.named_parameters())[layer] is dict(adapted.named_parameters())[layer]
