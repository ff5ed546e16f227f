"""The line after clip-po train: how far the model moved, on clean training images over an open vocabulary."""

import json

import numpy as np
import pytest
import torch
from samples import CLASSES, TINY_RUN, make_labelled, picture, write_parquet
from transformers import CLIPModel

from clip_po.cli import promise, train, train_drift
from clip_po.cli.main import main
from clip_po.data.attacks.words import EVERYDAY_WORDS
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.interpolation import Choice
from clip_po.evaluation.training_drift import DRIFT_FILE, TrainingDrift
from clip_po.models import load_any
from clip_po.training.sharding import SHARDING_IS_EXACT

ROWS = 13  # a number that two processes do not divide
TEXTS = [f"a photo of a {word}" for word in [*EVERYDAY_WORDS, *CLASSES]]


@pytest.fixture
def command(clip_folder, tmp_path):
    """The flags of a short run that moves the model, with more of them after."""
    data = write_parquet(tmp_path / "data", train=ROWS) if (tmp_path / "data").mkdir() is None else None

    def flags(*more, out="out"):
        where = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(data)]
        quick = ["--save_strategy", "no", "--learning_rate", "0.003", "--output_dir", str(tmp_path / out)]
        return ["train", *where, *TINY_RUN, *quick, *more]

    return flags


def logits_of(model, processor):
    """Logits and image embeddings of the clean images, by transformers alone."""
    inputs = processor(images=[picture(row) for row in range(ROWS)], text=TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    return outputs.logits_per_image.double(), torch.nn.functional.normalize(outputs.image_embeds, dim=-1)


def expected_drift(before, after, processor):
    """KL in nats, agreement and cosine, image by image."""
    (first, first_embeds), (then, then_embeds) = (logits_of(model, processor) for model in (before, after))
    kl = torch.nn.functional.kl_div(then.log_softmax(1), first.log_softmax(1), log_target=True, reduction="none").sum(
        1
    )
    same = (first.argmax(1) == then.argmax(1)).double()
    return {"kl": kl.mean(), "agreement": same.mean(), "cosine": (first_embeds * then_embeds).sum(1).mean()}


def assert_is_drift(found, before, after, processor):
    for name, value in expected_drift(before, after, processor).items():
        assert found[name]["value"] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert (found["images"], found["texts"]) == (ROWS, len(TEXTS))


# A reference that becomes the policy after each step: the model has not moved from it, but from where it started.
FOLLOWS = ["--sync_ref_model", "true", "--ref_model_mixup_alpha", "1", "--ref_model_sync_steps", "1"]


@pytest.mark.parametrize("lora", [[], ["--use_peft", "--lora_r", "4"], FOLLOWS], ids=["full", "lora", "follows"])
def test_the_line_is_printed_and_kept_beside_the_model(command, clip_folder, processor, tmp_path, capsys, lora):
    assert main(command(*lora)) == 0
    out = tmp_path / "out"
    found = json.loads((out / DRIFT_FILE).read_text())
    assert_is_drift(found, CLIPModel.from_pretrained(clip_folder), load_any(str(out)), processor)
    assert found["kl"]["value"] > 1e-3
    kl = TrainingDrift(**{**found, **{n: Estimate(**found[n]) for n in ("kl", "agreement", "cosine")}})
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("Drift")] == [kl.describe()]
    assert kl.describe() in (out / "README.md").read_text()
    (logged,) = [line for line in printed if "'drift/kl'" in line]
    assert {"drift/kl", "drift/agreement", "drift/cosine"} <= set(json.loads(logged.replace("'", '"')))


@pytest.mark.parametrize("more", [[], FOLLOWS], ids=["stays", "follows"])
def test_it_says_how_far_the_saved_model_moved_not_the_trained_one(
    more, command, clip_folder, processor, tmp_path, monkeypatch
):
    monkeypatch.setattr(promise, "choose_alpha", lambda points, bounds: Choice(points[3], bounds))
    assert main(command("--max_clean_cost", "1", "--dataset_validation_split", "train", *more)) == 0
    found = json.loads((tmp_path / "out" / DRIFT_FILE).read_text())
    assert_is_drift(found, CLIPModel.from_pretrained(clip_folder), load_any(str(tmp_path / "out")), processor)


def test_training_is_the_same_as_without_it(command, tmp_path, monkeypatch):
    trainers = []
    for measured in (True, False):
        trainer, task = train.align(*train.parse(command(out=f"out-{measured}")[1:]))
        before = torch.get_rng_state()
        if measured:
            train_drift.log_drift(trainer, task)
        assert torch.equal(torch.get_rng_state(), before)
        trainers.append(trainer)
    first, then = (trainer.model.state_dict() for trainer in trainers)
    assert all(torch.equal(weight, then[name]) for name, weight in first.items())


def test_a_broken_image_does_not_lose_the_trained_model(command, tmp_path):
    trainer, task = train.align(*train.parse(command()[1:]))
    rows = trainer.train_dataset.preferences.task
    broken = rows.dataset.to_list()
    broken[3]["image"]["bytes"] = b"no image"
    rows.dataset = rows.dataset.from_list(broken, features=rows.dataset.features)
    assert train_drift.log_drift(trainer, task).images == ROWS - 1


def test_at_most_a_thousand_images_are_drawn_by_the_seed(monkeypatch):
    rows = make_labelled(24)
    monkeypatch.setattr(train_drift, "MOST_IMAGES", 11)
    drawn = [[np.asarray(row["image"]).tobytes() for row in train_drift.sample(rows, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 11
    assert len(train_drift.sample(rows.select(range(4)), 0)) == 4


TWO_PROCESSES = """
import sys
from unittest import mock
from clip_po.cli import train
from clip_po.cli.main import main
from distributed.worker import shard_from_here_on
kind, parse, measure = sys.argv[1], train.parse, train.log_drift
def sharding(argv):
    arguments = parse(argv)
    if kind == "sharded":
        shard_from_here_on()
    return arguments
def log_drift(trainer, task):
    assert ("DTensor" in {type(weight).__name__ for weight in trainer.model.parameters()}) == (kind == "sharded")
    return measure(trainer, task)
with mock.patch.multiple(train, parse=sharding, log_drift=log_drift):
    assert main(sys.argv[2:]) == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["whole", pytest.param("sharded", marks=pytest.mark.skipif(not SHARDING_IS_EXACT, reason="FSDP is refused"))],
)
@pytest.mark.parametrize("lora", [[], ["--use_peft", "--lora_r", "4"]], ids=["full", "lora"])
def test_two_processes_share_the_work_and_one_prints(
    command, clip_folder, processor, tmp_path, two_processes, kind, lora
):
    # 13 images in batches of 3: one process runs three batches, the other two.
    evaluating = ["--eval_strategy", "steps", "--eval_steps", "1", "--per_device_eval_batch_size", "3"]
    wrote = two_processes.run(TWO_PROCESSES, kind, *command(*lora, *evaluating, "--dataset_validation_split", "train"))
    found = json.loads((tmp_path / "out" / DRIFT_FILE).read_text())
    assert_is_drift(found, CLIPModel.from_pretrained(clip_folder), load_any(str(tmp_path / "out")), processor)
    assert wrote.count("Drift on") == 1
    assert wrote.count("'eval_typographic_accuracy'") == 2
