"""clip-po steer, end to end: on labelled images of a tiny model, and on the embedded digits."""

import itertools
import json

import pytest
from safetensors.torch import load_file
from samples import CLASSES, write_parquet
from transformers import CLIPModel, CLIPProcessor

from clip_po.cli import steer
from clip_po.cli.arguments import Task
from clip_po.cli.main import main
from clip_po.cli.outcome import UNCHANGED
from clip_po.concept.transform import ConceptTransform

METRICS = {"clean_accuracy", "typographic_accuracy", "fooled", "difference", "clean_cost"}
QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--max_steps", "2", "--per_device_train_batch_size", "4"]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("parquet"), train=24, test=12)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_steer_trains_chooses_and_saves_a_plain_model(clip_folder, parquet, tmp_path, capsys):
    out = tmp_path / "steered"
    data = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(parquet)]
    choice = ["--choose", "at_most", "--max_clean_cost", "100", "--t", "-1", "0", "1.5"]
    assert main(["steer", *data, *choice, "--renderings", "2", "--output_dir", str(out), *QUICK]) == 0
    printed = capsys.readouterr().out
    report = report_of(out)
    chosen = report["settings"]["chosen"]
    assert f"Chosen on 6 validation images (at_most): t = {chosen:g}." in printed
    rows = {f"t={t:g}" for t in {-1, 0, 1.5, chosen}}
    assert set(report["models"]) == rows | {f"{row}, unseen fonts" for row in rows}
    assert all(set(row) == METRICS for row in report["models"].values())
    assert report["models"]["t=0"]["clean_cost"]["value"] == 0
    assert "24 typographic images" in printed
    assert "| -1 " in printed
    assert (out / "curve.png").stat().st_size > 10_000
    assert Task.load(out / "checkpoint") == Task(CLASSES, "a photo of a {}")
    CLIPProcessor.from_pretrained(out / "checkpoint")

    transform = ConceptTransform.load(out)
    assert transform.penalty() > 0
    folded = transform.fold_into(CLIPModel.from_pretrained(clip_folder), chosen).state_dict()
    saved = CLIPModel.from_pretrained(out / "checkpoint").state_dict()
    assert all(value.equal(folded[name]) for name, value in saved.items())


def test_a_trained_transformation_is_used_again_without_training(clip_folder, parquet, tmp_path, monkeypatch):
    transform = ConceptTransform(16, towers="image")
    transform.image_weight.data[0, 1] = 0.5
    transform.save(tmp_path / "trained")
    monkeypatch.setattr(steer, "concept_trainer", None)
    data = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(parquet), "--attack_fonts", "pillow"]
    again = ["--transform", str(tmp_path / "trained"), "--choose", "at_most", "--t", "0", "1"]
    assert main(["steer", *data, *again, "--output_dir", str(tmp_path / "out"), *QUICK]) in (0, UNCHANGED)
    report = report_of(tmp_path / "out")
    assert (report["settings"]["towers"], report["settings"]["path"]) == ("image", "straight")
    # Fonts that the user names hold for every attack: there are no others to compare with.
    assert not any("unseen" in row for row in report["models"])
    files = [load_file(tmp_path / folder / "concept.safetensors") for folder in ("trained", "out")]
    assert files[0]["image_weight"].equal(files[1]["image_weight"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset_name", "photos"], "--model_name_or_path is missing"),
        (["--model_name_or_path", "clip"], "--dataset_name is missing"),
        (["--t", "nan"], "finite"),
        (["--renderings", "0"], "--renderings"),
        (["--max_clean_cost", "-1"], "max_clean_cost"),
        (["--transform", "nowhere"], "concept.safetensors"),
        (["--penalty_weight", "-1"], "penalty_weight"),
    ],
)
def test_what_can_not_be_steered_is_refused(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(steer, "digits_case", lambda *_: None)
    assert main(["steer", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_digits_turn_from_word_to_digit(tmp_path, capsys):
    assert main(["steer", "--renderings", "3", "--disable_tqdm", "true", "--output_dir", str(tmp_path)]) == 0
    report = report_of(tmp_path)
    chosen = report["settings"]["chosen"]
    points = [report["models"][f"t={t:g}"] for t in sorted({*range(-4, 5), chosen})]
    reading = [point["fooled"] for point in points]
    for before, after in itertools.pairwise(reading):
        assert after["value"] <= before["high"]
    assert reading[0]["value"] > 0.9
    assert reading[-1]["value"] < 0.05
    assert all(point["clean_cost"]["value"] <= 0.5 for point in points)
    neutral = report["models"][f"t={chosen:g}"]
    assert 0 < chosen < 1
    # 500 digits in 3 renderings: the interval is about 10 points wide.
    assert abs(neutral["difference"]["value"]) < 10
    assert abs(report["settings"]["meets_at"] - chosen) < 0.1
    assert report["models"]["t=2"]["typographic_accuracy"]["value"] > 0.9


def test_a_choice_of_the_original_model_is_not_taken_for_a_change(clip_folder, parquet, tmp_path, capsys):
    data = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(parquet), "--output_dir", str(tmp_path)]
    assert main(["steer", *data, "--choose", "at_most", "--t", "0", *QUICK]) == UNCHANGED
    printed = capsys.readouterr()
    assert "takes at least 598 validation images" in printed.out
    assert "nothing was changed: t = 0 was chosen" in printed.err
