"""Unknown flags, near misses, repeated flags and values that can't be parsed: errors of one line."""

import subprocess
import sys

import pytest
import yaml

from clip_po.cli.flags import joined, similar_names, without_config
from clip_po.cli.main import COMMANDS, main


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr", "--learning_rate"),
        ("--learning_rat", "--learning_rate"),
        ("--leanring-rate", "--learning_rate"),
        ("--epochs", "--num_train_epochs"),
        ("--batch_size", "--per_device_train_batch_size"),
        ("--model", "--model_name_or_path"),
        ("--dataset", "--dataset_name"),
        ("--weight", "--reg_weight"),
        ("--max_clean_costs", "--max_clean_cost"),
        ("--overwrite", "--overwrite_output_dir"),
    ],
)
def test_an_unknown_flag_suggests_the_near_miss(flag, meant, capsys):
    assert main(["train", "--dataset_name", "photos", flag, "3"]) == 2
    said = capsys.readouterr().err
    assert f"unknown flag {flag}. Did you mean" in said
    assert meant in said
    assert "HfArgumentParser" not in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--zzz", "1"], "unknown flag --zzz. clip-po"),
        (["--zzz=1"], "unknown flag --zzz. "),
        (["photos"], "'photos' is not the value of a flag"),
    ],
)
def test_every_command_names_what_it_does_not_know(command, words, said, tmp_path, capsys):
    if command == "compare":
        (tmp_path / "recipe.yaml").write_text("methods: {DPO: {}}")
        words = [*words, "--config", str(tmp_path / "recipe.yaml")]
    assert main([command, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "HfArgumentParser" not in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--beta", "much"], "--beta"),
        (["--beta"], "--beta"),
        (["--labels", "mine"], "--labels"),
        (["--attack_count", "one", "two"], "--attack_count"),
    ],
)
def test_a_value_that_cannot_be_parsed_is_one_line_without_the_usage(words, said, capsys):
    assert main(["train", "--dataset_name", "photos", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("key", "meant"), [("learning-rate", "learning_rate"), ("epochs", "num_train_epochs")])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_an_unknown_key_of_a_recipe_suggests_the_near_miss(command, key, meant, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    recipe = {"dataset_name": "photos", key: 3} if command == "train" else {"methods": {"DPO": {}}, key: 3}
    file.write_text(yaml.safe_dump(recipe))
    assert main([command, f"--config={file}"]) == 2
    error = capsys.readouterr().err
    assert f"{str(file)!r} has unknown keys [{key!r}]." in error
    assert (f"Did you mean {meant}" in error) == (command == "train")  # the method's flags are under training:


def test_names_are_similar_by_initials_spelling_or_words():
    known = ["lr_scheduler_type", "learning_rate", "beta", "model_name_or_path", "train_text_model"]
    assert similar_names("--lr", known) == ["learning_rate", "lr_scheduler_type"]
    assert similar_names("--bata", known) == ["beta"]
    assert similar_names("--model", known) == ["model_name_or_path", "train_text_model"]
    assert similar_names("--zzz", known) == []


def test_a_repeated_flag_of_several_values_keeps_all_of_them():
    words = ["--prompt_template", "a {}", "b {}", "--seed", "1", "--prompt_template=c {}", "--prompt-template", "d {}"]
    assert joined(words, "--prompt_template") == ["--seed", "1", "--prompt_template", "a {}", "b {}", "c {}", "d {}"]
    assert joined(["--seed", "1"], "--prompt_template") == ["--seed", "1"]


def test_the_recipe_is_taken_out_of_the_command_line():
    assert without_config(["--seed", "1", "--config", "a.yaml", "--beta", "2"]) == ["--seed", "1", "--beta", "2"]
    assert without_config(["--config=a.yaml", "--beta", "2"]) == ["--beta", "2"]


@pytest.mark.parametrize("command", ["train", "steer", "evaluate"])
def test_help_has_the_flags_that_matter_and_help_all_the_rest(command, capsys):
    assert main([command, "--help"]) == 0
    short = capsys.readouterr().out
    assert main([command, "--help-all"]) == 0
    whole = capsys.readouterr().out

    def flags(page):
        return {line.split()[0] for line in page.splitlines() if line.startswith("  --")}

    assert flags(short) <= flags(whole)
    if command != "evaluate":
        assert len(flags(short)) == 20
        assert len(flags(whole)) > 100
        assert f"--help-all lists the other {len(flags(whole)) - 20} flags" in short


def test_without_a_terminal_nothing_but_lines_is_printed(clip_folder, tmp_path):
    """Losses are numbers that a program can read, and no progress bar fills the log."""
    from samples import write_parquet

    data = write_parquet(tmp_path / "photos", train=12, test=8)
    command = ["train", "--model_name_or_path", clip_folder, "--dataset_name", data, "--output_dir", tmp_path / "out"]
    command += ["--use_cpu", "true", "--report_to", "none", "--logging_steps", "1", "--max_steps", "2"]
    words = [sys.executable, "-m", "clip_po.cli.main", *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert "%|" not in done.stdout + done.stderr
    logs = [yaml.safe_load(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [log["loss"] for log in logs if "loss" in log]
    assert all(isinstance(log[name], float) for log in logs for name in ("loss", "kl", "train_loss") if name in log)
