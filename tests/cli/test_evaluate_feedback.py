"""clip-po evaluate on preferences, labelled texts and captions: recognized by their columns, measured and reported."""

import csv
import json

import datasets
import pytest
from samples import PROMPTS, make_labelled, make_preferences, picture
from transformers import CLIPModel, CLIPProcessor

from clip_po.cli.main import main
from clip_po.evaluation import PreferenceEvaluator, RetrievalEvaluator, UnpairedEvaluator


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, clip_folder):
    """Another model with the same processor."""
    folder = tmp_path_factory.mktemp("other")
    model = CLIPModel.from_pretrained(clip_folder)
    model.visual_projection.weight.data.mul_(-1)
    model.save_pretrained(folder)
    CLIPProcessor.from_pretrained(clip_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(clip_folder, other_folder, tmp_path, capsys):
    def run(data, *arguments, status=0):
        words = ["evaluate", "--model_name_or_path", str(other_folder), "--base_model_name_or_path", str(clip_folder)]
        words += ["--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), "--batch_size", "4"]
        assert main([*words, *map(str, arguments)]) == status
        return capsys.readouterr()

    return run


def report_of(tmp_path):
    return json.loads((tmp_path / "out" / "report.json").read_text())


def check(report, evaluator, clip_folder, other_folder):
    models = {"base": CLIPModel.from_pretrained(clip_folder), "aligned": CLIPModel.from_pretrained(other_folder)}
    expected = evaluator(models, "base", disable_tqdm=True)
    assert report["models"].keys() == expected.keys()
    for model, metrics in expected.items():
        assert report["models"][model].keys() == metrics.keys()
        for metric, estimate in metrics.items():
            assert report["models"][model][metric]["value"] == pytest.approx(estimate.value, abs=1e-4)


def test_preferences_between_texts(evaluate, clip_folder, other_folder, processor, tmp_path):
    datasets.DatasetDict({"test": make_preferences(13)}).save_to_disk(tmp_path / "rows")
    printed = evaluate(tmp_path / "rows")
    assert "holds preferences: agreement, margin and calibration" in printed.err
    assert printed.out.count("texts of an image") == 0
    assert "| model   | rows | pairwise accuracy" in printed.out
    check(report_of(tmp_path), PreferenceEvaluator(make_preferences(13), processor), clip_folder, other_folder)
    assert report_of(tmp_path)["data"] == {
        "name": "rows",
        "split": "test",
        "kind": "preferences",
        "rows": 13,
        "skipped_rows": 0,
    }
    bins = list(csv.DictReader((tmp_path / "out" / "reliability.csv").open()))
    assert sum(int(line["rows"]) for line in bins if line["model"] == "base") == 13


def test_preferences_between_images_in_a_table_of_paths(evaluate, clip_folder, other_folder, processor, tmp_path):
    rows = []
    for number in range(6):
        picture(number).save(tmp_path / f"{number}.png")
        picture(100 + number).save(tmp_path / f"{100 + number}.png")
        text = PROMPTS[number % 4]
        rows.append({"text": text, "chosen_image": f"{number}.png", "rejected_image": f"{100 + number}.png"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(tmp_path / "pairs.jsonl", "--dataset_test_split", "train")
    images = {
        f"{side}_image": [picture(n + plus) for n in range(6)] for side, plus in (("chosen", 0), ("rejected", 100))
    }
    expected = datasets.Dataset.from_dict({"text": [row["text"] for row in rows], **images})
    check(report_of(tmp_path), PreferenceEvaluator(expected, processor), clip_folder, other_folder)


def test_texts_labelled_right_or_wrong(evaluate, clip_folder, other_folder, processor, tmp_path):
    lines = ["image,text,label"]
    for number in range(8):
        picture(number).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{PROMPTS[number % 4]},{number % 3 == 0}")
    (tmp_path / "thumbs.csv").write_text("\n".join(lines) + "\n")
    printed = evaluate(tmp_path / "thumbs.csv", "--dataset_test_split", "train")
    assert "holds texts labelled right or wrong" in printed.err
    columns = {
        "image": [picture(n) for n in range(8)],
        "text": [PROMPTS[n % 4] for n in range(8)],
        "label": [n % 3 == 0 for n in range(8)],
    }
    expected = datasets.Dataset.from_dict(columns)
    check(report_of(tmp_path), UnpairedEvaluator(expected, processor), clip_folder, other_folder)


def test_preferences_and_labelled_texts_in_one_dataset(evaluate, clip_folder, other_folder, processor, tmp_path):
    preferences = make_preferences(5).remove_columns("clean_image")
    columns = {"image": [picture(n) for n in range(6)], "text": PROMPTS + PROMPTS[:2], "label": [True, False] * 3}
    labelled = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": datasets.concatenate_datasets([preferences, labelled])}).save_to_disk(
        tmp_path / "rows"
    )
    printed = evaluate(tmp_path / "rows")
    assert "holds preferences, and texts labelled right or wrong" in printed.err
    assert {"all", "right or wrong texts"} <= {cell.strip() for cell in printed.out.split("|")}
    report = report_of(tmp_path)
    for prefix, evaluator in (
        ("", PreferenceEvaluator(preferences, processor)),
        ("unpaired_", UnpairedEvaluator(labelled, processor)),
    ):
        parts = {
            model: {
                name.removeprefix(prefix): numbers
                for name, numbers in metrics.items()
                if name.startswith(prefix) and (prefix or not name.startswith("unpaired_"))
            }
            for model, metrics in report["models"].items()
        }
        check({"models": parts}, evaluator, clip_folder, other_folder)


@pytest.mark.parametrize("column", ["text", "caption", "sentence"])
def test_captions(evaluate, clip_folder, other_folder, processor, tmp_path, column):
    columns = {"image": [picture(n) for n in range(6)], column: [[f"a {n}", PROMPTS[n % 4]] for n in range(6)]}
    rows = datasets.Dataset.from_dict(columns)
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "rows")
    printed = evaluate(tmp_path / "rows", *(["--caption_column", "sentence"] if column == "sentence" else []))
    assert "holds captions: recall and NDCG" in printed.err
    assert "ndcg@10" in printed.out
    assert {"texts of an image", "images of a text"} <= {cell.strip() for cell in printed.out.split("|")}
    expected = RetrievalEvaluator(rows, processor, caption_column=column)
    check(report_of(tmp_path), expected, clip_folder, other_folder)


def test_labelled_images_are_measured_under_attack_as_before(evaluate, tmp_path):
    rows = make_labelled(8).add_column("text", ["a caption"] * 8)
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "rows")
    printed = evaluate(tmp_path / "rows")
    assert "holds" not in printed.err
    assert "typographic_accuracy" in report_of(tmp_path)["models"]["base"]


def test_another_name_of_the_image_column_and_a_sample(evaluate, tmp_path):
    datasets.DatasetDict({"test": make_preferences(13).rename_column("image", "photo")}).save_to_disk(
        tmp_path / "rows"
    )
    evaluate(tmp_path / "rows", "--image_column", "photo", "--max_samples", "5")
    assert report_of(tmp_path)["data"]["rows"] == 5


def test_unreadable_images_are_skipped_and_counted(evaluate, tmp_path):
    rows = make_preferences(6).cast_column("image", datasets.Image(decode=False)).to_dict()
    rows["image"][2] = {"bytes": b"broken", "path": None}
    broken = datasets.Dataset.from_dict(rows, features=make_preferences(1).features)
    datasets.DatasetDict({"test": broken}).save_to_disk(tmp_path / "rows")
    assert "Row 2" in evaluate(tmp_path / "rows", status=2).err
    evaluate(tmp_path / "rows", "--on_bad_image", "skip")
    assert report_of(tmp_path)["data"]["rows"] == 5
    assert report_of(tmp_path)["data"]["skipped_rows"] == 1


def test_retention_is_refused_where_it_has_no_effect(evaluate, tmp_path):
    datasets.DatasetDict({"test": make_preferences(4)}).save_to_disk(tmp_path / "rows")
    said = evaluate(tmp_path / "rows", "--retention", "x", status=2).err
    assert "--retention has no effect" in said
    assert "--suite retention" in said
