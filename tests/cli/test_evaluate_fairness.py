"""clip-po evaluate --fairness, end to end, on a few pictures with an attribute."""

import json

import datasets
import numpy as np
import pytest
import yaml
from samples import CLASSES, make_labelled, picture
from transformers import CLIPModel, CLIPProcessor

from clip_po.cli.main import main
from clip_po.evaluation.fairness import evaluate_fairness, load_queries
from clip_po.evaluation.suites.suite import load_suite


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people") / "faces"
    rows = make_labelled(16).add_column("gender", ["man", "woman", "woman", "man"] * 4)
    rows = rows.add_column("person", [str(row // 2) for row in range(16)])
    datasets.DatasetDict({"test": rows}).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, clip_folder):
    """A model that differs, with the same processor."""
    folder = tmp_path_factory.mktemp("other")
    model = CLIPModel.from_pretrained(clip_folder)
    model.visual_projection.weight.data.mul_(-1)
    model.save_pretrained(folder)
    CLIPProcessor.from_pretrained(clip_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(clip_folder, other_folder, tmp_path, capsys):
    """Runs the command; gives its status, what it printed, and its report."""

    def run(*arguments):
        out = tmp_path / "out"
        models = ["--model_name_or_path", str(other_folder), "--base_model_name_or_path", str(clip_folder)]
        command = ["evaluate", *models, "--output_dir", str(out), "--batch_size", "8", *map(str, arguments)]
        status = main(command)
        printed = capsys.readouterr()
        report = json.loads((out / "report.json").read_text()) if (out / "report.json").is_file() else None
        return status, printed.out + printed.err, report

    return run


def test_bias_of_both_models(evaluate, people, clip_folder, other_folder):
    status, printed, report = evaluate(
        *("--fairness", "gender", "--dataset_name", people, "--top_k", "4", "0.5", "--resamples", "10")
    )
    assert status == 0
    assert (report["command"], report["data"]["measures"]) == ("evaluate", "fairness")
    queries = load_queries("occupations")
    processor = CLIPProcessor.from_pretrained(clip_folder)
    models = {"base": CLIPModel.from_pretrained(clip_folder), "aligned": CLIPModel.from_pretrained(other_folder)}
    rows = datasets.load_from_disk(people)["test"]
    expected = evaluate_fairness(
        models,
        processor,
        rows,
        "gender",
        queries.words,
        queries.templates,
        [4, 8],
        base="base",
        resamples=10,
        batch_size=8,
        disable_tqdm=True,
    )
    for model, metrics in expected.items():
        found = {name.removeprefix("faces/"): numbers for name, numbers in report["models"][model].items()}
        assert found.keys() == metrics.keys()
        for metric in ("max_skew@4", "min_skew@8", "ndkl", "retrieval_parity_gap@8"):
            assert found[metric] == pytest.approx(metrics[metric].as_dict())
    (entry,) = report["data"]["entries"]
    assert entry["groups"] == {"man": 8, "woman": 8}
    assert entry["queries"]["words"] == list(queries.words)
    assert 0 < entry["chance"]["max_skew@4"] < 1
    by_query = entry["skew@4"]["aligned"]
    worst = np.max([list(by_query[group].values()) for group in ("man", "woman")], axis=0).mean()
    assert report["models"]["aligned"]["faces/max_skew@4"]["value"] == pytest.approx(worst)
    lines = [line for line in printed.splitlines() if line.startswith("| faces")]
    assert [model in line for model, line in zip(("random order", "base", "aligned"), lines, strict=False)] == [
        True
    ] * 3
    assert "max_skew@4 less (%)" in printed
    assert "aligned shows more of" in printed


def test_the_classes_as_queries_tell_who_is_right(evaluate, people):
    status, _, report = evaluate(
        *("--fairness", "gender", "--dataset_name", people, "--queries", "classes", "--top_k", 4),
        *("--prompt_template", "a {}", "--resamples", 5, "--cluster_column", "person", "--desired_share", "uniform"),
    )
    assert status == 0
    assert {"faces/retrieval_opportunity_gap@4", "faces/equal_opportunity_gap"} < report["models"]["base"].keys()
    (entry,) = report["data"]["entries"]
    assert (entry["queries"]["words"], entry["queries"]["templates"]) == (CLASSES, ["a {}"])


def test_queries_of_your_own(evaluate, people, tmp_path):
    (tmp_path / "mine.txt").write_text("a doctor\na nurse\n")
    status, _, report = evaluate(
        *("--fairness", "label", "--dataset_name", people, "--queries", tmp_path / "mine.txt", "--top_k", 4),
        *("--max_samples", 12, "--resamples", 0),
    )
    assert status == 0
    (entry,) = report["data"]["entries"]
    assert entry["queries"]["words"] == ["a doctor", "a nurse"]
    assert entry["rows_measured"] == 12
    assert report["models"]["base"]["faces/ndkl"]["low"] is None


def test_the_suite(evaluate, people, tmp_path):
    faces = datasets.load_from_disk(people)["test"]
    datasets.DatasetDict({"validation": faces}).save_to_disk(tmp_path / "sets" / "fairface")
    arguments = ["--suite", "fairness", "--suite_folder", tmp_path / "sets", "--top_k", 4, "--resamples", 5]
    status, printed, report = evaluate(*arguments)
    assert status == 0
    assert {name.split("/")[0] for name in report["models"]["aligned"]} == {"fairface-gender"}
    missing = {entry["name"]: entry["missing"] for entry in report["data"]["entries"] if "missing" in entry}
    assert missing.keys() == {"fairface-race", "fairface-age", "utkface-gender", "celeba-gender"}
    assert "'race'" in missing["fairface-race"]
    assert "missing" in next(line for line in printed.splitlines() if line.startswith("| celeba"))


def test_vl_bias_in_a_suite_of_your_own(evaluate, tmp_path):
    for row in range(12):
        file = tmp_path / "vl" / "occu" / "nurse" / ("men", "women", "others")[row % 3] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(row).save(file)
    entry = {"name": "vl", "path": str(tmp_path / "vl"), "layout": "vl_bias", "config": "occupations"}
    entry |= {
        "columns": {"attribute": "gender"},
        "templates": ["{}"],
        "class_names": None,
        "source": "",
        "license": "",
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"measures": "fairness", "entries": [entry]}))
    status, _, report = evaluate("--suite", tmp_path / "own.yaml", "--top_k", 4, "--resamples", 0)
    assert status == 0
    (entry,) = report["data"]["entries"]
    assert entry["groups"] == {"man": 4, "woman": 4}
    assert {"vl/max_skew@4", "vl/ndkl"} <= report["models"]["aligned"].keys()


def test_the_recipes_say_what_was_not_seen():
    suite = load_suite("fairness")
    assert suite.measures == "fairness"
    assert {entry.folder for entry in suite.entries} == {"fairface", "utkface", "celeba"}
    for entry in suite.entries:
        assert entry.columns["attribute"]
        assert entry.verified or entry.note


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--top_k", "16"], "0 for any model"),
        (["--top_k", "17"], "only 16"),
        (["--queries", "stars"], "activities"),
        (["--fairness", "sex"], "'sex'"),
        (["--cluster_column", "scene"], "scene"),
        (["--dataset_test_split", "train"], "train"),
    ],
)
def test_what_does_not_fit_is_refused(evaluate, people, arguments, said):
    status, printed, _ = evaluate(*("--fairness", "gender", "--dataset_name", people, "--top_k", 4), *arguments)
    assert status == 2
    assert said in printed


def test_a_data_set_is_needed(evaluate):
    status, printed, _ = evaluate("--fairness", "gender")
    assert status == 2
    assert "--dataset_name" in printed


COMMAND = """
import os
import sys

from clip_po.cli.main import main

os.environ["ACCELERATE_USE_CPU"] = "true"
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_report_what_one_does(clip_folder, people, two_processes, monkeypatch, tmp_path):
    data = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(people)]
    command = ["evaluate", *data, "--fairness", "gender", "--top_k", "4", "--resamples", "5", "--output_dir"]
    outs = [tmp_path / "one", tmp_path / "two"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert main([*command, str(outs[0])]) == 0
    two_processes.run(COMMAND, *command, outs[1])
    found = []
    for out in outs:
        (numbers,) = json.loads((out / "report.json").read_text())["models"].values()
        found.append(numbers)
    assert found[1] == {metric: pytest.approx(each) for metric, each in found[0].items()}
