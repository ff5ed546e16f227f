"""Devices: what they can't compute, weights that are not in memory, and gradients that nobody shows."""

import math

import pytest
import torch
from bad_input.table import case, check
from torch.overrides import TorchFunctionMode
from transformers import CLIPModel

from clip_po.cli.main import main
from clip_po.concept import folding
from clip_po.concept.transform import ConceptTransform
from clip_po.evaluation.interpolation import interpolate
from clip_po.training.nan_guard import NanGuardCallback

# ---- Weights that are not in memory


def device_map(away):
    modules = ("text_model", "text_projection", "vision_model", "visual_projection", "logit_scale")
    return {module: "disk" if module == away else "cpu" for module in modules}


def offloaded(bench, away="vision_model"):
    return CLIPModel.from_pretrained(bench.clip, **offloading(bench, away))


def offloading(bench, away):
    return {"device_map": device_map(away), "offload_folder": str(bench.folder / "offloaded")}


def without_weights(bench):
    with torch.device("meta"):
        return CLIPModel(bench.model.config)


OFFLOADED = {
    "vision": case(
        lambda b: b.trainer(model=offloaded(b)), ValueError, "weights of model are not in memory", "vision"
    ),
    "text": case(
        lambda b: b.trainer(model=offloaded(b, "text_model")), ValueError, "Load the model without device_map"
    ),
    "name": case(
        lambda b: b.trainer(model_init_kwargs=offloading(b, "vision_model")), ValueError, "model are not in memory"
    ),
    "reference": case(lambda b: b.trainer(ref_model=offloaded(b)), ValueError, "weights of ref_model are not in"),
    "concept": case(
        lambda b: b.trainer(model=offloaded(b), concept=ConceptTransform(16)), ValueError, "model are not in memory"
    ),
    "folding": case(lambda b: ConceptTransform(16).fold_into(offloaded(b)), ValueError, "model are not in memory"),
    "base": case(lambda b: interpolate(offloaded(b), b.model, 0.5), ValueError, "weights of base are not in memory"),
    "aligned": case(lambda b: interpolate(b.model, offloaded(b), 0.5), ValueError, "weights of aligned are not in"),
    "meta": case(lambda b: b.trainer(model=without_weights(b)), ValueError, "weights of model are not in memory"),
}


@pytest.mark.parametrize("wanted", OFFLOADED.values(), ids=OFFLOADED)
def test_a_model_that_is_not_in_memory_is_refused(wanted, bench):
    check(wanted, bench)


@pytest.mark.parametrize("given", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_of_one_device_trains(bench, given):
    trainer = bench.trainer(model=CLIPModel.from_pretrained(bench.clip, device_map=given), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


# ---- Precision


def test_float16_on_a_cpu_is_refused(bench, monkeypatch):
    check(case(lambda b: b.trainer(fp16=True), ValueError, "fp16=True", "float32", "bf16=True"), bench)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    check(case(lambda b: b.trainer(), ValueError, "ACCELERATE_MIXED_PRECISION=fp16"), bench)


def test_float16_on_a_cpu_is_refused_by_the_command_before_anything_is_loaded(bench, capsys):
    flags = ["--model_name_or_path", "nowhere", "--dataset_name", "nowhere", "--output_dir", str(bench.folder)]
    assert main(["train", *flags, "--fp16", "true", "--use_cpu", "true"]) == 2
    assert "fp16=True" in capsys.readouterr().err


class WithoutFloat64(TorchFunctionMode):
    """Raises where a tensor is converted to float64 that was not moved to the CPU before."""

    def __init__(self):
        super().__init__()
        self.moved = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        on_device = not any(args[0] is tensor for tensor in self.moved) if args else False
        wide = function is torch.Tensor.double or torch.float64 in args
        if on_device and wide:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype.")
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.cpu:
            self.moved.append(result)
        return result


@pytest.mark.parametrize("path", ["singular", "straight"])
def test_float64_is_computed_on_the_cpu_where_the_device_has_none(monkeypatch, model, path):
    concept = ConceptTransform(16)
    expected = concept.fold_into(model, 0.5, path).visual_projection.weight
    monkeypatch.setattr(folding, "WITHOUT_FLOAT64", ("cpu",))
    with WithoutFloat64():
        found = concept.fold_into(model, 0.5, path).visual_projection.weight
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32


# ---- Gradients


def test_a_missing_norm_does_not_let_nan_pass(bench):
    """DeepSpeed keeps the gradients to itself, and may tell no norm."""
    trainer = bench.trainer()
    guard = NanGuardCallback(trainer)
    guard.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, model=trainer.model)
    trainer.model.visual_projection.weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"weights are not finite, for instance 'visual_projection\.weight'"):
        guard.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, model=trainer.model)


@pytest.mark.parametrize("spoiled", [math.nan, math.inf])
def test_a_missing_norm_is_computed_from_the_gradients(bench, spoiled):
    trainer = bench.trainer()
    trainer.accelerator.clip_grad_norm_ = lambda *args, **kwargs: None
    trainer.model.visual_projection.weight.register_hook(lambda gradient: gradient * spoiled)
    with pytest.raises(FloatingPointError, match="norm of the gradients"):
        trainer.train()
