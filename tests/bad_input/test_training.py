"""Training that goes wrong stops with a reason, before its weights are spoiled, and loses no whole checkpoint."""

import errno
import math
import shutil
from pathlib import Path

import pytest
import torch
from bad_input.table import NAN, Bench, case, check
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from samples import same, tiny_config, weights
from transformers import CLIPModel, TrainerCallback

import clip_po.trainer
from clip_po.data import embedding_cache
from clip_po.data.embedding_cache import EmbeddingCache
from clip_po.metrics import RunningMeans
from clip_po.training import averaging
from clip_po.training.averaging import BetaMovingAverageCallback
from clip_po.training.checkpoints import MARK, SavingError, last_whole_checkpoint
from clip_po.training.nan_guard import NanGuardCallback

VISION = r".*vision_model.*\.(q_proj|v_proj)"
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


class Spoils(TrainerCallback):
    """Puts nan or infinity into what the next step computes with."""

    def __init__(self, spoil, step):
        self.spoil, self.step = spoil, step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            self.spoil(model)


def spoil_next_step(trainer, part, value, monkeypatch, step=3):
    """Let a part of the loss, or a gradient, of one step be a number that is not finite."""
    owner, name = {
        "preference": (clip_po.trainer, "preference_loss"),
        "regularization": (clip_po.trainer, "regularization_loss"),
        "gradient": (trainer, "training_step"),
    }[part]
    compute = getattr(owner, name)

    def spoiled(*args, **kwargs):
        found = compute(*args, **kwargs)
        if trainer.state.global_step != step - 1:
            return found
        if part == "gradient":
            trainer.model.visual_projection.weight.grad[0, 0] = value
            return found
        return found * value

    monkeypatch.setattr(owner, name, spoiled)


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("preference", NAN, ("the loss is nan", "loss/preference")),
        ("regularization", NAN, ("the loss is nan", "loss/regularization")),
        ("preference", math.inf, ("the loss is", "loss/preference")),
        ("gradient", NAN, ("the norm of the gradients is nan", "Every part of the loss is finite")),
        ("gradient", math.inf, ("the norm of the gradients is inf", "Every part of the loss is finite")),
    ],
    ids=["loss-nan", "kl-nan", "loss-infinite", "gradient-nan", "gradient-infinite"],
)
def test_training_stops_before_the_step_is_taken(part, value, says, bench, monkeypatch):
    trainer = bench.trainer(**{**SAVING, "save_steps": 2})
    spoil_next_step(trainer, part, value, monkeypatch)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message = str(error.value)
    wanted = [*says, "stopped at step 3", "those of step 2", "Lower learning_rate (now 2e-05)", "checkpoint-2"]
    assert [piece for piece in wanted if piece not in message] == [], message
    last = last_whole_checkpoint(trainer.args.output_dir)
    assert last == str(bench.folder / "run" / "checkpoint-2")
    assert same(load_file(Path(last, "model.safetensors")), weights(trainer.model))
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


def test_trainers_filter_hides_no_loss_from_it(bench, monkeypatch):
    trainer = bench.trainer(logging_nan_inf_filter=True)
    spoil_next_step(trainer, "preference", NAN, monkeypatch)
    with pytest.raises(
        FloatingPointError, match=r"step 3: the loss is nan and the norm of the gradients is nan.*loss/preference"
    ):
        trainer.train()


def test_weights_that_are_spoiled_already_are_named(bench):
    def spoil(model):
        model.visual_projection.weight.data.fill_(NAN)

    trainer = bench.trainer(callbacks=[Spoils(spoil, 2)])
    with pytest.raises(FloatingPointError, match=r"step 2: .*weights already hold nan.*'visual_projection.weight'"):
        trainer.train()


def test_a_norm_that_overflows_stops_training_although_clipping_makes_every_gradient_zero(bench):
    trainer = bench.trainer(beta=1e26)
    with pytest.raises(FloatingPointError, match=r"step 1: .*norm of the gradients is inf"):
        trainer.train()


class Scaler:
    """What accelerate's scaler for float16 answers."""

    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


def test_an_overflow_of_float16_is_left_to_its_scaler_until_there_is_nothing_left_to_scale(bench):
    trainer = bench.trainer()
    guard = NanGuardCallback(trainer)

    def step(loss):
        trainer.training_means = RunningMeans()
        trainer.training_means.add({"loss/preference": (torch.tensor([loss]), torch.ones(1))})
        guard.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, model=trainer.model)

    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf) if parameter.requires_grad else None
    trainer.accelerator.scaler = Scaler(65_536.0)
    step(1.0)
    with pytest.raises(FloatingPointError, match="the loss is nan"):  # no scale helps against that
        step(NAN)
    trainer.accelerator.scaler = Scaler(1.0)
    with pytest.raises(FloatingPointError, match="norm of the gradients is inf"):
        step(1.0)


# ---- Disks


def full_disk(file):
    """A file on which every write ends with the system's own "No space left on device"."""
    Path(file).unlink(missing_ok=True)
    Path(file).symlink_to("/dev/full")


def no_space(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def fills_up(trainer, what, monkeypatch):
    """Let the disk be full from the second checkpoint on, when `what` is written."""
    late = ("optimizer.pt", "rng_state.pth", "trainer_state.json")
    if what in late:
        save = trainer._save_optimizer_and_scheduler

        def save_on_a_full_disk(folder):
            if trainer.state.global_step == 2:
                full_disk(Path(folder, what))
            save(folder)

        monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", save_on_a_full_disk)
        return
    owner = {"model.safetensors": trainer.model, "moving_average.safetensors": averaging}[what]
    name = "save_pretrained" if owner is trainer.model else "save_file"
    write = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (no_space if trainer.state.global_step == 2 else write)(*a, **k))


@pytest.mark.parametrize(
    "what",
    ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "moving_average.safetensors"],
)
def test_a_full_disk_stops_training_with_a_reason_and_spares_the_checkpoint_before(what, bench, monkeypatch):
    trainer = bench.trainer(**SAVING, save_total_limit=1, callbacks=[BetaMovingAverageCallback()])
    fills_up(trainer, what, monkeypatch)
    with pytest.raises(SavingError) as error:
        trainer.train()
    message = str(error.value)
    first = str(bench.folder / "run" / "checkpoint-1")
    wanted = ["checkpoint-2", "Saving", "failed", "MiB free", first, "resume_from_checkpoint=True"]
    assert [piece for piece in wanted if piece not in message] == [], message
    assert isinstance(error.value, OSError)
    assert last_whole_checkpoint(trainer.args.output_dir) == first
    if what == "optimizer.pt":
        monkeypatch.undo()
        resumed = bench.trainer(**SAVING, save_total_limit=1, callbacks=[BetaMovingAverageCallback()])
        resumed.train(resume_from_checkpoint=True)
        assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_full_disk_at_the_end_says_so_too(bench, monkeypatch):
    trainer = bench.trainer()
    monkeypatch.setattr(trainer.model, "save_pretrained", no_space)
    with pytest.raises(SavingError, match=r"No space left on device.*no whole checkpoint"):
        trainer.save_model(str(bench.folder / "out"))


def test_an_error_that_is_not_the_disks_stays_as_it_is(bench, monkeypatch):
    trainer = bench.trainer()

    def fails(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trainer.model, "save_pretrained", fails)
    with pytest.raises(RuntimeError, match=r"^CUDA error"):
        trainer.save_model()


def test_a_cache_that_cannot_be_written_costs_no_embeddings(bench, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embedding_cache, "save_file", full)
    trainer = bench.trainer(embeddings_cache=str(bench.folder / "cache"), precompute_ref_log_probs=True)
    trainer.train()
    assert trainer.state.global_step == 4
    assert "could not be saved in" in caplog.text
    assert EmbeddingCache(bench.folder / "cache").get("any", 4) is None


def file(bench):
    path = bench.folder / "file"
    path.write_text("")
    return path


# ---- Checkpoints of something else


@pytest.fixture(scope="module")
def finished(tmp_path_factory, clip_folder, processor):
    """A run with its checkpoints, and one of adapters."""
    bench = Bench(tmp_path_factory.mktemp("finished"), clip_folder, None, processor)
    bench.trainer(**SAVING).train()
    adapters = LoraConfig(r=2, target_modules=VISION)
    settings = {**SAVING, "max_steps": 1, "output_dir": str(bench.folder / "adapters")}
    bench.trainer(**settings, peft_config=adapters).train()
    return bench.folder


def resumed(bench, change, finished="run", **arguments):
    """Resume from a copy of a whole checkpoint with something changed."""
    folder = bench.folder / "checkpoint-1"
    shutil.copytree(bench.finished / finished / "checkpoint-1", folder)
    change(folder)
    bench.trainer(**{**SAVING, **arguments}).train(resume_from_checkpoint=str(folder))


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:500])


def untouched(folder):
    pass


def foreign(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / MARK).touch()
    (folder / "model.ckpt").write_bytes(b"of another program")


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


CHECKPOINTS = {
    "no-mark": case(lambda b: resumed(b, without(MARK)), ValueError, f"has no {MARK}", "cut off"),
    "of-another-program": case(
        lambda b: resumed(b, foreign), ValueError, "no readable trainer_state.json", "start a new run"
    ),
    "state-is-broken": case(
        lambda b: resumed(b, lambda f: (f / "trainer_state.json").write_text("{")), ValueError, "trainer_state.json"
    ),
    "no-optimizer": case(
        lambda b: resumed(b, without("optimizer.pt")), ValueError, "has no optimizer.pt", "save_only_model"
    ),
    "no-scheduler": case(lambda b: resumed(b, without("scheduler.pt")), ValueError, "has no scheduler.pt"),
    "no-random-state": case(lambda b: resumed(b, without("rng_state.pth")), ValueError, "has no rng_state.pth"),
    "optimizer-is-cut": case(lambda b: resumed(b, cut("optimizer.pt")), ValueError, "optimizer.pt' is damaged"),
    "weights-are-cut": case(
        lambda b: resumed(b, cut("model.safetensors")), ValueError, "model.safetensors' is damaged", "earlier"
    ),
    "weights-are-pickled": case(lambda b: resumed(b, pickled), OSError, "as a pickle alone", "safetensors only"),
    "weights-of-another-size": case(
        lambda b: resumed(b, lambda f: CLIPModel(tiny_config(vision={"hidden_size": 64})).save_pretrained(f)),
        ValueError,
        "is of another model",
        "class_embedding is [64] in the file and [32] here",
        "another output_dir",
    ),
    "weights-of-other-names": case(
        lambda b: resumed(b, lambda f: save_file({"x": torch.zeros(1)}, f / "model.safetensors")),
        ValueError,
        "is of another model",
        "absent in the file",
    ),
    "adapters-for-a-model": case(
        lambda b: resumed(b, untouched, "adapters"), ValueError, "no model.safetensors", "adapter_model.safetensors"
    ),
    "model-for-adapters": case(
        lambda b: resumed(b, untouched, peft_config=LoraConfig(r=2, target_modules=VISION)),
        ValueError,
        "no adapter_model.safetensors",
        "arguments of the run",
    ),
    "adapters-of-another-rank": case(
        lambda b: resumed(b, untouched, "adapters", peft_config=LoraConfig(r=4, target_modules=VISION)),
        ValueError,
        "is of another model",
        "is [2, 32] in the file and [4, 32] here",
    ),
    "other-parts-train": case(
        lambda b: resumed(b, untouched, train_text_model=True), ValueError, "optimizer's state", "train_text_model"
    ),
    "another-optimizer": case(
        lambda b: resumed(b, untouched, optim="sgd"), ValueError, "another optimizer than optim='sgd'", "momentum"
    ),
    "output-is-a-file": case(
        lambda b: b.trainer(output_dir=str(file(b))), OSError, "output_dir", "can't be written to", "Nothing has"
    ),
    "output-is-below-a-file": case(
        lambda b: b.trainer(output_dir=str(file(b) / "run")), OSError, "file/run' can't be written", "another folder"
    ),
    "output-is-the-systems": case(
        lambda b: b.trainer(output_dir="/proc/sys/run"), OSError, "'/proc/sys/run' can't be", "permissions"
    ),
    "cache-is-a-file": case(
        lambda b: b.trainer(embeddings_cache=str(file(b)), precompute_ref_log_probs=True).train(),
        OSError,
        "embeddings_cache",
        "can't be written to",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_or_folder_that_cannot_be_used_is_refused(name, bench, finished):
    object.__setattr__(bench, "finished", finished)
    check(CHECKPOINTS[name], bench)


def test_a_checkpoint_of_the_same_run_is_taken(bench, finished):
    object.__setattr__(bench, "finished", finished)
    resumed(bench, untouched)
    last = "run/checkpoint-3/model.safetensors"
    assert same(load_file(finished / last), load_file(bench.folder / last))


# ---- Ctrl-C


class Interrupts(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("while_saving", [False, True], ids=["in-a-step", "while-saving"])
def test_an_interrupted_run_keeps_its_last_whole_checkpoint(while_saving, bench, finished, monkeypatch):
    trainer = bench.trainer(**SAVING, save_total_limit=1, callbacks=[] if while_saving else [Interrupts(1)])
    if while_saving:
        save = trainer._save_rng_state

        def interrupted(folder):
            if trainer.state.global_step == 2:
                raise KeyboardInterrupt
            save(folder)

        monkeypatch.setattr(trainer, "_save_rng_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_whole_checkpoint(trainer.args.output_dir) == str(bench.folder / "run" / "checkpoint-1")
    again = bench.trainer(**SAVING, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert same(load_file(finished / "run/checkpoint-3/model.safetensors"), weights(again.model))
