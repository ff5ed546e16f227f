"""clip-po train and compare: the most robust interpolation under bounds on clean accuracy, drift and retention."""

import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from samples import CLASSES, TINY_RUN, make_labelled, picture, write_parquet
from transformers import CLIPModel

from clip_po import interpolate
from clip_po.cli import promise, train
from clip_po.cli.main import main
from clip_po.data.attacks.words import EVERYDAY_WORDS
from clip_po.evaluation.bounds import Bounds
from clip_po.evaluation.interpolation import Choice, choose_alpha
from clip_po.models import load_any
from clip_po.trainer import ContrastivePOTrainer

VALIDATION, OTHERS = 10, range(24, 44)


@pytest.fixture
def command(clip_folder, tmp_path):
    """The flags of a short run that moves the model, and a retention set `others` to measure."""
    write_parquet(make_folder(tmp_path / "data"), train=16, validation=VALIDATION)
    others = make_labelled(max(OTHERS) + 1).select(OTHERS)
    others.to_parquet(make_folder(tmp_path / "others") / "test-00000-of-00001.parquet")

    def flags(*more):
        where = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(tmp_path / "data")]
        quick = ["--save_strategy", "no", "--learning_rate", "0.003", "--output_dir", str(tmp_path / "out")]
        return ["train", *where, "--dataset_validation_split", "validation", *TINY_RUN, *quick, *more]

    return flags


def make_folder(path):
    path.mkdir()
    return path


def logits_of(model, processor, rows, words):
    texts = [f"a photo of a {word}" for word in words]
    inputs = processor(images=[picture(row) for row in rows], text=texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(**inputs).logits_per_image.double()


@pytest.fixture
def swept(monkeypatch):
    """The points of the sweep. The fourth is chosen: of a model that knows nothing, chance would choose."""
    found = []

    def fourth(points, bounds):
        found.extend(points)
        choice = choose_alpha(points, bounds)
        return Choice(points[3], bounds, choice.next_better, choice.unproven, choice.images_needed)

    monkeypatch.setattr(promise, "choose_alpha", fourth)
    return found


def test_drift_and_retention_cost_of_each_interpolation_are_measured(
    command, clip_folder, processor, tmp_path, capsys, swept
):
    bounds = ["--max_clean_cost", "50", "--max_drift", "9", "--max_retention_cost", "50"]
    assert main(command(*bounds, "--retention", str(tmp_path / "others"))) == 0
    base, saved = CLIPModel.from_pretrained(clip_folder), load_any(str(tmp_path / "out"))
    whole = interpolate(base, saved, 1 / 0.3)  # the saved model is alpha 0.3
    for place in (5, 10):
        model = interpolate(base, whole, place / 10)
        was, now = (logits_of(m, processor, range(VALIDATION), [*EVERYDAY_WORDS, *CLASSES]) for m in (base, model))
        was, now = was.log_softmax(1), now.log_softmax(1)
        kl = (was.exp() * (was - now)).sum(1).mean().item()
        costs = swept[place].costs
        assert costs["drift"].estimate.value == pytest.approx(kl, rel=0.02)
        assert costs["drift"].images == VALIDATION
        labels = torch.tensor([row % 4 for row in OTHERS])
        said = [logits_of(m, processor, OTHERS, CLASSES).argmax(1) for m in (base, model)]
        right = [(answers == labels).double().mean() for answers in said]
        assert costs["retention_cost"].estimate.value == pytest.approx(100 * (right[0] - right[1]).item())
        assert costs["retention_cost"].images == len(OTHERS)
        for cost in costs.values():
            assert cost.estimate.value <= cost.upper <= cost.estimate.high
    printed = capsys.readouterr().out
    assert re.search(r" drift \(nats\) .* retention cost \(points\) ", printed)
    assert re.search(
        rf"^alpha 0\.3: .*\(bound 50, {VALIDATION} images\), drift of .*\(bound 9, {VALIDATION} images\), retention "
        rf"cost of .*\(bound 50, {len(OTHERS)} images\)\.$",
        printed,
        re.MULTILINE,
    )
    assert re.search(r"^(What binds is|No bound binds)", printed, re.MULTILINE)
    said = printed.index("A retention cost of at most 50 points, with 95% confidence, takes at least 5 images")
    assert said < printed.index("'train_loss'")


def test_a_bound_on_the_drift_alone_saves_a_model_that_keeps_it(command, clip_folder, processor, tmp_path, capsys):
    assert main(command("--max_drift", "0.02")) in (0, 3)  # 3: only the base keeps it
    base, saved = CLIPModel.from_pretrained(clip_folder), load_any(str(tmp_path / "out"))
    words = [*EVERYDAY_WORDS, *CLASSES]
    was, now = (logits_of(m, processor, range(VALIDATION), words).log_softmax(1) for m in (base, saved))
    assert (was.exp() * (was - now)).sum(1).mean() < 0.02
    assert "validation images" not in capsys.readouterr().out  # no number of images is known to prove a drift


def trains(*args, **kwargs):
    pytest.fail("it trained")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max_drift", "-0.1"], "max_drift must be a finite number of nats >= 0, got -0.1"),
        (["--max_retention_cost", "nan", "--retention", "x"], "max_retention_cost must be a finite number"),
        (["--max_retention_cost", "1"], "max_retention_cost is a bound on the sets of retention"),
        (["--retention", "x"], "Give --max_retention_cost"),
        (["--retention", "x", "--max_drift", "1"], "Give --max_retention_cost"),
        (["--retention", "nowhere/at/all", "--max_retention_cost", "1"], "nowhere/at/all"),
    ],
)
def test_bounds_that_can_not_be_kept_are_refused_before_anything_is_loaded(command, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(train, "load_start", trains)
    assert main(command(*flags)) == 2
    assert said in capsys.readouterr().err


def test_sharded_weights_are_refused_before_training(monkeypatch):
    with pytest.raises(ValueError, match=r"--max_drift: .* FSDP divides them"):
        promise.promised(SimpleNamespace(is_fsdp_enabled=True), None, Bounds(max_drift=1), {})


def test_a_single_row_to_measure_drift_on_is_refused_before_training(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ContrastivePOTrainer, "train", trains)
    few = write_parquet(make_folder(tmp_path / "few"), train=10)
    assert (
        main(
            [
                *command("--max_drift", "1")[:3],
                "--dataset_name",
                str(few),
                "--max_drift",
                "1",
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "--dataset_validation_split" in capsys.readouterr().err


TWO_PROCESSES = """
import sys
from clip_po.cli.main import main
assert main(sys.argv[1:]) in (0, 3)
"""


@pytest.mark.slow
def test_two_processes_choose_one_model(command, clip_folder, tmp_path, two_processes):
    bounds = ["--max_drift", "9", "--max_retention_cost", "90", "--retention", str(tmp_path / "others")]
    wrote = two_processes.run(TWO_PROCESSES, *command(*bounds))
    assert len(re.findall(r"^alpha [\d.]+: typographic accuracy", wrote, re.MULTILINE)) == 1
    assert wrote.count("A retention cost of at most 90 points") == 1
    load_any(str(tmp_path / "out"))


# ---- compare --------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(clip_folder, command, tmp_path):
    def write(**interpolation):
        settings = {
            "model_name_or_path": str(clip_folder),
            "dataset_name": str(tmp_path / "data"),
            "dataset_validation_split": "validation",
            "output_dir": str(tmp_path / "compared"),
            "seeds": [0],
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True},
            "attacks": {"class words": {}},
            "dataset_test_split": "validation",
            "methods": {"CE": {"loss_type": "sft"}, "kept": {"method": "interpolation", "of": "CE", **interpolation}},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        return ["compare", "--config", str(tmp_path / "recipe.yaml")]

    return write


def test_an_interpolation_of_a_comparison_keeps_the_same_bounds(recipe, tmp_path):
    others = {"max_drift": 0.5, "max_retention_cost": 60, "retention": [str(tmp_path / "others")]}
    assert main(recipe(max_clean_cost=90, **others)) == 0
    said = "".join(file.read_text() for file in (tmp_path / "compared" / "kept").rglob("*.json"))
    assert "(bound 0.5, 10 images)" in said
    assert "(bound 60, 20 images)" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_drift": -1}, "max_drift must be a finite number of nats >= 0, got -1"),
        ({"max_retention_cost": 1}, "max_retention_cost is a bound on the sets of retention"),
        ({"max_retention_cost": 1, "retention": ["nowhere/at/all"]}, "nowhere/at/all"),
    ],
)
def test_bounds_of_a_comparison_are_refused_before_any_method_runs(recipe, capsys, monkeypatch, settings, said):
    monkeypatch.setattr(train, "align", trains)
    assert main(recipe(**settings)) == 2
    assert said in capsys.readouterr().err


def test_a_set_without_labels_bounds_no_retention_cost(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_start", trains)
    picture(0).save(make_folder(tmp_path / "pictures") / "0.png")
    assert main(command("--max_retention_cost", "1", "--retention", str(tmp_path / "pictures"))) == 2
    assert "pictures has no labels, which max_retention_cost is measured by" in capsys.readouterr().err
