"""What is published: no secret in the settings, and a card that loads again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub
from huggingface_hub import ModelCard

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
    assert '| hub_token | "<redacted>" |' in loaded.text


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


@pytest.mark.xdist_group("pushes")
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
