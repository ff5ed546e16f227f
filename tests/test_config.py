"""The configuration: the paper's presets, what it refuses, and the ways to set it."""

import copy
import dataclasses

import pytest
from transformers.training_args import OptimizerNames
from trl import TrlParser

from clip_po.config import ContrastivePOConfig, preset
from clip_po.loss_arguments import LossArguments
from clip_po.losses import LOSSES


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def make(folder, **arguments):
    return ContrastivePOConfig(str(folder), **arguments)


WRONG = {
    "unknown-loss": ({"loss_type": "dpo"}, "loss_type must name", "['dpo']", "DPO is 'sigmoid'"),
    "one-unknown-loss": ({"loss_type": ["sigmoid", "ktopair"]}, "loss_type must name", "KTO on pairs 'kto_pair'"),
    "no-loss": (
        {"loss_type": []},
        f"loss_type must name one or more of {sorted(LOSSES)}",
    ),
    "too-few-weights": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
        "loss_weights must hold one weight for each of the 2 loss types",
        "[1.0]",
    ),
    "weights-for-one-loss": ({"loss_weights": [1.0, 2.0]}, "loss_weights must hold one weight", "['sigmoid']"),
    "beta-zero": ({"beta": 0.0}, "beta must be a finite number > 0, got 0.0", "reference_free=True"),
    "beta-negative": ({"beta": -1.0}, "beta must be a finite number > 0, got -1.0", "loss_type='sft'"),
    "beta-nan": ({"beta": float("nan")}, "beta must be a finite number > 0, got nan"),
    "beta-infinite": ({"beta": float("inf")}, "beta must be a finite number > 0, got inf"),
    "smoothing-half": ({"label_smoothing": 0.5}, "label_smoothing must lie in [0, 0.5), got 0.5"),
    "smoothing-negative": ({"label_smoothing": -0.1}, "label_smoothing must lie in [0, 0.5), got -0.1"),
    "lambda-negative": ({"reg_weight": -1.0}, "reg_weight must be a finite number >= 0, got -1.0"),
    "lambda-infinite": ({"reg_weight": float("inf")}, "reg_weight must be a finite number >= 0, got inf"),
    "desirable": ({"desirable_weight": -1.0}, "desirable_weight must be a finite number >= 0, got -1.0"),
    "undesirable": ({"undesirable_weight": float("nan")}, "undesirable_weight must be a finite number >= 0, got nan"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_argument_is_named_with_what_it_may_be(case, tmp_path):
    arguments, *parts = case
    with pytest.raises(ValueError) as error:
        make(tmp_path, **arguments)
    assert [part for part in parts if part not in str(error.value)] == []


def test_unknown_optimizer_is_refused_by_transformers(tmp_path):
    with pytest.raises(ValueError, match="adammax"):
        make(tmp_path, optim="adammax")


@pytest.mark.parametrize(
    ("name", "loss_type", "beta", "reg_weight"),
    [("dpo", "sigmoid", 1.0, 1.0), ("ipo", "ipo", 0.01, 0.01), ("kto", "kto_pair", 1.5, 0.01)],
)
def test_presets_are_the_papers_settings(name, loss_type, beta, reg_weight, tmp_path):
    config = ContrastivePOConfig.from_preset(name, output_dir=str(tmp_path))
    assert (config.loss_type, config.beta, config.reg_weight) == ([loss_type], beta, reg_weight)
    assert (config.optim, config.learning_rate, config.lr_scheduler_type) == ("adamax", 2e-5, "cosine")
    assert (config.num_train_epochs, config.per_device_train_batch_size) == (3, 512)


def test_overrides_win_over_the_preset(tmp_path):
    overrides = {"beta": 0.3, "optim": "sgd", "num_train_epochs": 1, "per_device_train_batch_size": 5}
    config = ContrastivePOConfig.from_preset("dpo", output_dir=str(tmp_path), **overrides)
    assert {name: getattr(config, name) for name in overrides} == overrides
    assert config.reg_weight == 1.0


@pytest.mark.parametrize(
    ("processes", "accumulated", "share"), [("1", 1, 512), ("4", 1, 128), ("4", 8, 16), ("2", 3, 85), ("1024", 1, 1)]
)
def test_processes_and_accumulation_share_the_papers_batch(processes, accumulated, share, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    # A launched process would wait for the others.
    monkeypatch.setattr(ContrastivePOConfig, "__post_init__", lambda self: None)
    config = ContrastivePOConfig.from_preset("dpo", output_dir=str(tmp_path), gradient_accumulation_steps=accumulated)
    assert config.per_device_train_batch_size == share


@pytest.mark.parametrize("accumulated", [0, -1, 1.5, "two"])
def test_a_batch_size_that_can_not_be_shared_is_refused_by_the_name_of_the_argument(accumulated, tmp_path):
    with pytest.raises((ValueError, TypeError), match="gradient_accumulation_steps"):
        ContrastivePOConfig.from_preset("dpo", output_dir=str(tmp_path), gradient_accumulation_steps=accumulated)


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_what_is_changed_in_a_config_or_settings_does_not_change_the_preset(name, tmp_path):
    before = copy.deepcopy(preset(name))
    ContrastivePOConfig.from_preset(name, output_dir=str(tmp_path)).loss_type.append("sft")
    preset(name)["loss_type"].append("sft")
    assert preset(name) == before


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset must be one of \['dpo', 'ipo', 'kto'\], got 'ppo'"):
        ContrastivePOConfig.from_preset("ppo")


def test_a_preset_is_a_copy():
    preset("dpo")["beta"] = 7
    assert preset("dpo")["beta"] == 1.0


def test_one_loss_may_be_given_by_its_name(tmp_path):
    assert make(tmp_path, loss_type="ipo").loss_type == ["ipo"]


@pytest.mark.parametrize(("given", "used"), [(None, [1.0, 1.0]), ([0.5, 2.0], [0.5, 2.0])])
def test_losses_weigh_1_unless_told_otherwise(given, used, tmp_path):
    assert make(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=given).weights == used


def test_adamax_survives_saving_and_loading(tmp_path):
    config = make(tmp_path, optim="adamax")
    again = ContrastivePOConfig(**{name: config.to_dict()[name] for name in ("output_dir", "optim", "beta")})
    assert config.optim == again.optim == dataclasses.replace(config).optim == "adamax"
    assert make(tmp_path).optim == OptimizerNames.ADAMW_TORCH


def test_parser_takes_adamax_and_several_losses(tmp_path):
    line = f"--output_dir {tmp_path} --optim adamax --loss_type sigmoid sft --loss_weights 1 0.5 --beta 2"
    (config,) = TrlParser(ContrastivePOConfig).parse_args_and_config(line.split())
    assert (config.optim, config.loss_type, config.weights, config.beta) == ("adamax", ["sigmoid", "sft"], [1, 0.5], 2)


def test_parser_takes_json_for_the_models_arguments(tmp_path):
    line = ["--output_dir", str(tmp_path), "--model_init_kwargs", '{"attn_implementation": "eager"}']
    (config,) = TrlParser(ContrastivePOConfig).parse_args_and_config(line)
    assert config.model_init_kwargs == {"attn_implementation": "eager"}


def test_parser_reads_a_recipe_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\nloss_type: [ipo]\noptim: adamax\nbeta: 0.01\nlearning_rate: 1.0e-3\n")
    (config,) = TrlParser(ContrastivePOConfig).parse_args_and_config(["--config", str(recipe), "--beta", "0.5"])
    assert (config.loss_type, config.optim, config.beta, config.learning_rate) == (["ipo"], "adamax", 0.5, 1e-3)


@pytest.mark.parametrize("part", [ContrastivePOConfig, LossArguments])
def test_every_own_argument_is_documented_twice(part):
    own = {f.name for f in dataclasses.fields(ContrastivePOConfig)} & set(part.__annotations__)
    fields = {f.name: f for f in dataclasses.fields(ContrastivePOConfig)}
    shared = {"optim", "learning_rate", "logging_steps"}
    assert {name for name in own if not fields[name].metadata.get("help")} == set()
    assert {name for name in own - shared if f"        {name} (`" not in part.__doc__} == set()
