"""Nothing that is loaded runs a program."""

import json
import pickle
import shutil

import pytest
import samples
import torch
from harmful import Program
from peft import LoraConfig, get_peft_model
from samples import make_preferences
from transformers import AutoModel, CLIPModel

from clip_po.baselines.defense_prefix import Prefix
from clip_po.cli.main import main
from clip_po.config import ContrastivePOConfig
from clip_po.models import load_any, load_model, load_processor
from clip_po.trainer import ContrastivePOTrainer
from clip_po.training.averaging import AVERAGE_FILE, BetaMovingAverageCallback
from clip_po.training.checkpoints import MARK

RUN = {"train_dataset": make_preferences(8), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
LORA = LoraConfig(r=2, target_modules=r".*vision_model.*\.(q_proj|v_proj)")


def test_the_program_in_a_pickle_would_run(tmp_path):
    torch.save(Program(tmp_path / "ran"), tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


# ---- Models


@pytest.fixture
def pickled(clip_folder, marker, tmp_path):
    """The tiny CLIP with its weights as a pickle alone, which runs a program."""
    folder = shutil.copytree(clip_folder, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Program(marker)}, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def pickled_adapters(clip_folder, marker, tmp_path):
    folder = tmp_path / "adapters"
    get_peft_model(CLIPModel.from_pretrained(clip_folder), LORA).save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"lora": Program(marker)}, folder / "adapter_model.bin")
    return folder


def test_pickled_weights_are_refused_and_the_way_out_is_named(pickled, tmp_path):
    for load in (load_model, load_any):
        with pytest.raises(OSError, match=r"pickle alone \(pytorch_model\.bin\).*save_pretrained\(FOLDER\)"):
            load(str(pickled))
    with pytest.raises(OSError, match="pickle alone"):
        ContrastivePOTrainer(str(pickled), args=ContrastivePOConfig(str(tmp_path / "out"), report_to="none"))


def test_asking_for_the_pickle_is_refused(pickled, clip_folder):
    for folder in (pickled, clip_folder):
        with pytest.raises(ValueError, match="use_safetensors=False would read weights from a pickle"):
            load_model(str(folder), use_safetensors=False)


def test_what_the_message_says_converts(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "ours")
    torch.save(CLIPModel.from_pretrained(clip_folder).state_dict(), folder / "pytorch_model.bin")
    load_model(str(folder))  # with safetensors beside it a pickle is no obstacle, and is not read
    (folder / "model.safetensors").unlink()
    AutoModel.from_pretrained(str(folder)).save_pretrained(tmp_path / "converted")
    load_model(str(tmp_path / "converted"))


def test_pickled_adapters_are_refused(pickled_adapters, clip_folder):
    with pytest.raises(OSError, match=r"pickle alone \(adapter_model\.bin\).*PeftModel\.from_pretrained"):
        load_any(str(pickled_adapters))
    # Adapters in the folder of a whole model are put on it by transformers itself.
    for file in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / file, pickled_adapters)
    with pytest.raises(OSError, match=r"adapter_model\.bin"):
        load_model(str(pickled_adapters))


@pytest.mark.parametrize("which", ["model_name_or_path", "base_model_name_or_path"])
def test_clip_po_evaluate_refuses_pickles(which, pickled, clip_folder, parquet, capsys):
    names = {"model_name_or_path": str(clip_folder), which: str(pickled)}
    flags = [word for name, value in names.items() for word in (f"--{name}", value)]
    assert main(["evaluate", *flags, "--dataset_name", str(parquet)]) == 2
    assert "pickle alone (pytorch_model.bin)" in capsys.readouterr().err


def test_a_pickle_under_the_name_of_safetensors_is_not_read(clip_folder, marker, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "named")
    for file in (folder / "model.safetensors", tmp_path / "prefix.safetensors"):
        torch.save(Program(marker), file)
    with pytest.raises(ValueError, match="are not readable"):
        load_model(str(folder))
    with pytest.raises(ValueError, match="not a safetensors file"):
        Prefix.load(tmp_path / "prefix.safetensors")


@pytest.mark.parametrize("model_type", ["clip", "unknown"])
def test_no_code_of_a_model_runs_and_no_one_is_asked(model_type, clip_folder, marker, tmp_path, monkeypatch):
    folder = shutil.copytree(clip_folder, tmp_path / "coded")
    names = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer")
    classes = "".join(f"class {name}: ...\n" for name in names)
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\n{classes}")
    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / file).read_text())
        settings["auto_map"] = {name: f"code.{name}" for name in names}
        (folder / file).write_text(json.dumps(settings))
    if model_type != "clip":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    if model_type == "clip":
        load_processor(load_model(str(folder)), ContrastivePOConfig(str(tmp_path / "out"), report_to="none"))
    else:
        with pytest.raises(TypeError, match="is a 'unknown' model"):
            load_model(str(folder))


# ---- Checkpoints


def plant(folder, name, marker, how):
    if how == "torch.save":
        torch.save(Program(marker), folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Program(marker)))


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_program_in_a_checkpoints_state_does_not_run(name, how, make_trainer, whole_run, marker):
    folder = whole_run / "checkpoint-2"
    plant(folder, name, marker, how)
    with pytest.raises(ValueError) as error:
        make_trainer().train(resume_from_checkpoint=str(folder))
    assert name in str(error.value)
    assert "another checkpoint" in str(error.value)
    assert "weights_only=False" not in str(error.value)


@pytest.fixture(scope="module")
def finished(clip_folder, tmp_path_factory):
    """The output of a run with an average of its weights, made once."""
    folder = tmp_path_factory.mktemp("finished")
    samples.make_trainer(clip_folder, folder, **RUN, callbacks=[BetaMovingAverageCallback()]).train()
    return folder


@pytest.fixture
def whole_run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_training_args_of_another_program_are_never_read(make_trainer, whole_run, marker):
    for folder in (whole_run, whole_run / "checkpoint-2"):
        plant(folder, "training_args.bin", marker, "torch.save")
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint=str(whole_run / "checkpoint-2"))
    assert trainer.state.global_step == 4


def test_pickled_weights_of_a_checkpoint_are_refused(make_trainer, whole_run, marker):
    folder = whole_run / "checkpoint-2"
    (folder / "model.safetensors").unlink()
    plant(folder, "pytorch_model.bin", marker, "torch.save")
    with pytest.raises(OSError, match="pickle alone"):
        make_trainer().train(resume_from_checkpoint=str(folder))


def test_pickled_adapters_of_a_checkpoint_are_refused(make_trainer, tmp_path, marker):
    make_trainer(peft_config=LORA).train()
    folder = tmp_path / "run" / "checkpoint-2"
    (folder / "adapter_model.safetensors").unlink()
    plant(folder, "adapter_model.bin", marker, "torch.save")
    with pytest.raises(OSError, match="pickle alone"):
        make_trainer(peft_config=LORA).train(resume_from_checkpoint=str(folder))


def test_a_pickled_best_model_is_refused(make_trainer, whole_run, marker):
    folder = whole_run / "checkpoint-4"
    (folder / "model.safetensors").unlink()
    plant(folder, "pytorch_model.bin", marker, "torch.save")
    state = whole_run / "checkpoint-2" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "best_model_checkpoint": str(folder)}))
    with pytest.raises(OSError, match="pickle alone"):
        make_trainer().train(resume_from_checkpoint=str(whole_run / "checkpoint-2"))


def test_a_pickle_in_the_place_of_averaged_weights_is_refused(make_trainer, whole_run, marker):
    plant(whole_run / "checkpoint-2", AVERAGE_FILE, marker, "torch.save")
    with pytest.raises(ValueError, match=f"{AVERAGE_FILE} is not a safetensors file"):
        make_trainer(callbacks=[BetaMovingAverageCallback()]).train(
            resume_from_checkpoint=str(whole_run / "checkpoint-2")
        )


def test_what_a_run_writes_as_weights_is_safetensors(finished):
    assert (finished / "checkpoint-2" / MARK).exists()
    pickles = {file.name for file in finished.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}  # all read under weights_only
