"""The precision that clip-po train chooses by itself."""

import pytest
import torch

from clip_po.cli import precision
from clip_po.cli.precision import precision_defaults, processor_features
from clip_po.cli.train_arguments import parse

NATIVE = {"bf16": True, "use_cpu": True, "attn_implementation": "eager"}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A processor that computes in bfloat16, without an accelerator."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(precision, "processor_features", lambda: frozenset({"fpu", "avx512_bf16"}))


def test_a_processor_that_computes_in_bfloat16_does():
    assert precision_defaults([]) == NATIVE


def test_another_one_does_not(monkeypatch):
    monkeypatch.setattr(precision, "processor_features", lambda: frozenset({"fpu", "avx2"}))
    assert precision_defaults([]) == {}


@pytest.mark.parametrize("argv", [["--bf16"], ["--bf16", "false"], ["--bf16=false"], ["--fp16", "true"]])
def test_a_flag_wins(argv):
    assert precision_defaults(argv) == {}


def test_a_recipe_and_accelerate_win(tmp_path, monkeypatch):
    file = tmp_path / "recipe.yaml"
    file.write_text("bf16: false\n")
    assert precision_defaults(["--config", str(file)]) == {}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert precision_defaults([]) == {}


def test_an_accelerator_decides_for_itself_unless_the_processor_is_to_train(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert precision_defaults([]) == ({"bf16": True} if native else {})
    assert precision_defaults(["--use_cpu", "true"]) == NATIVE


def test_other_flags_of_the_user_stay(tmp_path):
    shared = ["--dataset_name", "d", "--output_dir", str(tmp_path)]
    _, args, model_args = parse([*shared, "--attn_implementation", "sdpa"])
    assert (args.bf16, args.use_cpu, model_args.attn_implementation) == (True, True, "sdpa")
    _, args, model_args = parse([*shared, "--bf16", "false"])
    assert (args.bf16, model_args.attn_implementation) == (False, None)


def test_features_are_those_that_linux_names():
    assert isinstance(processor_features(), frozenset)
