"""clip-po evaluate --retention, end to end: tables, report, card, page and pictures of what was kept."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from samples import CLASSES, make_labelled, picture, tiny_config, write_parquet
from transformers import CLIPModel

from clip_po.cli.main import main
from clip_po.data.vocabulary import open_vocabulary
from clip_po.evaluation.drift import DriftEvaluator
from clip_po.evaluation.zero_shot import zero_shot_accuracy
from clip_po.hub.card import MEASURED

TEMPLATE = "a photo of a {}"


@pytest.fixture(scope="module")
def models(clip_folder, tmp_path_factory):
    """A base and another model, with a card."""
    folder = tmp_path_factory.mktemp("aligned")
    torch.manual_seed(5)
    CLIPModel(tiny_config(initializer_factor=4.0)).save_pretrained(folder)
    for file in clip_folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "README.md").write_text(f"# A model\n\n{MEASURED}\n\nNothing was measured yet.\n\n## Settings\n")
    return clip_folder, folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The task, 12 labelled images of other things, and 5 images without labels."""
    folder = tmp_path_factory.mktemp("sets")
    for name in ("task", "things", "views/test"):
        (folder / name).mkdir(parents=True)
    write_parquet(folder / "task", test=8)
    write_parquet(folder / "things", train=4, test=12)
    for number in range(5):
        picture(200 + number).save(folder / "views" / "test" / f"{number}.png")
    return folder


@pytest.fixture
def evaluate(models, sets, tmp_path, capsys):
    def run(*arguments, base=True):
        before, after = models
        flags = ["--model_name_or_path", after, "--dataset_name", sets / "task", "--output_dir", tmp_path / "out"]
        flags += ["--base_model_name_or_path", before] if base else []
        status = main(["evaluate", *map(str, flags), "--batch_size", "4", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_another_table_under_the_first(evaluate, models, sets, tmp_path, processor):
    status, printed, _ = evaluate("--retention", sets / "things", sets / "views")
    assert status == 0
    first, second, note = printed.split("\n\n")
    assert "recovery" in first.splitlines()[0]
    assert [line.split("|")[1].strip() for line in second.splitlines()[2:]] == [
        *["things"] * 2,
        "views",
        *["mean over the sets"] * 2,
    ]
    texts = open_vocabulary(TEMPLATE, CLASSES)
    assert note.startswith(f"Drift is KL(base || model) over {len(texts)} texts")

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = report["retention"]["models"]
    things, views = make_labelled(12), Dataset.from_dict({"image": [picture(200 + n) for n in range(5)]})
    both = {"base": CLIPModel.from_pretrained(models[0]), "aligned": CLIPModel.from_pretrained(models[1])}
    share = {}
    for name, model in both.items():
        result = zero_shot_accuracy(model, processor, things, [TEMPLATE], disable_tqdm=True, resamples=2)
        share[name] = result.accuracy.value
        assert found[name]["things: accuracy"]["value"] == pytest.approx(share[name])
    lost = 100 * (share["base"] - share["aligned"])
    assert found["aligned"]["things: retention_cost"]["value"] == pytest.approx(lost)
    assert found["aligned"]["retention_cost"]["value"] == pytest.approx(lost)
    kl = []
    for name, rows in (("things", things), ("views", views)):
        drift = DriftEvaluator(rows, processor, texts)(both, "base", disable_tqdm=True)["aligned"]
        for metric, estimate in drift.items():
            assert found["aligned"][f"{name}: {metric}"]["value"] == pytest.approx(estimate.value, abs=1e-5)
        kl.append(drift["kl"].value)
    assert found["aligned"]["kl"]["value"] == pytest.approx(np.mean(kl), abs=1e-5)
    assert report["retention"]["sets"]["views"]["rows"] == 5
    assert report["retention"]["sets"]["things"] == {
        "source": "things",
        "split": "test",
        "rows": 12,
        "classes": 4,
        "prompt_template": [TEMPLATE],
    }

    answers = Dataset.from_parquet(str(tmp_path / "out" / "things-answers.parquet"))
    assert np.mean(np.array(answers["aligned/clean"]) == np.array(answers["label"])) == pytest.approx(share["aligned"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Other tasks, 95% intervals" in page
    assert "Changed answers: things" in page
    assert (tmp_path / "out" / "things-changed_answers.png").stat().st_size > 1000


def test_the_card_of_the_checkpoint_gets_the_table(evaluate, models, sets, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_bytes((models[1] / "README.md").read_bytes())
    evaluate("--retention", sets / "things")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| other tasks | images | model" in card
    assert "## Settings" in card


def test_without_a_base_there_is_accuracy_alone_and_the_command_says_so(evaluate, sets, tmp_path):
    _, printed, _ = evaluate("--retention", sets / "things", sets / "views", base=False)
    assert "give --base_model_name_or_path to measure them" in printed
    found = json.loads((tmp_path / "out" / "report.json").read_text())["retention"]["models"]
    assert found["model"].keys() == {"accuracy", "things: accuracy"}


def test_max_samples_is_for_each_set(evaluate, sets, tmp_path):
    evaluate("--retention", f"{sets / 'things'}:test", sets / "views", "--max_samples", 3)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {name: about["rows"] for name, about in report["retention"]["sets"].items()} == {"things": 3, "views": 3}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--retention", "no/such"], "--retention 'no/such' can't be loaded"),
        (["--retention", "dtd", "--suite", "retrieval"], "--retention has no effect next to --suite"),
        (["--retention", "dtd", "--fairness", "label"], "--retention has no effect next to --fairness"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_measurement(evaluate, arguments, said, monkeypatch):
    monkeypatch.setattr("clip_po.cli.evaluate.load_models", lambda *_: pytest.fail("a model was loaded"))
    status, _, error = evaluate(*arguments)
    assert status != 0
    assert said in error
