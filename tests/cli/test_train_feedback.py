"""clip-po train on feedback of every kind, from files of every kind."""

import csv
import json

import datasets
import pytest
import torch
from samples import (
    PROMPTS,
    TINY_RUN,
    make_captioned,
    make_image_pairs,
    make_labelled,
    make_preferences,
    make_unpaired,
    picture,
)
from transformers import CLIPModel, CLIPProcessor

from clip_po.cli import train_feedback
from clip_po.cli.main import main
from clip_po.cli.train_feedback import kinds_of, load_feedback
from clip_po.data.loading import load_split


def save_pictures(folder, rows):
    """Files of pictures, and their paths below the folder."""
    (folder / "pictures").mkdir(parents=True)
    names = [f"pictures/{row}.png" for row in range(rows)]
    for row, name in enumerate(names):
        picture(row).save(folder / name)
    return names


def write_csv(file, rows):
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return file


def preferences_csv(folder):
    names = save_pictures(folder, 8)
    rows = [
        {"image": name, "chosen": PROMPTS[n % 4], "rejected": PROMPTS[(n + 1) % 4]} for n, name in enumerate(names)
    ]
    return write_csv(folder / "train.csv", rows)


def images_jsonl(folder):
    names = save_pictures(folder, 12)
    rows = [
        {"text": PROMPTS[n % 4], "chosen_image": names[n], "rejected_image": [names[n + 4], names[n + 8]]}
        for n in range(4)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


def unpaired_folder(folder):
    names = save_pictures(folder, 8)
    rows = [{"image": name, "text": PROMPTS[n % 4], "label": n % 3 != 0} for n, name in enumerate(names)]
    return write_csv(folder / "train.csv", rows).parent


def pick_a_pic_parquet(folder):
    folder.mkdir()
    names = save_pictures(folder, 8)
    files = [(folder / name).read_bytes() for name in names]
    columns = {"caption": PROMPTS, "jpg_0": files[:4], "jpg_1": files[4:], "label_0": [1.0, 0.0, 0.5, 1.0]}
    columns["label_1"] = [1 - label for label in columns["label_0"]]
    datasets.Dataset.from_dict(columns).to_parquet(folder / "train.parquet")
    return folder


def mixed_saved(folder):
    rows = datasets.concatenate_datasets(
        [make_preferences(4).remove_columns("clean_image"), make_image_pairs(4), make_unpaired(4)]
    )
    rows.save_to_disk(folder)
    return folder


KINDS = {
    "preferences": (preferences_csv, "preferences between texts: 8 rows", "loss_type sigmoid,"),
    "images": (images_jsonl, "preferences between images: 4 rows", "loss_type sigmoid,"),
    "unpaired": (unpaired_folder, "unpaired feedback: 8 rows", "loss_type kto,"),
    "pick-a-pic": (pick_a_pic_parquet, "preferences between images: 4 rows", "loss_type sigmoid,"),
    "mixed": (
        mixed_saved,
        "preferences between texts and preferences between images and unpaired feedback: 12 rows",
        "loss_type sigmoid + kto,",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_feedback_is_recognized_and_trained_on_as_it_is(kind, clip_folder, tmp_path, capsys):
    make, found, loss = KINDS[kind]
    out = tmp_path / "out"
    flags = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(make(tmp_path / "data"))]
    status = main(["train", *flags, "--output_dir", str(out), "--learning_rate", "1e-3", *TINY_RUN])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert f"Found {found}. Training with {loss} without ordinary images." in said.out.replace("\n", " ")
    assert "Aligned" in said.out
    start, trained = CLIPModel.from_pretrained(clip_folder), CLIPModel.from_pretrained(out)
    changed = {
        name.split(".")[0]
        for name, weight in start.state_dict().items()
        if not torch.equal(weight, trained.state_dict()[name])
    }
    assert changed == {"vision_model", "visual_projection"}
    CLIPProcessor.from_pretrained(out)
    assert "preference optimization" in (out / "README.md").read_text()


def texts_without_rejected(folder):
    make_preferences(8).remove_columns(["rejected", "clean_image"]).to_parquet(folder / "train.parquet")


def images_without_rejected(folder):
    make_image_pairs(8).remove_columns("rejected_image").to_parquet(folder / "train.parquet")


@pytest.mark.parametrize("make", [texts_without_rejected, images_without_rejected])
def test_hard_candidates_are_added_to_the_training_rows(make, clip_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    trained = []
    fit = train_feedback.feedback_trainer
    monkeypatch.setattr(train_feedback, "feedback_trainer", lambda *args: trained.append(fit(*args)) or trained[0])
    make(tmp_path)
    flags = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(tmp_path / "train.parquet")]
    flags += ["--output_dir", str(tmp_path / "out"), "--learning_rate", "1e-3", "--hard_candidates", "2", *TINY_RUN]
    status = main(["train", *flags])
    said = capsys.readouterr()
    assert status == 0, said.err
    rows = [trained[0].train_dataset[row] for row in range(8)]
    batch = trained[0].data_collator(rows)
    assert batch["rejected"].shape == (8, 2)
    assert (batch["rejected"] >= 0).all()


@pytest.mark.parametrize(
    ("make", "flags", "message"),
    [
        (unpaired_folder, ["--hard_candidates", "2"], "the rows are unpaired feedback"),
        (preferences_csv, ["--hard_margin", "0.1"], "--hard_margin has no effect without --hard_candidates"),
        (preferences_csv, ["--hard_candidates", "0"], "--hard_candidates must be a whole number >= 1"),
        (
            lambda folder: folder.mkdir() or (make_labelled(8).to_parquet(folder / "train.parquet") and folder),
            ["--hard_candidates", "2"],
            "--hard_candidates is for preferences",
        ),
    ],
)
def test_hard_candidates_without_a_use_are_refused(make, flags, message, clip_folder, tmp_path, capsys):
    given = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(make(tmp_path / "data"))]
    assert main(["train", *given, "--output_dir", str(tmp_path / "out"), *flags, *TINY_RUN]) == 2
    assert message in capsys.readouterr().err


def test_ordinary_images_with_texts_hold_the_model(clip_folder, tmp_path, capsys):
    make_image_pairs(8).to_parquet(tmp_path / "pairs.parquet")
    make_captioned(6).to_parquet(tmp_path / "ordinary.parquet")
    flags = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(tmp_path / "pairs.parquet")]
    flags += ["--reg_dataset_name", str(tmp_path / "ordinary.parquet"), "--eval_strategy", "epoch"]
    status = main(["train", *flags, "--output_dir", str(tmp_path / "out"), *TINY_RUN, "--logging_steps", "1"])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "7 rows" in said.out  # one of eight is held out
    assert "held by kl on ordinary images" in said.out
    assert "'loss/regularization'" in said.out
    assert "'eval_rewards/accuracies'" in said.out


def test_labelled_images_are_no_feedback(tmp_path):
    make_labelled(8).to_parquet(tmp_path / "train.parquet")
    assert load_feedback(["--dataset_name", str(tmp_path)]) is None
    assert load_feedback(["--dataset_name", str(tmp_path / "missing")]) is None
    assert load_feedback([]) is None


def test_the_recipe_may_name_the_data(tmp_path):
    (tmp_path / "run.yaml").write_text(f"dataset_name: {images_jsonl(tmp_path / 'data')}\n")
    rows = load_feedback(["--config", str(tmp_path / "run.yaml")])
    assert kinds_of(rows) == ["images"]
    assert rows[1]["rejected_image"][0].size == (32, 32)
    assert load_split(str(tmp_path / "data" / "train.jsonl"), "train").column_names == rows.column_names


def test_flags_about_labelled_images_are_refused(clip_folder, tmp_path, capsys):
    flags = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(unpaired_folder(tmp_path / "data"))]
    status = main(["train", *flags, "--output_dir", str(tmp_path / "out"), "--max_clean_cost", "1", *TINY_RUN])
    assert status == 2
    assert "--max_clean_cost is for labelled images" in capsys.readouterr().err
