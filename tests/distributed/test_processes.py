"""Two processes on gloo train as one, whole or sharded: same losses, metrics and gradients, ragged batches too."""

import json
from pathlib import Path

import pytest
from distributed import worker
from safetensors.torch import load_file
from tolerances import LOGPS, RUNS, largest, rounding
from torch.testing import assert_close
from transformers import CLIPModel

from clip_po.training.sharding import SHARDING_IS_EXACT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory, clip_folder, two_processes):
    """What one process found, and two that accelerate launched with the configuration of the examples."""
    folder = tmp_path_factory.mktemp("processes")
    worker.main(str(clip_folder), folder)
    two_processes.run(Path(worker.__file__), clip_folder, folder)
    return folder


def assert_same_run(folder, name, settings):
    one, two = (json.loads((folder / f"{name}-{n}" / "found.json").read_text()) for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["train"]) == len(two["train"]) == settings.get("max_steps", 50)
    for first, second in zip(one["train"], two["train"], strict=True):
        assert first.keys() == second.keys()
        for key in first:
            assert second[key] == pytest.approx(first[key], rel=RUNS, abs=LOGPS), key
    assert one["eval"].keys() == two["eval"].keys()
    for key, value in one["eval"].items():
        if "runtime" not in key and "preparation" not in key:
            assert two["eval"][key] == pytest.approx(value, rel=RUNS, abs=LOGPS), key
    return two


@pytest.mark.parametrize("name", worker.RUNS)
def test_two_processes_train_as_one(results, name):
    assert_same_run(results, name, worker.RUNS[name])


@pytest.mark.parametrize("name", worker.RUNS)
def test_their_gradients_are_those_of_one_process(results, name):
    one, two = (load_file(results / f"{name}-{n}" / "gradients.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in one.values())
    error = 2 * rounding(scale=largest(one.values()))  # both sides are off
    for key, gradient in one.items():
        assert_close(two[key], gradient, rtol=RUNS, atol=error)


sharded = pytest.mark.skipif(not SHARDING_IS_EXACT, reason="FSDP is refused with this torch")


@sharded
@pytest.mark.parametrize("name", worker.SHARDED_RUNS)
def test_a_sharded_model_trains_as_a_whole_one(results, name):
    assert "DTensor" in assert_same_run(results, name, worker.SHARDED_RUNS[name])["kinds"]


@sharded
@pytest.mark.parametrize("name", ["sharded", "sharded_in_batch"])
def test_a_sharded_model_is_saved_as_a_plain_one(results, name):
    one, two = (load_file(results / f"{name}-{n}" / "model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    for key, weight in one.items():
        assert_close(two[key], weight, rtol=RUNS, atol=rounding())
    model = CLIPModel.from_pretrained(results / f"{name}-2")
    assert model.logit_scale.shape == ()
    assert json.loads((results / f"{name}-2" / "config.json").read_text())["architectures"] == ["CLIPModel"]


@sharded
def test_sharded_adapters_are_saved_as_plain_ones(results):
    one, two = (load_file(results / f"sharded_lora-{n}" / "adapter_model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    for key, weight in one.items():
        assert_close(two[key], weight, rtol=RUNS, atol=rounding())
