"""clip-po compare, end to end: every method runs once per seed, and one table compares them."""

import json

import numpy as np
import pytest
import yaml
from samples import CLASSES, make_labelled, write_parquet
from transformers import CLIPModel

from clip_po.cli import compare
from clip_po.cli.main import main
from clip_po.data.vocabulary import open_vocabulary
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.drift import DriftEvaluator
from clip_po.evaluation.report.report_file import read_report, report_estimates
from clip_po.evaluation.retention import RetentionEvaluator, RetentionSet
from clip_po.evaluation.tables import format_number

METHODS = {
    "CE": {"loss_type": "sft"},
    "S-DPO": {"loss_type": ["sigmoid"], "rejected": "others", "moving_average": 0.7},
    "own answers": {"labels": "reference", "loss_type": ["distillation", "sft"], "use_peft": True, "lora_r": 2},
    "interpolation": {"method": "interpolation", "of": "CE", "max_clean_cost": 5.0},
    "heads": {"method": "head_ablation", "max_clean_loss": 50.0, "max_heads": 1},
    "prefix": {"method": "defense_prefix", "steps": 2, "batch_size": 4},
    "mirror": {"method": "mirror_mask"},
    "projection": {"method": "spelling_projection", "steps": 2, "output_dim": 8},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("photos"), train=20, validation=8, test=12)


@pytest.fixture
def recipe(clip_folder, photos, tmp_path):
    def write(**changes):
        file = tmp_path / "recipe.yaml"
        settings = {
            "model_name_or_path": str(clip_folder),
            "dataset_name": str(photos),
            "dataset_validation_split": "validation",
            "output_dir": str(tmp_path / "out"),
            "seeds": [0, 1],
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True},
            "attacks": {"class words": {}, "other words": {"words": ["moon", "sugar"]}},
            "methods": METHODS,
            **changes,
        }
        file.write_text(yaml.safe_dump(settings, sort_keys=False))
        return ["compare", "--config", str(file)]

    return write


def test_every_method_runs_and_a_stopped_comparison_continues(recipe, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    calls = []
    run_method = compare.run_method

    def counted(setup, name, seed, **settings):
        calls.append((name, seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_method(setup, name, seed, **settings)

    monkeypatch.setattr(compare, "run_method", counted)
    assert main(recipe()) == 130  # The exit status of a shell after Ctrl-C.
    assert main(recipe()) == 0
    # Every run once, and the stopped run a second time.
    once = [("mirror", 0)]  # it draws nothing at random
    twice = [(n, s) for s in (0, 1) for n in METHODS if n != "mirror"]
    assert sorted(calls) == sorted([*once, *twice, calls[2]])

    printed = capsys.readouterr().out
    assert all(f"| {name}" in printed for name in METHODS)
    assert "reading, other words" in printed
    found = report_estimates(read_report(out / "report.json"))
    assert set(found) == {"before", *METHODS}
    assert {"recovery", "recovery_sd", "blank_accuracy", "other words: kept_answers"} <= set(found["CE"])
    for file in ("table.md", "report.html", "trade_off.png", "CE/seed-1/checkpoint/model.safetensors"):
        assert (out / file).stat().st_size > 100

    calls.clear()
    assert main(recipe()) == 0
    assert calls == []
    again = report_estimates(read_report(out / "report.json"))
    assert repr(again) == repr(found)


def test_metrics_equal_those_of_clip_po_train_and_evaluate(recipe, tmp_path, clip_folder, photos, capsys):
    """A comparison measures what clip-po train with the same settings and clip-po evaluate measure."""
    methods = {"CE": METHODS["CE"]}
    attacks = {"class words": {}}
    command = recipe(methods=methods, attacks=attacks, seeds=[3])
    assert main([*command, "--test_seed", "5"]) == 0
    alone = tmp_path / "alone"
    data = ["--dataset_name", str(photos)]
    steps = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true", "--report_to", "none"]
    where = ["--model_name_or_path", str(clip_folder), "--output_dir", str(alone)]
    assert main(["train", *where, *data, "--loss_type", "sft", "--seed", "3", *steps]) == 0
    models = ["--model_name_or_path", str(alone), "--base_model_name_or_path", str(clip_folder)]
    assert main(["evaluate", *models, *data, "--seed", "5"]) == 0
    together = report_estimates(read_report(tmp_path / "out" / "report.json"))["CE"]
    (report,) = alone.glob("evaluation/*/*/report.json")
    single = report_estimates(read_report(report))["aligned"]
    for metric in ("clean_accuracy", "typographic_accuracy", "occluded_accuracy", "clean_cost"):
        assert together[metric].value == pytest.approx(single[metric].value)


def test_a_stored_result_with_other_settings_is_refused(recipe, capsys):
    methods = {"heads": METHODS["heads"]}
    assert main(recipe(methods=methods, seeds=[0])) == 0
    assert main(recipe(methods={"heads": {**METHODS["heads"], "max_heads": 2}}, seeds=[0])) == 2
    assert "with other settings (method)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {}}, "names no methods"),
        ({"methods": {"a": {"method": "magic"}}}, "'magic'"),
        ({"methods": {"a": {"method": "interpolation", "of": "b"}, "b": {}}}, "not a method above it"),
        ({"dataset_validation_split": None}, "--dataset_validation_split is missing"),
        ({"colour": "red"}, "['colour']"),
        # Said before the first method runs, not when the last one is reached.
        ({"methods": {"CE": {}, "DPO": {"lr": 1}}}, "methods: 'DPO': unknown flag --lr. Did you mean --learning_rate"),
        ({"methods": {"CE": {}, "DPO": {"beta": -1}}}, "methods: 'DPO': beta must"),
        ({"methods": {"CE": {}, "h": {"method": "head_ablation", "max_head": 1}}}, "Did you mean max_heads"),
        ({"methods": {"CE": {}, "p": {"method": "defense_prefix", "colour": 1}}}, "has no setting 'colour'"),
        ({"methods": {"CE": {}, "p": {"method": "defense_prefix", "seed": 1}}}, "has no setting 'seed'"),
        ({"methods": {"CE": {}, "m": {"method": "mirror_mask", "model": "x"}}}, "has no setting 'model'"),
        ({"training": {"max_step": 2}}, "methods: 'CE': unknown flag --max_step. Did you mean --max_steps"),
        ({"attacks": {"x": {"size": [2, 3]}}}, "size"),
    ],
)
def test_recipes_that_cannot_run_are_refused(recipe, capsys, monkeypatch, changes, said):
    monkeypatch.setattr(compare, "run_method", lambda *_, **__: pytest.fail("a method ran"))
    assert main(recipe(**changes)) == 2
    assert said in capsys.readouterr().err


def test_seeds_are_pooled_over_the_same_images(recipe, tmp_path):
    assert main(recipe(methods={"CE": METHODS["CE"]})) == 0
    out = tmp_path / "out"
    right = []
    for seed in (0, 1):
        with np.load(out / "CE" / f"seed-{seed}" / "answers.npz") as arrays:
            right.append(np.mean(arrays["class words/clean"] == np.arange(12) % 4))
    found = json.loads((out / "report.json").read_text())["models"]["CE"]["clean_accuracy"]["value"]
    assert found == pytest.approx(np.mean(right))


def test_no_winner_is_named_where_no_method_is_within_the_bound(recipe, tmp_path, capsys, monkeypatch):
    report = compare.robustness_report

    def costly(answers, name, base, **settings):
        found = report(answers, name, base, **settings)
        if "clean_cost" in found:
            found["clean_cost"] = Estimate(8.3)
        return found

    monkeypatch.setattr(compare, "robustness_report", costly)
    methods = {"none": {"method": "text_removal"}}
    assert main(recipe(methods=methods, seeds=[0])) == 0
    printed = capsys.readouterr().out
    assert "No method costs at most 0.5 points of clean accuracy. The cheapest, none, costs 8.3." in printed
    assert "Highest recovery" not in printed
    assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["best"] is None


def test_a_bound_that_nothing_can_hold_is_refused_before_anything_is_loaded(recipe, capsys):
    assert main(recipe(max_clean_cost=-1)) == 2
    assert "max_clean_cost" in capsys.readouterr().err


def test_what_the_methods_keep_of_other_tasks(recipe, tmp_path, clip_folder, processor, capsys):
    """Over two seeds, against the evaluators on the checkpoints; a comparison that continues measures nothing."""
    things = write_parquet(new_folder(tmp_path, "things"), test=16)
    views = new_folder(tmp_path, "views")
    make_labelled(5).select_columns("image").to_parquet(views / "test.parquet")
    methods = {"CE": {**METHODS["CE"], "learning_rate": 0.01}, "mirror": METHODS["mirror"]}
    command = recipe(methods=methods, retention=[str(things), str(views)], attacks={"class words": {}})
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "mean over things (test, 16 images), views (test, 5 images, drift only)." in printed
    report = read_report(tmp_path / "out" / "report.json")
    found = report_estimates(report["retention"])

    base = CLIPModel.from_pretrained(clip_folder)
    texts = open_vocabulary("a photo of a {}", CLASSES)
    costs, drifts = [], []
    for seed in (0, 1):
        models = {
            "base": base,
            "CE": CLIPModel.from_pretrained(tmp_path / "out" / "CE" / f"seed-{seed}" / "checkpoint"),
        }
        retention = RetentionEvaluator({"things": RetentionSet(make_labelled(16))}, processor)
        costs.append(retention(models, "base", disable_tqdm=True)["CE"]["retention_cost"].value)
        sets = (make_labelled(16), make_labelled(5))
        kl = [
            DriftEvaluator(rows, processor, texts)(models, "base", disable_tqdm=True)["CE"]["kl"].value
            for rows in sets
        ]
        drifts.append(np.mean(kl))
    assert max(map(abs, costs)) > 0
    assert found["CE"]["retention_cost"].value == pytest.approx(np.mean(costs))
    assert found["CE"]["kl"].value == pytest.approx(np.mean(drifts), abs=1e-5)
    assert "retention_cost" not in found["before"]
    assert report_estimates(report)["CE"]["kl"] == found["CE"]["kl"]
    header, _, _, row, *_ = (tmp_path / "out" / "table.md").read_text().splitlines()
    cells = dict(zip(map(str.strip, header.split("|")), map(str.strip, row.split("|")), strict=True))
    assert cells["retention cost"].startswith(format_number(np.mean(costs)))
    assert cells["drift"].startswith(format_number(np.mean(drifts)))
    assert "Other tasks, 95% intervals" in (tmp_path / "out" / "report.html").read_text()

    assert main(command) == 0
    again = report_estimates(read_report(tmp_path / "out" / "report.json")["retention"])
    assert repr(again) == repr(found)
    assert main(recipe(methods=methods, retention=str(things), attacks={"class words": {}})) != 0
    assert "with other settings (retention)" in capsys.readouterr().err


def new_folder(folder, name):
    (folder / name).mkdir()
    return folder / name
