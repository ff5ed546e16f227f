"""Files that would exhaust memory or time, or lead elsewhere, are refused in one sentence, and soon."""

import json
import os
import shutil
import struct
import time

import pytest
from peft import LoraConfig, get_peft_model
from samples import make_labelled
from transformers import CLIPModel

from clip_po.bounded_text import parse_json, parse_yaml
from clip_po.cli.main import main
from clip_po.data.loading import load_split
from clip_po.evaluation.fairness.queries import load_queries
from clip_po.evaluation.report.report_file import read_report
from clip_po.evaluation.suites.suite import load_suite
from clip_po.models import load_any, load_model, read_processor

DEEP = "[" * 100_000 + "]" * 100_000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.fixture(autouse=True)
def soon():
    """Every refusal takes seconds, not minutes."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 20


@pytest.fixture
def folder(clip_folder, tmp_path):
    return shutil.copytree(clip_folder, tmp_path / "model")


@pytest.fixture
def sharded(clip_folder, tmp_path):
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


@pytest.fixture
def adapters(clip_folder, tmp_path):
    lora = LoraConfig(r=2, target_modules=r".*vision_model.*\.(q_proj|v_proj)")
    get_peft_model(CLIPModel.from_pretrained(clip_folder), lora).save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters"


def change(file, **values):
    """Change values of a JSON file; a name such as text_config__vocab_size leads into an object."""
    settings = json.loads(file.read_text())
    for name, value in values.items():
        *parts, last = name.split("__")
        inner = settings
        for part in parts:
            inner = inner[part]
        inner[last] = value
    file.write_text(json.dumps(settings))


# ---- Index of shards


def test_shards_are_loaded(sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 1
    load_model(str(sharded))


@pytest.mark.parametrize("where", ["../model/model.safetensors", "/etc/model.safetensors", "C:\\model.safetensors"])
def test_an_index_that_names_a_path_outside_its_folder_is_refused(where, sharded, folder):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change(index, weight_map={**weight_map, "logit_scale": where})
    for load in (load_model, load_any):
        with pytest.raises(ValueError, match="outside the checkpoint folder"):
            load(str(sharded))


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"logit_scale": "pytorch_model.bin"}, "safetensors only"),
        ({"logit_scale": "other.safetensors"}, "does not exist"),
        ({"logit_scale": 3}, "no weight_map"),
        ([], "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_an_index_that_names_something_else_is_refused(weight_map, said, sharded):
    (sharded / "pytorch_model.bin").touch()
    change(sharded / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ValueError, match=said):
        load_model(str(sharded))


# ---- Sizes


@pytest.mark.parametrize(
    ("field", "size"),
    [
        ("text_config__num_hidden_layers", 10**6),
        ("vision_config__num_hidden_layers", 10**6),
        ("text_config__vocab_size", 10**12),
        ("vision_config__image_size", 10**9),
        ("text_config__hidden_size", 10**9),
        ("vision_config__intermediate_size", 10**12),
        ("text_config__max_position_embeddings", 10**12),
        ("vision_config__patch_size", 0),
        ("vision_config__num_channels", -3),
        ("projection_dim", 10**12),
        ("text_config__vocab_size", 9_000_000),  # possible, but not with these weights
        ("vision_config__num_hidden_layers", 900),
        ("vision_config__image_size", 9_000),
        ("text_config__vocab_size", "many"),
        ("text_config__vocab_size", 1.5),
        ("text_config", 3),
    ],
)
def test_a_config_of_absurd_size_is_refused(field, size, folder):
    change(folder / "config.json", **{field: size})
    for load in (load_model, load_any):
        with pytest.raises(ValueError, match=r"config\.json"):
            load(str(folder))


def test_a_processor_of_absurd_size_is_refused(folder):
    change(folder / "processor_config.json", image_processor__size={"shortest_edge": 10**9})
    with pytest.raises(ValueError, match="shortest_edge=1000000000, but it must be from 1 to 10,000 pixels"):
        read_processor(folder)


def test_adapters_of_absurd_rank_are_refused(adapters):
    change(adapters / "adapter_config.json", r=10**9)
    with pytest.raises(ValueError, match="r=1000000000"):
        load_any(str(adapters))


@pytest.mark.parametrize("header", [2**62, 10**9, 8])
def test_a_tensor_header_that_claims_too_much_is_refused(header, folder):
    claim = b'{"logit_scale":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    length = len(claim) if header == 8 else header
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + claim + b"\0" * 400_000)
    with pytest.raises(ValueError, match="are not readable"):
        load_model(str(folder))


# ---- Texts


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_deep_json_in_a_checkpoint_is_refused(file, folder):
    (folder / file).write_text(DEEP)
    for load in (load_model, load_any, read_processor):
        with pytest.raises(ValueError, match=rf"{file} of .* is not readable as JSON \(.*nested too deeply"):
            load(str(folder))


def test_deep_json_of_adapters_is_refused(adapters):
    (adapters / "adapter_config.json").write_text(DEEP)
    with pytest.raises(ValueError, match="nested too deeply"):
        load_any(str(adapters))


@pytest.mark.parametrize("file", ["config.json", "chat_template.jinja", "merges.txt", "tokenizer.json"])
def test_a_text_of_absurd_size_is_refused(file, folder):
    with open(folder / file, "wb") as sparse:
        sparse.truncate(2**40)
    for load in (load_model, read_processor):
        with pytest.raises(ValueError, match=f"{file}.* has 1,099,511,627,776 bytes"):
            load(str(folder))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_not_waited_for(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    os.mkfifo(folder / "chat_template.jinja")
    with pytest.raises(ValueError, match="not a regular file"):
        read_processor(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "chat_template.jinja", "tokenizer_config.json"])
def test_a_link_out_of_the_folder_is_not_followed(file, folder, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(tmp_path / "secret")
    for load in (load_model, read_processor):
        with pytest.raises(ValueError, match=r"is a link to .*outside the checkpoint folder"):
            load(str(folder))


def test_links_inside_a_folder_and_in_the_cache_of_the_hub_are_followed(clip_folder, folder, tmp_path):
    load_model(str(linked(clip_folder, tmp_path / "hub" / "snapshots" / "1", tmp_path / "hub" / "blobs")))
    load_model(str(linked(clip_folder, tmp_path / "own", tmp_path / "own" / "blobs")))
    (tmp_path / "alias").symlink_to(folder)
    load_model(str(tmp_path / "alias"))


def linked(clip_folder, folder, blobs):
    shutil.copytree(clip_folder, blobs)
    folder.mkdir(parents=True, exist_ok=True)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


# ---- YAML


def test_yaml_with_ordinary_aliases_is_read():
    text = "base: &base {beta: 1.0}\nmethods:\n  DPO: {<<: *base, loss_type: sigmoid}\n  again: *base\n"
    assert parse_yaml(text)["methods"] == {"DPO": {"beta": 1.0, "loss_type": "sigmoid"}, "again": {"beta": 1.0}}
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "aliases stand for"),
        (BOMB + "merged: {<<: [" + ", ".join([f"&m{i} {{k{i}: *a11}}" for i in range(9)]) + "]}", "aliases stand for"),
        ("a: &a [*a]", "contains it"),
        ("a: &a {b: {c: *a}}", "contains it"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: [", "expected"),
    ],
)
def test_yaml_bombs_are_refused(text, said, tmp_path, capsys):
    with pytest.raises(ValueError, match=said):
        parse_yaml(text)
    file = tmp_path / "file.yaml"
    file.write_text(text)
    for load in (load_queries, load_suite):
        with pytest.raises(ValueError, match="is not valid YAML"):
            load(str(file))
    assert main(["train", "--config", str(file)]) == 2
    assert "is not a YAML file" in capsys.readouterr().err


def test_a_suite_that_includes_itself_is_refused(tmp_path):
    file = tmp_path / "suite.yaml"
    file.write_text(f"measures: [clean]\nentries: []\ninclude: [{file}]\n")
    with pytest.raises(ValueError, match=r"includes .*, which includes it"):
        load_suite(str(file))


def test_a_yaml_bomb_in_the_card_of_a_dataset_is_refused(tmp_path):
    make_labelled(4).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "README.md").write_text(f"---\n{BOMB}---\n")
    with pytest.raises(ValueError, match="aliases stand for"):
        load_split(str(tmp_path), "train", None, "image")


def test_deep_json_elsewhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    (tmp_path / "report.json").write_text(DEEP)
    with pytest.raises(ValueError, match="not valid JSON"):
        read_report(tmp_path / "report.json")
