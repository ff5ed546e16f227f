"""Stale files: what an earlier run of another kind left in a folder is not loaded instead of the model."""

from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from samples import make_trainer, same, weights
from transformers import CLIPModel

from clip_po.concept import ConceptTransform
from clip_po.hub.stale_files import stale_files
from clip_po.models import load_any

FULL, ADAPTER, CONCEPT = (
    {"config.json", "model.safetensors"},
    {"adapter_config.json", "adapter_model.safetensors"},
    {
        "config.json",
        "concept.safetensors",
    },
)


def full(clip_folder, folder):
    return make_trainer(str(clip_folder), folder, max_steps=1, learning_rate=0.1)


def adapters(clip_folder, folder):
    lora = LoraConfig(r=2, target_modules=r".*vision_model.*\.q_proj")
    return make_trainer(str(clip_folder), folder, peft_config=lora, max_steps=1, learning_rate=0.1)


def concept(clip_folder, folder):
    return make_trainer(str(clip_folder), folder, concept=ConceptTransform(16), max_steps=1)


def active_adapter_of_another_name(clip_folder, folder):
    adapted = get_peft_model(CLIPModel.from_pretrained(clip_folder), LoraConfig(r=2, target_modules=["q_proj"]), "own")
    return make_trainer(adapted, folder, train_text_model=True, max_steps=1)


RUNS = {
    "full": (full, FULL),
    "adapters": (adapters, ADAPTER),
    "named-adapters": (active_adapter_of_another_name, ADAPTER),
    "concept": (concept, CONCEPT),
}


def saved_weights(folder):
    names = FULL | ADAPTER | CONCEPT
    return {
        path.name for path in Path(folder).iterdir() if path.name in names or path.suffix in (".safetensors", ".bin")
    }


@pytest.mark.parametrize("second", RUNS)
@pytest.mark.parametrize("first", RUNS)
def test_a_folder_holds_the_files_of_the_last_run_alone(clip_folder, tmp_path, first, second):
    RUNS[first][0](clip_folder, tmp_path).save_model()
    (tmp_path / "notes.txt").touch()
    make, files = RUNS[second]
    trainer = make(clip_folder, tmp_path)
    trainer.save_model()
    assert saved_weights(tmp_path) == files
    assert (tmp_path / "notes.txt").exists()


def test_a_full_model_is_loaded_without_the_adapters_that_were_saved_before_it(clip_folder, tmp_path):
    first = adapters(clip_folder, tmp_path)
    first.train()
    first.save_model()
    second = full(clip_folder, tmp_path)
    second.train()
    second.save_model()
    assert same(weights(CLIPModel.from_pretrained(tmp_path)), weights(second.model))
    first.save_model()
    assert isinstance(load_any(str(tmp_path)), PeftModel)


def test_a_concept_is_not_loaded_as_a_random_model(clip_folder, tmp_path):
    trainer = make_trainer(
        str(clip_folder), tmp_path, concept=ConceptTransform(16), max_steps=2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "elsewhere"))
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        assert saved_weights(folder) == CONCEPT
        with pytest.raises(OSError, match=r"model\.safetensors"):
            CLIPModel.from_pretrained(folder)
    resumed = make_trainer(
        str(clip_folder), tmp_path, concept=ConceptTransform(16), max_steps=2, save_strategy="steps", save_steps=1
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(weights(resumed.model), weights(trainer.model))


def test_shards_of_an_earlier_model_do_not_belong_to_adapters(clip_folder, tmp_path):
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    adapters(clip_folder, tmp_path).save_model()
    assert saved_weights(tmp_path) == ADAPTER
    assert not list(tmp_path.glob("*.index.json"))


def test_nothing_is_stale_beside_its_own_kind():
    assert "model.safetensors" not in stale_files("model")
    assert {"config.json", "model.safetensors"} <= set(stale_files("adapter"))
    assert "config.json" not in stale_files("concept")


@pytest.mark.parametrize("run", ["adapters", "concept"])
def test_the_base_model_is_never_replaced_by_what_needs_it(clip_folder, tmp_path, run):
    model = CLIPModel.from_pretrained(clip_folder)
    model.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in clip_folder.glob("*token*"), clip_folder.glob("*processor*"):
        for file in path:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"output_dir=.* holds the base model"):
        RUNS[run][0](tmp_path, tmp_path)
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_repository_of_the_base_model_takes_no_adapters(clip_folder, tmp_path):
    lora = LoraConfig(r=2, target_modules=r".*vision_model.*\.q_proj")
    with pytest.raises(ValueError, match=r"hub_model_id=.* holds the base model"):
        make_trainer(str(clip_folder), tmp_path, peft_config=lora, hub_model_id=str(clip_folder))
