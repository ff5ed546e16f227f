"""Nothing that is read runs a program or leaves its folder, and nothing that is written holds a token."""

import contextlib
import io
import json
import logging
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from samples import CLASSES, PROMPTS, make_labelled, make_preferences, picture
from transformers import CLIPModel, CLIPProcessor, TrainerCallback

from clip_po.averaging import AVERAGE_FILE, BetaMovingAverageCallback
from clip_po.checkpoints import MARK
from clip_po.cli import main
from clip_po.config import ContrastivePOConfig
from clip_po.data.loading import load_split
from clip_po.data.paths import check_links
from clip_po.data.vl_bias import load_vl_bias
from clip_po.evaluation.layouts import load_annotation, load_file_names
from clip_po.models import load_any, load_model, load_processor
from clip_po.rivals.defense_prefix import Prefix
from clip_po.trainer import ContrastivePOTrainer

LORA = LoraConfig(r=2, target_modules=r".*vision_model.*\.(q_proj|v_proj)")


class Program:
    """What a pickle does that was made to do harm: it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """A file that is there at the end only where a program ran."""
    file = tmp_path / "a program ran"
    yield file
    assert not file.exists()


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
    CLIPModel.from_pretrained(str(folder)).save_pretrained(tmp_path / "converted")
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
    with pytest.raises(ValueError, match="can't be read"):
        load_model(str(folder))
    with pytest.raises(ValueError, match="no safetensors file"):
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


@pytest.fixture
def make_trainer(clip_folder, tmp_path):
    def make(max_steps=4, callbacks=None, **arguments):
        args = ContrastivePOConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=max_steps,
            save_steps=2,
            per_device_train_batch_size=4,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        rows = make_preferences(8)
        model = str(clip_folder)
        return ContrastivePOTrainer(
            model, args=args, train_dataset=rows, candidate_texts=PROMPTS, callbacks=callbacks, **arguments
        )

    return make


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
    args = ContrastivePOConfig(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    callbacks = [BetaMovingAverageCallback()]
    ContrastivePOTrainer(
        str(clip_folder), args=args, train_dataset=make_preferences(8), candidate_texts=PROMPTS, callbacks=callbacks
    ).train()
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
    trainer = make_trainer()
    folder = whole_run / "checkpoint-4"
    (folder / "model.safetensors").unlink()
    plant(folder, "pytorch_model.bin", marker, "torch.save")
    trainer.state.best_model_checkpoint = str(folder)
    with pytest.raises(OSError, match="pickle alone"):
        trainer._load_best_model()


def test_a_pickle_in_the_place_of_averaged_weights_is_refused(make_trainer, whole_run, marker):
    plant(whole_run / "checkpoint-2", AVERAGE_FILE, marker, "torch.save")
    with pytest.raises(ValueError, match=f"{AVERAGE_FILE} is no safetensors file"):
        make_trainer(callbacks=[BetaMovingAverageCallback()]).train(
            resume_from_checkpoint=str(whole_run / "checkpoint-2")
        )


def test_what_a_run_writes_as_weights_is_safetensors(finished):
    assert (finished / "checkpoint-2" / MARK).exists()
    pickles = {file.name for file in finished.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}  # all read under weights_only


# ---- Data sets


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    for split, rows in (("train", 12), ("validation", 4), ("test", 8)):
        make_labelled(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def secret(tmp_path):
    """A picture outside of any data set."""
    return save(tmp_path / "private" / "secret.png")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of images with one class each."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(cache / "extracted"))
    for name in CLASSES:
        save(tmp_path / "data" / "train" / name / "1.png")
    return tmp_path / "data"


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(0).save(path)
    return path


def png():
    buffer = io.BytesIO()
    picture(0).save(buffer, "png")
    return buffer.getvalue()


def test_a_folder_without_tricks_loads(data):
    assert len(load_split(str(data), "train")) == len(CLASSES)
    os.symlink(data / "train" / "cat" / "1.png", data / "train" / "dog" / "2.png")
    assert len(load_split(str(data), "train")) == len(CLASSES) + 1


def test_the_script_of_a_data_set_does_not_run(data, marker):
    (data / "data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for name in (data, data / "data.py"):
        with pytest.raises(ValueError, match="scripts are no longer supported"):
            load_split(str(name), "train")


@pytest.mark.parametrize("below", ["train/cat/2.png", "train/fish"])
def test_a_link_out_of_a_folder_of_images_is_refused(data, secret, below):
    os.symlink(secret if below.endswith("png") else secret.parent, data / below)
    with pytest.raises(ValueError, match=rf"{below} is a link to .*private.*outside"):
        load_split(str(data), "train")


@pytest.mark.parametrize(
    "load", [load_file_names, load_annotation, lambda folder: load_vl_bias(folder, "occupations")]
)
def test_a_link_out_of_photographs_is_refused(load, tmp_path, secret):
    folder = tmp_path / "photographs"
    (folder / "occu" / "nurse").mkdir(parents=True)
    os.symlink(secret, folder / "occu" / "nurse" / "label=dog_text=cat.png")
    (folder / "annotations.json").write_text("{}")
    with pytest.raises(ValueError, match="is a link to"):
        load(folder)


def test_links_of_the_hubs_cache_and_to_the_folder_itself_are_taken(tmp_path):
    snapshot = tmp_path / "datasets--me--mine" / "snapshots" / "0123"
    blob = save(tmp_path / "datasets--me--mine" / "blobs" / "beef.png")
    snapshot.mkdir(parents=True)
    os.symlink(blob, snapshot / "label=dog_text=cat.png")
    os.symlink(snapshot, tmp_path / "link")
    check_links(snapshot)
    assert len(load_file_names(snapshot)) == 1
    os.symlink(tmp_path, snapshot / "up")
    with pytest.raises(ValueError, match="outside"):
        check_links(snapshot)


@pytest.mark.parametrize("key", ["data_files", "data_dir"])
@pytest.mark.parametrize("where", ["../private", "absolute"])
def test_a_readme_that_names_files_elsewhere_is_refused(key, where, data, secret):
    named = where if where != "absolute" else str(secret.parent)
    settings = {"config_name": "default", key: f"{named}/*.png" if key == "data_files" else named}
    (data / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [settings]})}---\n")
    with pytest.raises(ValueError, match=r"names the file .*secret\.png.*outside"):
        load_split(str(data), "train")


@pytest.mark.parametrize("named", ["absolute", "../private/secret.png", "https://example.com/x.png", "/etc/passwd"])
@pytest.mark.parametrize("storage", ["parquet", "disk"])
def test_a_table_that_names_images_elsewhere_is_refused(named, storage, secret, tmp_path, data):
    path = str(secret) if named == "absolute" else named
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    images = [{"bytes": png(), "path": "1.png"}, {"bytes": None, "path": path}]
    rows = [{"image": image, "label": label} for label, image in enumerate(images)]
    table = datasets.Dataset.from_list(rows, features=features)
    folder = tmp_path / "table"
    # Their own writers would put the picture in.
    if storage == "parquet":
        folder.mkdir()
        pq.write_table(table.data.table, folder / "train-00000-of-00001.parquet")
    else:
        table.take(1).save_to_disk(folder)
        written = folder / json.loads((folder / "state.json").read_text())["_data_files"][0]["filename"]
        with datasets.arrow_writer.ArrowWriter(features=features, path=str(written)) as writer:
            writer.write_table(table.data.table)
            writer.finalize()
    with pytest.raises(ValueError, match=r"names the file .*outside"):
        load_split(str(folder), "train")


def test_a_saved_data_set_whose_rows_lie_elsewhere_is_refused(tmp_path):
    make_labelled(4).save_to_disk(tmp_path / "private")
    shutil.copytree(tmp_path / "private", tmp_path / "data")
    state = json.loads((tmp_path / "data" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../private/" + state["_data_files"][0]["filename"]
    (tmp_path / "data" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"names the file .*private.*outside"):
        load_split(str(tmp_path / "data"), "train")


def outside(folder, cache):
    """What lies in a folder, but for the cache of unpacked archives."""
    return {path for path in folder.rglob("*") if not path.is_relative_to(cache)}


def test_a_zip_of_images_is_unpacked_nowhere_else(tmp_path, data, secret):
    folder = tmp_path / "zipped"
    folder.mkdir()
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        archive.writestr("metadata.csv", "file_name,word\n1.png,cat\n")
        for name in ("1.png", "../../../../../evil.png", str(tmp_path / "evil.png")):
            archive.writestr(name, png())
        archive.writestr(link, str(secret))
    before = outside(tmp_path, tmp_path / "cache")
    with contextlib.suppress(ValueError):
        load_split(str(folder), "train")
    assert outside(tmp_path, tmp_path / "cache") == before
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


def test_a_tar_of_images_is_unpacked_nowhere_else(tmp_path, data, secret):
    folder = tmp_path / "tarred"
    folder.mkdir()
    with tarfile.open(folder / "train.tar", "w") as archive:
        for name in ("a.png", "../evil.png", str(tmp_path / "evil.png")):
            member = tarfile.TarInfo(name)
            member.size = len(png())
            archive.addfile(member, io.BytesIO(png()))
        link = tarfile.TarInfo("z.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
    before = outside(tmp_path, tmp_path / "cache")
    rows = load_split(str(folder), "train")
    assert outside(tmp_path, tmp_path / "cache") == before
    assert [column for column in rows.column_names if not column.startswith("__")] == ["png"]


# ---- Tokens


class Tracker(TrainerCallback):
    """Writes the arguments as trackers get them, and as a log would show them."""

    def on_train_begin(self, args, state, control, **kwargs):
        Path(args.output_dir, "tracker.txt").write_text("\n".join([args.to_json_string(), str(args), repr(args)]))


@pytest.fixture
def token(monkeypatch, caplog, tmp_path):
    """A token, set in the environment; every log is kept."""
    token = "hf_" + "Zq7" * 12
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"):
        monkeypatch.setenv(name, token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    caplog.set_level(logging.DEBUG)
    return token


def holding(token, folder):
    """Files with the token anywhere in them, in names too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [path for path in files if token.encode() in path.read_bytes() or token in str(path)]


def test_a_training_writes_its_token_nowhere(token, clip_folder, tmp_path, caplog, capfd):
    logging.getLogger("transformers").propagate = True
    args = ContrastivePOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        log_level="debug",
        use_cpu=True,
        hub_token=token,
        hub_model_id="me/mine",
        model_init_kwargs={"token": token, "revision": None},
        embeddings_cache=str(tmp_path / "run" / "embeddings"),
    )
    trainer = ContrastivePOTrainer(
        str(clip_folder),
        args=args,
        train_dataset=make_preferences(8),
        eval_dataset=make_preferences(5),
        candidate_texts=PROMPTS,
        callbacks=[BetaMovingAverageCallback(), Tracker()],
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    trainer.save_state()
    assert (tmp_path / "run" / "tracker.txt").exists()
    assert json.loads((tmp_path / "run" / "training_args.json").read_text())["hub_token"] == "<redacted>"
    assert not holding(token, tmp_path)
    assert token not in caplog.text
    said = capfd.readouterr()
    assert token not in said.out + said.err


def test_commands_write_their_token_nowhere(token, clip_folder, parquet, tmp_path, caplog, capfd):
    quick = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    training = {**quick, "hub_token": token, "model_init_kwargs": {"token": token}}
    recipe = tmp_path / "recipes" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": str(clip_folder),
                "dataset_name": str(parquet),
                "dataset_validation_split": "validation",
                "output_dir": str(tmp_path / "written" / "compared"),
                "training": training,
                "methods": {"CE": {"loss_type": "sft"}},
            }
        )
    )
    assert main(["compare", "--config", str(recipe)]) == 0
    aligned, data = str(tmp_path / "written" / "trained"), ["--dataset_name", str(parquet)]
    flags = ["--max_steps", "2", "--use_cpu", "true", "--report_to", "none", "--eval_strategy", "no"]
    given = ["--hub_token", token, "--model_init_kwargs", json.dumps({"token": token})]
    start = ["--model_name_or_path", str(clip_folder)]
    assert main(["train", *start, *data, "--output_dir", aligned, *flags, *given]) == 0
    base = ["--base_model_name_or_path", str(clip_folder)]
    assert main(["evaluate", "--model_name_or_path", aligned, *base, *data]) == 0
    assert not holding(token, tmp_path / "written")
    # A wrong flag is repeated in the message, with what stands beside it.
    assert main(["train", *data, "--output_dir", aligned, "--hub_tokem", token]) == 2
    said = capfd.readouterr()
    assert token not in said.out + said.err + caplog.text


@pytest.mark.parametrize(
    "kept", ["hf_" + "a1" * 12, "hf_oauth_eyJhbGci-OiJFZ_ERTQ.eyJ-zY29.c2lnbg", "api_org_" + "b2" * 12]
)
def test_tokens_of_every_kind_are_taken_out_of_any_text(kept):
    said = str(ContrastivePOConfig("out", report_to="none", run_name=f"by {kept}.", hub_token=kept))
    assert "by <redacted>." in said
    assert kept[-6:] not in said


def test_processor_and_adapters_keep_no_token(token, clip_folder, tmp_path):
    processor = CLIPProcessor.from_pretrained(clip_folder, token=token)
    processor.save_pretrained(tmp_path / "saved")
    adapted = get_peft_model(CLIPModel.from_pretrained(clip_folder, token=token), LORA)
    adapted.save_pretrained(tmp_path / "saved")
    PeftModel.from_pretrained(CLIPModel.from_pretrained(clip_folder), tmp_path / "saved", token=token).save_pretrained(
        tmp_path / "again"
    )
    assert not holding(token, tmp_path)
