"""Nothing that is written holds a token."""

import json
import logging
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from samples import PROMPTS, make_preferences
from transformers import CLIPModel, CLIPProcessor, TrainerCallback

from clip_po.cli.main import main
from clip_po.config import ContrastivePOConfig
from clip_po.trainer import ContrastivePOTrainer
from clip_po.training.averaging import BetaMovingAverageCallback

PUBLISHED = {"README.md", "training_args.json", "report.json", "report.html", "table.md"}
LORA = LoraConfig(r=2, target_modules=r".*vision_model.*\.(q_proj|v_proj)")


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
    published = [f for f in (tmp_path / "written").rglob("*") if f.name in PUBLISHED]
    assert {file.name for file in published} == PUBLISHED
    assert not [file for file in published if str(tmp_path.parent) in file.read_text()]  # nor a folder of this machine
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
