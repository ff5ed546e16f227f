"""clip-po evaluate --suite, end to end: tiny folders in the authors' layouts, and what is not there."""

import json

import datasets
import pytest
import yaml
from samples import CLASSES, make_labelled, picture

from clip_po.cli.main import main


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """RTA-100, Disentangling, SCAM and Oxford Pets, a few images each."""
    folder = tmp_path_factory.mktemp("sets")
    for name in ("rta-100/data", "disentangling/images", "scam"):
        (folder / name).mkdir(parents=True)
    annotation, metadata = {}, ["file_name,type,object_label,attack_word"]
    for row in range(12):
        label, word = CLASSES[row % 3], CLASSES[(row + 1) % 4]
        picture(row).save(folder / "rta-100" / "data" / f"label={label}_text={word}_{row}.png")
        picture(row).save(folder / "disentangling" / "images" / f"{row}.png")
        annotation[f"{row}.png"] = {"true object": label, "typographic attack label": word if row < 10 else ""}
        picture(row).save(folder / "scam" / f"{row}.png")
        kind = ("SCAM", "SynthSCAM", "NoSCAM")[row % 3]
        metadata.append(f"{row}.png,{kind},{CLASSES[row % 4]},{CLASSES[(row + 2) % 4]}")
    (folder / "disentangling" / "annotations.json").write_text(json.dumps(annotation))
    (folder / "scam" / "metadata.csv").write_text("\n".join(metadata))
    datasets.DatasetDict({"test": make_labelled(10)}).save_to_disk(folder / "oxford-pets")
    return folder


@pytest.fixture
def evaluate(clip_folder, tmp_path, capsys):
    """Runs the command; gives its status, what it printed, and its report."""

    def run(*arguments, base=True):
        out = tmp_path / "out"
        models = ["--model_name_or_path", str(clip_folder)]
        models += ["--base_model_name_or_path", str(clip_folder)] if base else []
        status = main(["evaluate", *models, "--output_dir", str(out), "--batch_size", "8", *map(str, arguments)])
        printed = capsys.readouterr()
        report = json.loads((out / "report.json").read_text()) if (out / "report.json").is_file() else None
        return status, printed.out + printed.err, report

    return run


def entry_of(report, name):
    return next(entry for entry in report["data"]["entries"] if entry["name"] == name)


def test_typographic(evaluate, sets):
    status, printed, report = evaluate("--suite", "typographic", "--suite_folder", sets)
    assert status == 0
    assert (report["command"], report["data"]["suite"]) == ("evaluate", "typographic")
    found = report["models"]["aligned"]
    for measured in ("rta-100/all", "rta-100/pair", "disentangling/all", "scam/pair", "synth-scam/all"):
        assert 0 <= found[f"{measured}/typographic_accuracy"]["value"] <= 1
        assert found[f"{measured}/difference"] == {"value": 0, "low": 0, "high": 0}
    assert 0 <= found["no-scam/pair/clean_accuracy"]["value"] <= 1
    assert "no-scam/pair/fooled" not in found
    assert {"clean_accuracy", "fooled", "recovery", "reading_effect"} <= {
        name.rpartition("/")[2] for name in found if name.startswith("oxford-pets/")
    }
    assert not any(name.endswith("difference") for name in report["models"]["base"])

    candidates = {found["kind"]: found for found in entry_of(report, "rta-100")["candidates"]}
    assert (candidates["all"]["count"], candidates["pair"]["count"]) == (4, 2)
    assert candidates["all"]["names"] == sorted(CLASSES)
    # The files of sets: some words are the name of the object, and fool nobody.
    wrong = sum(CLASSES[row % 3] != CLASSES[(row + 1) % 4] for row in range(12))
    assert (candidates["all"]["attacked"], candidates["pair"]["attacked"]) == (wrong, wrong)
    assert sum(f"fooled of {wrong} " in line for line in printed.splitlines() if "| rta-100" in line) == 4
    assert not any("fooled of" in line for line in printed.splitlines() if "| scam" in line or "| no-scam" in line)
    assert entry_of(report, "disentangling")["rows_without_word"] == 2
    assert entry_of(report, "disentangling")["rows_measured"] == 10
    assert entry_of(report, "oxford-pets")["attack"]["words"] == CLASSES

    # What is not there is in the table, with the reason.
    assert "paint" not in {name.split("/")[0] for name in found}
    line = next(line for line in printed.splitlines() if line.startswith("| paint"))
    assert "missing: Its authors publish it outside the Hub" in line
    assert "arXiv 2208.05592" in entry_of(report, "paint")["missing"]
    assert "12 of 1,000 images" in next(line for line in printed.splitlines() if line.startswith("| rta-100"))
    assert "missing" in next(line for line in printed.splitlines() if line.startswith("| food101"))


def test_max_samples_is_per_data_set_and_leaves_the_candidates_whole(evaluate, sets):
    status, _, report = evaluate("--suite", "typographic", "--suite_folder", sets, "--max_samples", 2, base=False)
    assert status == 0
    measured = {entry["name"]: entry["rows_measured"] for entry in report["data"]["entries"] if "missing" not in entry}
    assert measured == dict.fromkeys(["rta-100", "disentangling", "scam", "synth-scam", "no-scam", "oxford-pets"], 2)
    assert entry_of(report, "rta-100")["candidates"][0]["count"] == 4
    assert "base" not in report["models"]


def test_retention(evaluate, sets, tmp_path):
    datasets.DatasetDict({"test": make_labelled(8)}).save_to_disk(tmp_path / "sets" / "dtd")
    (tmp_path / "sets" / "oxford-pets").symlink_to(sets / "oxford-pets")
    status, printed, report = evaluate("--suite", "retention", "--suite_folder", tmp_path / "sets")
    assert status == 0
    found = report["models"]["aligned"]
    each = [found[f"{name}/all/clean_accuracy"]["value"] for name in ("dtd", "oxford-pets")]
    assert found["mean_accuracy"]["value"] == pytest.approx(sum(each) / 2)
    assert found["mean_difference"]["value"] == found["dtd/all/difference"]["value"] == 0
    assert "| mean of 2" in printed
    assert printed.count("missing:") == 8
    assert entry_of(report, "dtd")["templates"] == ["{} texture."]


def captions(folder):
    rows = {"image": [picture(i) for i in range(6)], "caption": [["a cat", "the cat"], *[["a dog"]] * 5]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": table}).save_to_disk(folder)


def test_retrieval(evaluate, tmp_path):
    captions(tmp_path / "sets" / "flickr30k")
    status, printed, report = evaluate("--suite", "retrieval", "--suite_folder", tmp_path / "sets")
    assert status == 0
    found = report["models"]["aligned"]
    assert {f"flickr30k/all/{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} < set(
        found
    )
    assert found["flickr30k/all/text_to_image_recall@10"]["value"] == 1
    assert found["flickr30k/all/mean_recall_difference"]["value"] == 0
    assert "all (7 texts)" in printed
    assert "coco" in printed


def test_your_own_captions(evaluate, tmp_path):
    captions(tmp_path / "mine")
    data = ["--dataset_name", tmp_path / "mine", "--caption_column", "caption", "--prompt_template", "a photo: {}"]
    status, printed, report = evaluate("--suite", "retrieval", *data)
    assert status == 0
    (entry,) = report["data"]["entries"]
    assert (entry["name"], entry["templates"]) == ("mine", ["a photo: {}"])
    assert "missing" not in printed


def test_your_own_labelled_images(evaluate, sets):
    status, _, report = evaluate("--suite", "retention", "--dataset_name", sets / "oxford-pets", base=False)
    assert status == 0
    assert report["models"]["model"].keys() == {"oxford-pets/all/clean_accuracy", "mean_accuracy"}


def test_your_own_suite(evaluate, sets, tmp_path):
    entry = {"name": "mine", "path": str(sets / "rta-100"), "layout": "file_names", "templates": ["{}", "a {}"]}
    entry |= {"class_names": CLASSES, "candidates": ["labels"], "source": "me", "license": None}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"measures": "typographic", "entries": [entry]}))
    status, printed, report = evaluate("--suite", file)
    assert status == 0
    assert "labels (3)" in printed
    assert "mine/labels/fooled" in report["models"]["aligned"]


def test_where_nothing_can_be_loaded_the_command_fails_and_still_reports(evaluate, tmp_path):
    status, printed, report = evaluate("--suite", "retention", "--suite_folder", tmp_path)
    assert status == 2
    assert "None of the 10 datasets could be loaded" in printed
    assert len(report["data"]["entries"]) == 10
    assert all(entry["missing"] for entry in report["data"]["entries"])


def test_broken_data_are_a_missing_entry_and_name_the_file(evaluate, sets, tmp_path):
    folder = tmp_path / "sets"
    (folder / "paint").mkdir(parents=True)
    picture(0).save(folder / "paint" / "dog.png")
    (folder / "rta-100").symlink_to(sets / "rta-100")
    status, _, report = evaluate("--suite", "typographic", "--suite_folder", folder, base=False)
    assert status == 0
    assert "dog.png" in entry_of(report, "paint")["missing"]


def test_a_checkpoints_own_report_is_left_alone(clip_folder, sets, tmp_path, capsys):
    import shutil

    model = shutil.copytree(clip_folder, tmp_path / "model")
    (model / "report.json").write_text("{}")
    command = ["evaluate", "--model_name_or_path", str(model), "--suite", "retention", "--suite_folder", str(sets)]
    assert main(command) == 0
    assert (model / "report.json").read_text() == "{}"
    (report,) = model.glob("evaluation/retention/*/report.json")
    assert len(datasets.Dataset.from_parquet(str(report.parent / "oxford-pets-answers.parquet"))) == 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "speed"], "no suite 'speed'"),
        (["--suite", "retention", "--suite_folder", "nowhere"], "nowhere"),
        (["--suite", "retention", "--max_samples", "0"], "max_samples"),
        (["--suite", "retention", "--prompt_template", "a photo"], "{}"),
        ([], "dataset_name"),
    ],
)
def test_what_does_not_fit_is_refused(evaluate, arguments, said):
    status, printed, _ = evaluate(*arguments)
    assert status == 2
    assert said in printed
