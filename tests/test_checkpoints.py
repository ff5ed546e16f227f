"""Nothing is lost: a killed run goes on from a whole checkpoint and ends with the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samples import PROMPTS, make_preferences
from transformers import TrainerCallback

from clip_po.averaging import AVERAGE_FILE, BetaMovingAverageCallback
from clip_po.checkpoints import MARK, is_whole, last_whole_checkpoint, whole_checkpoint
from clip_po.config import ContrastivePOConfig
from clip_po.trainer import ContrastivePOTrainer

WORKER = Path(__file__).with_name("kill_worker.py")


@pytest.fixture
def make_trainer(clip_folder, tmp_path):
    def make(*callbacks, folder="run", **arguments):
        config = {
            "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **arguments,
        }
        return ContrastivePOTrainer(
            str(clip_folder),
            args=ContrastivePOConfig(**config),
            train_dataset=make_preferences(13),
            candidate_texts=PROMPTS,
            callbacks=list(callbacks),
        )

    return make


def checkpoints(trainer):
    return sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


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
    with pytest.raises(ValueError, match=rf"checkpoint-6' has no {MARK}: it was cut off.*checkpoint-4"):
        make_trainer().train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    assert is_whole(folder / "checkpoint-6")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_a_left_over_half_is_not_kept_in_place_of_a_whole_one(make_trainer):
    trainer = make_trainer(save_total_limit=1)
    folder = Path(trainer.args.output_dir)
    (folder / "checkpoint-99").mkdir(parents=True)
    trainer.train()
    assert checkpoints(trainer) == ["checkpoint-6"]


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"no whole checkpoint.*start anew"):
        make_trainer().train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is not there"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    assert whole_checkpoint(None, str(tmp_path)) is None
    assert whole_checkpoint(False, str(tmp_path)) is None


@pytest.mark.parametrize("settings", [{}, {"max_steps": -1, "num_train_epochs": 2}])
def test_resuming_a_finished_run_changes_nothing(make_trainer, settings):
    trainer = make_trainer(save_steps=1, **settings)
    trainer.train()
    again = make_trainer(save_steps=1, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == trainer.state.global_step
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(clip_folder, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(folder):
        return subprocess.Popen([sys.executable, str(WORKER), str(clip_folder), str(folder)], env=environment)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(120) == 0
    rng = random.Random(0)
    for _ in range(3):
        process = start(killed)
        # From the first step on, which writes a checkpoint as every step does, at any moment.
        deadline = time.time() + 60
        before = set(killed.glob("checkpoint-*"))
        while set(killed.glob("checkpoint-*")) == before and process.poll() is None and time.time() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert last_whole_checkpoint(killed) is not None or len(list(killed.glob("checkpoint-*"))) <= 1
    assert start(killed).wait(120) == 0
    expected, found = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
