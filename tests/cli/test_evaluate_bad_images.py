"""--on_bad_image skip: unreadable images are skipped and counted in the report of every kind of clip-po evaluate."""

import json

import datasets
import pytest
from samples import CLASSES, make_labelled
from streaming_worker import with_broken

from clip_po.cli.main import main
from clip_po.evaluation.report.summary import markdown_summary

BAD = {0, 5}
SKIP = ["--on_bad_image", "skip"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    rows = make_labelled(12).add_column("gender", ["man", "woman", "woman"] * 4)
    rows = rows.add_column("caption", [f"a {CLASSES[row % 4]} {row}" for row in range(12)])
    folder = tmp_path_factory.mktemp("broken")
    datasets.DatasetDict({"test": with_broken(rows, BAD)}).save_to_disk(folder)
    return folder


@pytest.fixture
def evaluate(clip_folder, broken, tmp_path, capsys):
    """Runs the command on the broken images; gives its status, what it printed, and its report."""

    def run(*arguments):
        out = tmp_path / "out"
        models = ["--model_name_or_path", str(clip_folder), "--base_model_name_or_path", str(clip_folder)]
        status = main(["evaluate", *models, "--dataset_name", str(broken), "--output_dir", str(out), *arguments])
        printed = capsys.readouterr()
        report = json.loads((out / "report.json").read_text()) if (out / "report.json").is_file() else None
        return status, printed.out + printed.err, report

    return run


@pytest.mark.parametrize("workers", ["0", "1"])
def test_one_sentence_ends_the_command_by_default(evaluate, workers):
    status, printed, report = evaluate("--num_workers", workers)
    assert (status, report) == (2, None)
    said = printed[printed.index("clip-po evaluate: ") :]
    assert said.startswith("clip-po evaluate: Row 0: the image in column 'image' can't be read")
    assert said.count("\n") == 1


def test_robustness(evaluate):
    status, _, report = evaluate(*SKIP)
    assert status == 0
    assert (report["data"]["rows"], report["data"]["skipped_rows"]) == (10, 2)
    assert report["settings"]["on_bad_image"] == "skip"
    assert "10 images (2 unreadable skipped)" in markdown_summary(report)


@pytest.mark.parametrize("suite", ["retention", "typographic", "retrieval"])
def test_suites(evaluate, suite):
    status, printed, report = evaluate("--suite", suite, *SKIP)
    assert status == 0
    (entry,) = report["data"]["entries"]
    assert (entry["rows_there"], entry["rows_measured"], entry["skipped_rows"]) == (12, 10, 2)
    assert "2 unreadable skipped" in printed


def test_fairness(evaluate):
    status, _, report = evaluate("--fairness", "gender", "--top_k", "4", "--resamples", "2", *SKIP)
    assert status == 0
    (entry,) = report["data"]["entries"]
    assert (entry["rows_measured"], entry["skipped_rows"]) == (10, 2)
    assert sum(entry["groups"].values()) == 10


@pytest.mark.parametrize("labels", ["given", "reference"])
def test_training_skips_them_in_what_it_measures_too(labels, clip_folder, tmp_path, capsys):
    rows = with_broken(make_labelled(12), {0, 5})
    datasets.DatasetDict({"train": rows, "validation": with_broken(rows, {2})}).save_to_disk(tmp_path / "rows")
    command = ["train", "--model_name_or_path", str(clip_folder), "--dataset_name", str(tmp_path / "rows")]
    command += ["--output_dir", str(tmp_path / "out"), "--dataset_validation_split", "validation", "--labels", labels]
    command += ["--eval_strategy", "epoch", "--num_train_epochs", "1", "--per_device_train_batch_size", "4"]
    command += ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]
    assert main([*command, *SKIP]) == 0
