"""Stale files in a repository: the commit of a push deletes what an earlier run of another kind pushed."""

import json

import pytest
from peft import LoraConfig

from clip_po.concept import ConceptTransform

LORA = {"r": 2, "target_modules": r".*vision_model.*\.q_proj"}
FULL, ADAPTER = {"config.json", "model.safetensors"}, {"adapter_config.json", "adapter_model.safetensors"}
CONCEPT = {"config.json", "concept.safetensors"}
KINDS = {
    "full": (dict, FULL),
    "adapters": (lambda: {"peft_config": LoraConfig(**LORA)}, ADAPTER),
    "concept": (lambda: {"concept": ConceptTransform(16)}, CONCEPT),
}


@pytest.fixture
def push(make_trainer, hub):
    def make(folder, **arguments):
        settings = {"push_to_hub": True, "hub_model_id": "me/mine", "max_steps": 2, **arguments}
        trainer = make_trainer(folder=folder, **settings)
        trainer.train()
        trainer.push_to_hub()

    return make


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_a_repository_holds_the_files_of_the_last_run_alone(hub, push, first, second):
    push("first", **KINDS[first][0]())
    hub.files["me/mine"]["notes.txt"] = b"mine"
    commits = len(hub.commits["me/mine"])
    arguments, kept = KINDS[second]
    push("second", **arguments())
    files = set(hub.files["me/mine"])
    assert files & (FULL | ADAPTER | CONCEPT) == kept
    assert {"notes.txt", "README.md", "training_args.json"} <= files
    assert len(hub.commits["me/mine"]) == commits + 1  # in the commit of the model, not after it


def test_pushed_checkpoints_hold_their_own_kind_alone(hub, push):
    saves = {"hub_strategy": "checkpoint", "save_strategy": "steps", "save_steps": 2}
    push("first", peft_config=LoraConfig(**LORA), **saves)
    push("second", **saves)
    files = {path.removeprefix("last-checkpoint/") for path in hub.files["me/mine"] if path.startswith("last-")}
    assert files & (FULL | ADAPTER) == FULL
    assert json.loads(hub.files["me/mine"]["config.json"])["model_type"] == "clip"
