"""What is published: no secret in the settings, and a card that loads again."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from peft import LoraConfig

from clip_po.evaluation.tables import format_table
from clip_po.hub.card import model_card
from clip_po.training.checkpoints import MARK


def card(tmp_path, **changes):
    """A card, saved and loaded again."""
    arguments = {
        "model_name": "robust-clip",
        "base_model": "openai/clip-vit-base-patch32",
        "loss_types": ["sigmoid", "sft"],
        "settings": {"beta": 1.0, "loss_type": ["sigmoid", "sft"], "hub_token": "hf_abc"},
        "metrics": {"eval_loss": 0.123456, "eval_kl": 2.0},
    }
    model_card(**{**arguments, **changes}).save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_metadata_is_what_the_hub_reads(tmp_path):
    data = card(tmp_path).data
    assert data.base_model == "openai/clip-vit-base-patch32"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert {"clip", "clip_po", "preference-optimization", "sft", "sigmoid"} == set(data.tags)


def test_text_says_what_was_done_and_measured(tmp_path):
    text = card(tmp_path).text
    assert "# robust-clip" in text
    assert "(DPO + cross-entropy)" in text
    assert "| eval_loss | 0.1235 |" in text
    assert "| beta | 1.0 |" in text
    assert 'CLIPModel.from_pretrained("robust-clip")' in text


def test_card_holds_no_secret(tmp_path):
    loaded = card(tmp_path)
    assert "hf_abc" not in loaded.content
    assert '| hub_token | "&lt;redacted>" |' in loaded.text


def test_adapters_are_loaded_onto_their_base(tmp_path):
    loaded = card(tmp_path, kind="adapter")
    assert loaded.data.library_name == "peft"
    assert 'PeftModel.from_pretrained(CLIPModel.from_pretrained("openai/clip-vit-base-patch32"), "robust-clip")' in (
        loaded.text
    )


def test_a_folder_is_no_base_model_of_the_hub(tmp_path):
    assert card(tmp_path, base_model=str(tmp_path)).data.base_model is None


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({"metrics": {}}, "Nothing was measured yet."),
        ({"report": "| clean | typographic |\n|---|---|\n| 0.9 | 0.8 |"}, "| 0.9 | 0.8 |"),
    ],
)
def test_measurements_may_be_missing_or_a_report(measured, said, tmp_path):
    text = card(tmp_path, **measured).text
    assert said in text
    assert "eval_loss" not in text


@pytest.mark.parametrize(
    ("settings", "loss_types", "claims"),
    [
        ({"reg_weight": 0.5}, ["sigmoid"], {"keeps the rest", "rather than another"}),
        ({"reg_weight": 0.0}, ["sigmoid"], {"without regularization", "rather than another"}),
        ({"reg_weight": 0}, ["sft"], {"without regularization"}),
        ({}, ["ipo", "sft"], {"rather than another"}),
    ],
)
def test_the_card_claims_only_what_was_trained(settings, loss_types, claims, tmp_path):
    text = card(tmp_path, settings=settings, loss_types=loss_types).text
    all_claims = ("keeps the rest", "without regularization", "rather than another")
    assert {claim for claim in all_claims if claim in text} == claims


EVIL = 'a|b <script>x</script>\n---\nlicense: mit\n# **h** [l](http://e) `c` "q'


def test_text_in_a_card_is_only_text(tmp_path):
    settings = {"note": EVIL, EVIL: 1, "reg_weight": 1}
    loaded = card(tmp_path, model_name=EVIL, base_model=EVIL, settings=settings, loss_types=[EVIL])
    assert loaded.data.model_name == EVIL
    assert loaded.data.license is None
    prose, code = loaded.text.split("```python")[0] + loaded.text.split("```\n")[-1], loaded.text.split("```")[1]
    assert "<script>" not in re.sub("(`+) .*? \\1", "", prose)
    assert not re.search(r"(?<!\\)\[l\]|(?<!\\)\*\*h", re.sub("(`+) .*? \\1", "", prose))
    assert [line for line in loaded.text.splitlines() if line.startswith("#")] == [
        line for line in loaded.text.splitlines() if line.startswith(("# a", "## What was measured", "## Settings"))
    ]
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert "license: mit" not in loaded.text.splitlines()
    ast.parse(code.removeprefix("python"))


def test_names_in_a_measured_table_are_only_text():
    row = format_table(["model", "clean"], [[EVIL, 0.5]]).splitlines()[-1]
    assert "<script>" not in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, target_modules=r".*vision_model.*\.(q_proj|v_proj)")])
def test_nothing_that_is_published_names_a_folder_of_this_machine(lora, make_trainer, tmp_path):
    trainer = make_trainer(peft_config=lora, embeddings_cache=str(tmp_path / "cache"))
    folder = Path(trainer.args.output_dir)
    for save in (
        trainer.save_model,
        trainer.create_model_card,
        trainer.save_model,
    ):  # PEFT changes cards that it finds
        save()
        published = [folder / name for name in ("README.md", "training_args.json") if (folder / name).exists()]
        assert not [file for file in published if str(tmp_path.parent) in file.read_text()]
    assert json.loads((folder / "training_args.json").read_text())["embeddings_cache"] == "cache"
    assert "aligned by preference optimization" in (folder / "README.md").read_text()


TOKEN = "hf_" + "s3cret" * 6
STRATEGIES = {"end": 1, "every_save": 3, "checkpoint": 5}
"""How many commits each makes of a run with two checkpoints."""


@pytest.fixture(scope="module")
def pushed(clip_folder, tmp_path_factory):
    """The Hub after a push by each strategy, the folder that the runs wrote, and what they said."""
    folder, tests = tmp_path_factory.mktemp("aligned"), Path(__file__).parents[1]
    with FakeHub() as hub:
        environment = {
            **{k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"},
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent))),
        }
        command = [sys.executable, tests / "push_worker.py", clip_folder, folder, TOKEN, *STRATEGIES]
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return hub, folder, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_push_carries_a_card_and_no_pickle_and_no_token(pushed, strategy):
    hub, folder, said = pushed
    files = hub.files[f"me/{strategy}"]
    assert {"model.safetensors", "config.json", "README.md", "training_args.json"} <= set(files)
    assert not [n for n in files if n.endswith((".bin", ".pt", ".pth")) and not n.startswith("last-checkpoint/")]
    assert not [n for n in files if n.endswith(".bin")]
    assert ("last-checkpoint/optimizer.pt" in files) == (strategy == "checkpoint")
    assert (f"last-checkpoint/{MARK}" in files) == (strategy == "checkpoint")  # so that it can be resumed from
    assert len(hub.commits[f"me/{strategy}"]) == STRATEGIES[strategy]
    card = files["README.md"].decode()
    assert "base_model: openai/clip-vit-base-patch32" in card
    assert "eval_rewards/accuracies" in card
    written = [path for path in (folder / strategy).rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert not [body for body in hub.bodies if TOKEN.encode() in body]
    assert TOKEN not in said
