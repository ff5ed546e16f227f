"""A used output folder: a second run replaces nothing of the first unless it is told to."""

from pathlib import Path

import pytest
from samples import TINY_RUN, make_trainer, write_parquet
from transformers import CLIPModel

from clip_po.cli.main import main
from clip_po.training.checkpoints import MARK, last_whole_checkpoint

SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}


@pytest.fixture
def used(clip_folder, tmp_path):
    """A folder with the one checkpoint of a finished run."""
    make_trainer(str(clip_folder), tmp_path, **SAVES).train()
    return tmp_path


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("settings", [{}, {"save_total_limit": 1}, {"save_strategy": "epoch"}])
def test_a_second_run_does_not_delete_the_checkpoints_of_the_first(clip_folder, used, settings):
    before = files(used)
    second = make_trainer(str(clip_folder), used, **{**SAVES, "max_steps": 4, **settings})
    with pytest.raises(ValueError, match=r"holds checkpoint-2 of an earlier run.*overwrite_output_dir=True"):
        second.train()
    assert files(used) == before


def test_checkpoints_of_another_trainer_are_kept_too(clip_folder, used):
    (used / "checkpoint-2" / MARK).unlink()  # which transformers' Trainer does not write
    (used / "checkpoint-2" / "training_args.bin").touch()  # which it does write
    with pytest.raises(ValueError, match="holds checkpoint-2"):
        make_trainer(str(clip_folder), used, **SAVES).train()


def test_a_run_that_was_killed_in_its_first_checkpoint_starts_again(clip_folder, used):
    (used / "checkpoint-2" / MARK).unlink()
    trainer = make_trainer(str(clip_folder), used, **SAVES)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(used))
    assert last_whole_checkpoint(used) is not None


def test_the_same_trainer_does_not_delete_its_own_checkpoints(clip_folder, tmp_path):
    trainer = make_trainer(str(clip_folder), tmp_path, **SAVES)
    trainer.train()
    with pytest.raises(ValueError, match="holds checkpoint-2"):
        trainer.train()


def test_a_resume_from_another_folder_does_not_delete_the_checkpoints_of_this_one(clip_folder, used, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    make_trainer(str(clip_folder), other, **SAVES).train()
    longer = {**SAVES, "max_steps": 4}
    with pytest.raises(ValueError, match="holds checkpoint-2"):
        make_trainer(str(clip_folder), used, **longer).train(resume_from_checkpoint=str(other / "checkpoint-2"))
    make_trainer(str(clip_folder), used, **longer).train(resume_from_checkpoint=str(used / "checkpoint-2"))


def test_a_run_that_is_told_to_overwrite_leaves_its_own_checkpoints_only(clip_folder, used):
    shorter = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "overwrite_output_dir": True}
    (used / "checkpoint-best").mkdir()
    make_trainer(str(clip_folder), used, **shorter).train()
    # A checkpoint with a higher step would be what a resume takes.
    assert Path(last_whole_checkpoint(used)).name == "checkpoint-1"
    assert sorted(path.name for path in used.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-best"]


def test_a_run_that_fails_before_its_first_step_deletes_nothing(clip_folder, used):
    trainer = make_trainer(str(clip_folder), used, train_dataset=None, overwrite_output_dir=True, **SAVES)
    with pytest.raises(ValueError, match="train_dataset"):
        trainer.train()
    assert last_whole_checkpoint(used) is not None


def test_a_run_without_checkpoints_may_use_the_folder(clip_folder, used):
    make_trainer(str(clip_folder), used, max_steps=1).train()
    assert last_whole_checkpoint(used) is not None


# ---- The commands ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("photos"), train=20, test=8)


@pytest.mark.parametrize(
    ("command", "saved"),
    [
        (["train", "--save_strategy", "no"], "model.safetensors"),
        (["train", "--save_strategy", "epoch"], "checkpoint-2"),
        (["train", "--save_strategy", "no", "--use_peft", "--lora_r", "2"], "adapter_model.safetensors"),
        (["steer", "--choose", "at_most", "--max_clean_cost", "100", "--t", "0", "1"], "concept.safetensors"),
    ],
)
def test_a_command_replaces_no_earlier_result(clip_folder, photos, tmp_path, capsys, monkeypatch, command, saved):
    data = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(photos), "--output_dir", str(tmp_path)]
    flags = [*command, *data, *TINY_RUN]
    assert main(flags) in (0, 3)
    before = files(tmp_path)
    monkeypatch.setattr(CLIPModel, "from_pretrained", None)  # said before anything is loaded
    assert main([*flags, "--seed", "7"]) == 2
    assert files(tmp_path) == before
    said = capsys.readouterr().err
    assert saved in said
    assert "--overwrite_output_dir" in said
    monkeypatch.undo()
    assert main([*flags, "--overwrite_output_dir"]) in (0, 3)
    assert files(tmp_path) != before


def test_steer_resumes(clip_folder, photos, tmp_path):
    data = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(photos), "--output_dir", str(tmp_path)]
    flags = ["steer", "--choose", "at_most", "--max_clean_cost", "100", "--t", "0", "1", *data, *TINY_RUN]
    flags += ["--save_strategy", "steps", "--save_steps", "1"]
    assert main(flags) in (0, 3)
    written = files(tmp_path / "checkpoint-2")
    assert main([*flags, "--resume_from_checkpoint", "true"]) in (0, 3)
    assert files(tmp_path / "checkpoint-2") == written  # a finished run is not trained again
