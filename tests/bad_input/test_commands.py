"""clip-po refuses what it can't use in one line, before it loads or computes anything."""

import json
from pathlib import Path

import pytest
from bad_input import test_config, test_images, test_models, test_rows, test_training
from samples import make_labelled

from clip_po.cli.main import INTERRUPTED, main

LEAST = 60
"""Cases of bad input that there must be, over all tables."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_labelled(8).save_to_disk(folder)
    return folder


def broken_task(folder):
    """A checkpoint's folder whose task can't be read."""
    (folder / "clip_po_task.json").write_text('{"class_names": ["cat"]')
    (folder / "config.json").write_text("{}")
    return folder


def recipe(folder, text):
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def a_file(folder):
    file = folder / "file"
    file.write_text("")
    return file


# name: (the command line by folders, pieces of its message)
CASES = {
    "no-data": (lambda f, c, d: ["train", "--model_name_or_path", c], ("--dataset_name is missing", "a folder of")),
    "no-model": (
        lambda f, c, d: ["train", "--dataset_name", d, "--output_dir", f],
        ("--model_name_or_path is missing",),
    ),
    "no-output": (
        lambda f, c, d: ["train", "--dataset_name", d, "--model_name_or_path", c],
        ("output_dir must be the path of a folder, got ''", "Choose where"),
    ),
    "output-is-a-file": (
        lambda f, c, d: ["train", "--dataset_name", d, "--model_name_or_path", c, "--output_dir", a_file(f)],
        ("--output_dir", "can't be written to", "another folder"),
    ),
    "output-of-evaluation-is-a-file": (
        lambda f, c, d: ["evaluate", "--dataset_name", d, "--model_name_or_path", c, "--output_dir", a_file(f)],
        ("--output_dir", "can't be written to", "another folder"),
    ),
    "data-is-nowhere": (
        lambda f, c, d: ["evaluate", "--dataset_name", f / "no", "--model_name_or_path", c, "--output_dir", f],
        ("can't be loaded", "save_to_disk"),
    ),
    "split-is-unknown": (
        lambda f, c, d: ["evaluate", "--dataset_name", d, "--model_name_or_path", c, "--output_dir", f],
        ("has no split 'test'", "['train']"),
    ),
    "loss-is-unknown": (
        lambda f, c, d: ["train", "--dataset_name", d, "--model_name_or_path", c, "--loss_type", "dpo"],
        ("loss_type", "['dpo']", "DPO is 'sigmoid'"),
    ),
    "no-rendering": (
        lambda f, c, d: ["evaluate", "--dataset_name", d, "--renderings", 0],
        ("--renderings must be a whole number >= 1, got 0",),
    ),
    "no-batch": (lambda f, c, d: ["evaluate", "--dataset_name", d, "--batch_size", -1], ("--batch_size", "got -1")),
    "recipe-is-no-yaml": (
        lambda f, c, d: ["evaluate", "--config", recipe(f, "a: [1")],
        ("recipe.yaml' is not a YAML file", "Fix its syntax"),
    ),
    "recipe-is-a-list": (
        lambda f, c, d: ["train", "--config", recipe(f, "- a\n- b\n")],
        ("must map names to values", "['a', 'b']"),
    ),
    "recipe-is-missing": (lambda f, c, d: ["steer", "--config", f / "no.yaml"], ("No such file", "no.yaml")),
    "methods-are-a-list": (
        lambda f, c, d: ["compare", "--config", recipe(f, "methods: [DPO]")],
        ("methods must map names to settings", "['DPO']"),
    ),
    "task-is-broken": (
        lambda f, c, d: ["evaluate", "--dataset_name", d, "--model_name_or_path", broken_task(f)],
        ("clip_po_task.json' does not contain class_names", "Delete it"),
    ),
    "not-a-model": (
        lambda f, c, d: [
            *("train", "--dataset_name", d, "--model_name_or_path", d, "--output_dir", f / "run"),
            *("--report_to", "none"),
        ],
        ("Unrecognized model", "config.json"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_command_that_cannot_run_says_why_in_one_line(name, tmp_path, clip_folder, saved, capsys):
    command, says = CASES[name]
    status = main([str(word) for word in command(tmp_path, clip_folder, saved)])
    message = capsys.readouterr().err
    assert status == 2
    assert [piece for piece in says if piece not in message] == [], message
    assert "Traceback" not in message


def test_ctrl_c_ends_a_command_in_one_line(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_po.cli.train.main", interrupted)
    assert main(["train"]) == INTERRUPTED
    assert capsys.readouterr().err == (
        "clip-po train: interrupted. The last whole checkpoint is kept. Resume from it with "
        "--resume_from_checkpoint true.\n"
    )


def test_a_run_that_diverges_ends_in_one_line(monkeypatch, capsys):
    def diverges(argv):
        raise FloatingPointError("Training stopped at step 3")

    monkeypatch.setattr("clip_po.cli.train.main", diverges)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "clip-po train: Training stopped at step 3\n"


def test_there_are_cases_enough_of_every_kind():
    tables = {
        "config": [test_config.CASES, test_config.LATER],
        "rows": [test_rows.CASES],
        "images": [test_images.CASES, test_images.BROKEN, test_images.UNUSUAL],
        "models": [test_models.CASES],
        "checkpoints": [test_training.CHECKPOINTS],
        "commands": [CASES],
    }
    counts = {kind: sum(map(len, cases)) for kind, cases in tables.items()}
    assert min(counts.values()) >= 15, json.dumps(counts)
    assert sum(counts.values()) >= 3 * LEAST, json.dumps(counts)
    for file in Path(__file__).parent.glob("*.py"):
        assert len(file.read_text().splitlines()) < 400, file.name
