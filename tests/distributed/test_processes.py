"""Two processes on gloo train as one does: same losses, metrics and gradients, with ragged batches too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

TESTS = Path(__file__).parents[1]
WORKER = TESTS / "distributed" / "worker.py"


def launch(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = [sys.executable] if processes == 1 else command
    done = subprocess.run([*start, WORKER, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory, clip_folder):
    folder = tmp_path_factory.mktemp("processes")
    for processes in (1, 2):
        launch(processes, clip_folder, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigmoid", "kto", "accumulated", "scale", "lora", "distillation"])
def test_two_processes_train_as_one(results, name):
    one, two = (json.loads((results / f"{name}-{n}.json").read_text()) for n in (1, 2))
    assert len(one["train"]) == len(two["train"]) == 50
    for first, second in zip(one["train"], two["train"], strict=True):
        assert first.keys() == second.keys()
        for key in first:
            if key == "rewards/accuracies" and abs(first["rewards/margins"]) < 1e-5:
                continue  # policy and reference are still the same: the sign of their rounding says nothing
            assert second[key] == pytest.approx(first[key], rel=1e-5, abs=2e-5), key
    assert one["eval"].keys() == two["eval"].keys()
    for key, value in one["eval"].items():
        if "runtime" not in key and "preparation" not in key:
            assert two["eval"][key] == pytest.approx(value, abs=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigmoid", "kto", "accumulated", "scale", "lora", "distillation"])
def test_their_gradients_are_those_of_one_process(results, name):
    one, two = (load_file(results / f"{name}-{n}.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in one.values())
    for key, gradient in one.items():
        assert_close(two[key], gradient, rtol=1e-4, atol=1e-6)
