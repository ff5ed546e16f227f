"""Nothing is lost: a killed run goes on from a whole checkpoint and ends with the same bits."""

import errno
import importlib
import json
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from samples import StopAt, make_preferences, same, tiny_config, tiny_processor
from transformers import CLIPModel, TrainerCallback

from clip_po.training.averaging import AVERAGE_FILE, BetaMovingAverageCallback
from clip_po.training.checkpoints import MARK, is_whole, last_whole_checkpoint, whole_checkpoint

RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def kills(monkeypatch):
    """The benchmark that kills runs."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("kills")


def checkpoints(trainer):
    return sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


class Signal(TrainerCallback):
    """Saves as transformers does on SIGTERM: at once, and without asking callbacks."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            control.should_training_stop = True


@pytest.mark.parametrize("save_steps", [2, 6])
def test_a_checkpoint_written_on_a_signal_is_whole_and_loses_none(make_trainer, save_steps):
    signal = Signal(2)  # which is when one was just saved, or not
    signal.trainer = make_trainer(
        callbacks=[BetaMovingAverageCallback(), signal], save_total_limit=1, save_steps=save_steps
    )
    signal.trainer.train()
    assert checkpoints(signal.trainer) == ["checkpoint-2"]
    folder = Path(signal.trainer.args.output_dir, "checkpoint-2")
    assert is_whole(folder)
    assert (folder / AVERAGE_FILE).is_file()


class Sees(TrainerCallback):
    """Notes what the arguments of checkpoints are when an event comes."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append((args.save_total_limit, args.hub_strategy))

    on_save = on_log = on_train_begin


def test_callbacks_and_trackers_see_the_arguments_as_they_were_given(make_trainer):
    sees = Sees()
    trainer = make_trainer(save_total_limit=1, logging_steps=1)
    given = (1, trainer.args.hub_strategy)
    trainer.add_callback(sees)
    trainer.train()
    assert set(sees.seen) == {given}
    assert (trainer.args.save_total_limit, trainer.args.hub_strategy) == given
    assert checkpoints(trainer) == ["checkpoint-6"]
    saved = json.loads(Path(trainer.args.output_dir, "checkpoint-6", "training_args.json").read_text())
    assert saved["save_total_limit"] == 1


def test_a_loop_that_starts_again_on_a_smaller_batch_keeps_the_limit(make_trainer, monkeypatch):
    trainer = make_trainer(save_total_limit=1, auto_find_batch_size=True)
    compute_loss, calls = trainer.compute_loss, []

    def runs_out_of_memory_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", runs_out_of_memory_once)
    trainer.train()
    assert trainer.args.save_total_limit == 1
    assert checkpoints(trainer) == ["checkpoint-6"]


def test_a_system_that_can_not_flush_folders_keeps_checkpoints_all_the_same(make_trainer, monkeypatch):
    def flush(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", flush)
    trainer = make_trainer(save_total_limit=1)
    trainer.train()
    assert checkpoints(trainer) == ["checkpoint-6"]
    assert is_whole(Path(trainer.args.output_dir, "checkpoint-6"))


def test_the_mark_is_the_last_file_and_comes_before_anything_is_deleted(make_trainer, monkeypatch):
    seen = []

    class Late(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            seen.append((is_whole(folder), (folder / AVERAGE_FILE).is_file(), len(checkpoints(trainer))))

    trainer = make_trainer(save_total_limit=1)
    trainer.add_callback(BetaMovingAverageCallback())
    trainer.add_callback(Late())
    trainer.train()
    # While callbacks write, the checkpoint is not whole yet and the older one is still there.
    assert seen == [(False, True, 1), (False, True, 2), (False, True, 2)]
    assert checkpoints(trainer) == ["checkpoint-6"]
    assert is_whole(Path(trainer.args.output_dir, "checkpoint-6"))


def test_a_half_written_checkpoint_is_never_taken(make_trainer):
    trainer = make_trainer()
    trainer.train()
    folder = Path(trainer.args.output_dir)
    (folder / "checkpoint-6" / MARK).unlink()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-4")
    with pytest.raises(ValueError, match=rf"checkpoint-6' has no {MARK}: saving was cut off.*checkpoint-4"):
        make_trainer().train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    assert is_whole(folder / "checkpoint-6")
    assert same(trainer.model.state_dict(), resumed.model.state_dict())


def test_a_left_over_half_is_not_kept_in_place_of_a_whole_one(make_trainer):
    trainer = make_trainer(save_total_limit=1)
    folder = Path(trainer.args.output_dir)
    (folder / "checkpoint-99").mkdir(parents=True)
    trainer.train()
    assert checkpoints(trainer) == ["checkpoint-6"]


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"no whole checkpoint.*start a new run"):
        make_trainer().train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="does not exist"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    assert whole_checkpoint(None, str(tmp_path)) is None
    assert whole_checkpoint(False, str(tmp_path)) is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_steps": -1, "num_train_epochs": 2},
        {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "save_total_limit": 1},
    ],
)
def test_resuming_a_finished_run_changes_nothing(make_trainer, settings):
    trainer = make_trainer(**{"save_steps": 1, **settings})
    trainer.train()
    weights = Path(last_whole_checkpoint(trainer.args.output_dir), "model.safetensors")
    written = weights.stat().st_mtime_ns
    again = make_trainer(**{"save_steps": 1, **settings})
    again.train(resume_from_checkpoint=True)
    assert weights.stat().st_mtime_ns == written  # to write it again would leave no whole checkpoint meanwhile
    assert again.state.global_step == trainer.state.global_step
    assert same(trainer.model.state_dict(), again.model.state_dict())


def test_a_checkpoint_stops_being_whole_before_anything_of_it_is_deleted(make_trainer, monkeypatch):
    seen = []

    def rmtree(path, **_):  # of a run that is killed before it has deleted a file
        seen.append((path.name, is_whole(path), Path(last_whole_checkpoint(path.parent)).name))

    monkeypatch.setattr("clip_po.training.checkpoints.shutil", SimpleNamespace(rmtree=rmtree))
    make_trainer(save_total_limit=1).train()
    assert seen == [
        ("checkpoint-2", False, "checkpoint-4"),
        ("checkpoint-2", False, "checkpoint-6"),
        ("checkpoint-4", False, "checkpoint-6"),
    ]


def test_a_half_deleted_checkpoint_takes_no_place_of_a_whole_one(make_trainer):
    trainer = make_trainer(callbacks=[StopAt(6)], max_steps=8)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    (folder / "checkpoint-4" / MARK).unlink()  # which makes it the one that was changed last
    make_trainer(max_steps=8, save_total_limit=2).train(resume_from_checkpoint=True)
    assert checkpoints(trainer) == ["checkpoint-6", "checkpoint-8"]


def test_killed_between_mark_and_deleting(make_trainer):
    trainer = make_trainer(callbacks=[StopAt(4)], max_steps=8)
    trainer.train()
    assert checkpoints(trainer) == ["checkpoint-2", "checkpoint-4"]
    resumed = make_trainer(max_steps=8, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert checkpoints(trainer) == ["checkpoint-8"]
    assert resumed.state.global_step == 8


def test_the_best_checkpoint_is_kept_with_the_last(make_trainer):
    class EarlyIsBest(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_early"] = -state.global_step

    trainer = make_trainer(
        callbacks=[EarlyIsBest()],
        max_steps=6,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_early",
        greater_is_better=True,
        eval_dataset=make_preferences(13),
    )
    trainer.train()
    assert checkpoints(trainer) == ["checkpoint-2", "checkpoint-6"]


def test_all_that_a_run_consists_of_comes_back(make_trainer, tmp_path, kills):
    """Optimizer, schedule, random numbers, order of rows, averaged weights, what the reference said, evaluations."""
    settings = {
        "max_steps": 9,
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": make_preferences(5),
        "model": tmp_path / "dropout",
        "disable_dropout": False,
    }
    CLIPModel(tiny_config({"attention_dropout": 0.2})).save_pretrained(settings["model"])
    tiny_processor().save_pretrained(settings["model"])
    first = make_trainer(callbacks=[BetaMovingAverageCallback()], folder="first", **settings)
    first.train()
    first.save_model()
    for step in (3, 6):
        resumed = make_trainer(callbacks=[BetaMovingAverageCallback()], folder=f"from {step}", **settings)
        checkpoint = Path(first.args.output_dir, f"checkpoint-{step}")
        shutil.copytree(checkpoint, Path(resumed.args.output_dir, checkpoint.name))
        resumed.train(resume_from_checkpoint=True)
        resumed.save_model()
        assert kills.differences(Path(first.args.output_dir), Path(resumed.args.output_dir), 9) == []


def test_differences_are_seen(make_trainer, tmp_path, kills):
    one, other = (make_trainer(folder=name, seed=seed) for name, seed in (("one", 1), ("other", 2)))
    for trainer in (one, other):
        trainer.train()
        trainer.save_model()
    found = kills.differences(Path(one.args.output_dir), Path(other.args.output_dir), 6)
    assert {"model.safetensors", "checkpoint-6/optimizer.pt"} <= set(found)
    assert "checkpoint-6/config.json" not in found


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path, kills):
    outcome = kills.kill_and_resume(tmp_path, kills=3)
    assert (outcome.different, outcome.looks_in_vain) == ([], 0)
    assert [kill.whole_step is not None for kill in outcome.kills] == [True] * 3


@pytest.mark.long
def test_a_run_killed_many_times_ends_with_the_same_bits(tmp_path, kills):
    outcome = kills.kill_and_resume(tmp_path, kills=8, seed=1)
    assert (outcome.different, outcome.looks_in_vain) == ([], 0)
    assert {kill.phase for kill in outcome.kills} >= {"writing", "training"}


@pytest.mark.parametrize("metric", [None, "loss", "eval_loss", "rewards/margins"])
def test_the_best_of_several_evaluations_needs_the_metric_of_one(make_trainer, metric):
    each_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    arguments = {
        "eval_dataset": {"one": make_preferences(4), "two": make_preferences(4)},
        "load_best_model_at_end": True,
        **each_step,
    }
    with pytest.raises(ValueError, match="such as 'eval_one_loss'"):
        make_trainer(metric_for_best_model=metric, **arguments)
    make_trainer(metric_for_best_model="eval_two_loss", **arguments).train()
