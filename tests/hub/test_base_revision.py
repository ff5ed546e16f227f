"""The revision of the base model: adapters keep it, and are loaded onto it."""

import json

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from samples import TINY_RUN, make_trainer, same, weights, write_parquet
from transformers import CLIPModel

from clip_po import models
from clip_po.cli.main import main


@pytest.fixture
def base(hub, clip_folder):
    """A base model on the Hub."""
    hub.files["me/base"] = {path.name: path.read_bytes() for path in clip_folder.iterdir()}
    return "me/base"


def lora(**arguments):
    return LoraConfig(r=2, target_modules=r".*vision_model.*\.q_proj", **arguments)


def by_name(base):
    return {"model": base, "peft_config": lora(), "model_init_kwargs": {"revision": "v1"}}


def by_config(base):
    return {"model": CLIPModel.from_pretrained(base), "peft_config": lora(revision="v1")}


def with_adapters(base):
    return {"model": get_peft_model(CLIPModel.from_pretrained(base), lora(), revision="v1")}


def saved_revision(folder):
    return json.loads((folder / "adapter_config.json").read_text())["revision"]


@pytest.mark.parametrize("given", [by_name, by_config, with_adapters])
def test_adapters_keep_the_revision_of_their_base_and_load_onto_it(hub, base, tmp_path, given):
    arguments = given(base)
    trainer = make_trainer(arguments.pop("model"), tmp_path, max_steps=1, learning_rate=0.1, **arguments)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert saved_revision(tmp_path) == "v1"
    code = 'CLIPModel.from_pretrained("me/base", revision="v1")'
    assert code in ModelCard.load(tmp_path / "README.md").text
    hub.requests.clear()
    loaded = models.load_any(str(tmp_path))
    assert isinstance(loaded, PeftModel)
    assert same(weights(loaded), weights(trainer.model))
    asked = [path for _, path, _ in hub.requests if "me/base" in path]
    assert any("/v1" in path for path in asked)
    assert not any("/main" in path for path in asked)
    again = make_trainer(
        PeftModel.from_pretrained(loaded.unload(), str(tmp_path), is_trainable=True), tmp_path / "again"
    )
    again.save_model()
    assert saved_revision(tmp_path / "again") == "v1"


def test_adapters_of_a_folder_keep_none(clip_folder, tmp_path):
    make_trainer(str(clip_folder), tmp_path, peft_config=lora()).save_model()
    assert saved_revision(tmp_path) is None


def test_adapters_of_another_base_model_id_keep_none(base, tmp_path):
    make_trainer(base, tmp_path, peft_config=lora(), base_model_id="you/same").save_model()
    assert saved_revision(tmp_path) is None


def test_the_command_keeps_the_revision(base, tmp_path):
    data = ["--dataset_name", str(write_parquet(tmp_path, train=16)), "--model_name_or_path", base]
    flags = [*data, "--model_revision", "v1", "--use_peft", "--lora_r", "2", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *flags, "--save_strategy", "no", *TINY_RUN]) == 0
    assert saved_revision(tmp_path / "run") == "v1"
