"""A transformation on the Hub: pushed, loaded by name, revision and token, from safetensors only."""

import copy
import json

import pytest
import torch
from huggingface_hub import ModelHubMixin
from safetensors.torch import save_file

from clip_po.cli.main import main
from clip_po.concept.transform import CONCEPT_FILE, ConceptTransform
from clip_po.hub.retries import HubError

TOKEN = "hf_" + "s3cret" * 6


@pytest.fixture
def concept():
    return ConceptTransform(16, 8, towers="each", start="orthogonal", seed=3)


def test_a_transformation_comes_back_from_the_hub(hub, concept):
    concept.push_to_hub("me/concept", token=TOKEN, private=True)
    assert set(hub.files["me/concept"]) == {CONCEPT_FILE, "config.json", "README.md"}
    assert json.loads(hub.files["me/concept"]["config.json"])["output_dim"] == 8
    for load in (ConceptTransform.from_pretrained, ConceptTransform.load):
        loaded = load("me/concept", revision="v1", token=TOKEN)
        assert loaded.towers == "each"
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), concept.parameters(), strict=True))
    downloads = [(path, token) for _, path, token in hub.requests if "/resolve/" in path]
    assert downloads
    assert all("/resolve/v1/" in path and token == f"Bearer {TOKEN}" for path, token in downloads)


def test_the_card_says_how_to_load_it(hub, concept):
    concept.push_to_hub("me/concept")
    card = hub.files["me/concept"]["README.md"].decode()
    assert "ConceptTransform.from_pretrained" in card
    assert "library_name: clip_po" in card
    assert "clip_po" in card


def test_a_busy_hub_is_asked_again(hub, concept):
    hub.failures = {"/api/repos/create": [(503, {})], "/commit/main": [(412, {}), (429, {"Retry-After": "3"})]}
    concept.push_to_hub("me/concept")
    assert len(hub.commits["me/concept"]) == 1


def test_refusals_and_missing_files_are_said(hub):
    hub.failures = {"/me/secret/": [(401, {})] * 9, "/me/gated/": [(403, {})] * 9}
    with pytest.raises(HubError, match="hf auth login"):
        ConceptTransform.from_pretrained("me/secret")
    with pytest.raises(HubError, match="may not"):
        ConceptTransform.from_pretrained("me/gated")
    with pytest.raises(FileNotFoundError, match=r"'me/other' does not contain concept\.safetensors"):
        ConceptTransform.from_pretrained("me/other")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        ConceptTransform.from_pretrained("/no/such/folder")


def test_a_pickle_is_never_read(hub, concept, tmp_path):
    torch.save(concept.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"dim": 16}))
    with pytest.raises(FileNotFoundError, match=CONCEPT_FILE):
        ConceptTransform.from_pretrained(tmp_path)


def test_sizes_come_from_the_weights_not_from_what_a_file_claims(tmp_path):
    metadata = {"towers": "shared", "dim": str(10**9), "output_dim": str(10**9)}
    save_file({"image_weight": torch.eye(4)}, tmp_path / CONCEPT_FILE, metadata=metadata)
    with pytest.raises(ValueError, match="not 1000000000 x 1000000000"):
        ConceptTransform.from_pretrained(tmp_path)


def test_a_saved_transformation_is_no_clip_model(concept, tmp_path):
    assert isinstance(concept, ModelHubMixin)
    concept.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", CONCEPT_FILE, "config.json"]
    assert (copy.deepcopy(concept).dim, ConceptTransform(4).at(0.5).dim) == (16, 4)


def test_steer_names_a_transformation_that_is_not_there(tmp_path, capsys):
    assert main(["steer", "--transform", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    assert CONCEPT_FILE in capsys.readouterr().err
