"""The arithmetic of docs/scale.md: counted on models, and the page as it is printed."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

ROOT = Path(__file__).parents[2]
IMAGES, RANK = 4, 4


@pytest.fixture(scope="module")
def scale():
    """benchmarks/scale_formulas.py; the scripts import it by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("scale_formulas")


def small_config(act="quick_gelu"):
    tower = {"num_attention_heads": 4, "hidden_act": act}
    vision = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "image_size": 56, "patch_size": 8}
    text = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 64}
    return CLIPConfig(vision_config={**tower, **vision}, text_config={**tower, **text}, projection_dim=16)


def small_model(step, attention="sdpa"):
    model = CLIPModel(step.config)
    model.set_attn_implementation(attention)
    model.requires_grad_(False)
    if not step.rank:
        model.vision_model.requires_grad_(True)
        model.visual_projection.requires_grad_(True)
        return model.train()
    last = range(step.config.vision_config.num_hidden_layers)[-step.reached :]
    targets = rf".*vision_model.*layers\.({'|'.join(map(str, last))})\..*\.(q_proj|v_proj)"
    return get_peft_model(model, LoraConfig(r=step.rank, target_modules=targets)).train()


def pixels(config):
    side = config.vision_config.image_size
    return torch.randn(IMAGES, 3, side, side)


@pytest.mark.parametrize("name", ["B/32", "B/16", "L/14", "L/14-336", "H/14", "g/14", "bigG/14"])
def test_parameters_are_those_of_the_model(scale, name):
    config = scale.MODELS[name]
    with torch.device("meta"):
        model = CLIPModel(config)
    vision = sum(p.numel() for n, p in model.named_parameters() if n.startswith("vis"))
    assert scale.vision_parameters(config) == vision
    # And the logit scale.
    assert vision + scale.text_parameters(config) + 1 == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"rank": RANK}, {"rank": RANK, "blocks": 2}])
def test_what_trains_is_counted(scale, options):
    step = scale.Step(small_config(), **options)
    assert step.trained == sum(p.numel() for p in small_model(step).parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [{}, {"rank": RANK}, {"rank": RANK, "blocks": 2}])
def test_operations_of_the_vision_tower(scale, options):
    step = scale.Step(small_config(), **options)
    model = small_model(step, "eager")  # the counter would count what a fused backward pass computes again
    with FlopCounterMode(display=False) as counter:
        embeds = model.get_image_features(pixels(step.config)).pooler_output
    forward = counter.get_total_flops()
    with counter:
        embeds.sum().backward()
    expected = scale.policy_flops(step)
    assert forward == IMAGES * expected["forward"]
    # Nobody needs the gradient of the first adapted block's keys; a fused backward pass computes it all the same.
    vision = step.config.vision_config
    keys = 2 * scale.tokens_of(vision) ** 2 * vision.hidden_size if step.rank else 0
    assert counter.get_total_flops() == IMAGES * (expected["backward"] - keys)


def test_operations_of_the_text_tower(scale):
    config = small_config()
    model = small_model(scale.Step(config), "eager")  # the counter knows no fused attention under a mask
    tokens = torch.ones(3, 10, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.get_text_features(tokens, torch.ones_like(tokens))
    assert counter.get_total_flops() == 3 * scale.text_flops(config, 10)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("options", [{}, {"rank": RANK}, {"rank": RANK, "blocks": 2}, {"checkpointing": True}])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_autograd_saves(scale, act, options, bf16):
    step = scale.Step(small_config(act), pairs=IMAGES // 2, bf16=bf16, **options)
    model = small_model(step)
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # By storage, which several tensors share; they are kept, so that none takes another's place.
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model.get_image_features(pixels(step.config))
    found = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    expected = scale.activation_bytes(step) + scale.memory(step)["bf16 weights"]
    if step.checkpointing:  # the backward pass has one block as well, but the last block's output no longer
        vision, tokens = step.config.vision_config, IMAGES * scale.tokens_of(step.config.vision_config)
        expected += 2 * 4 * tokens * vision.hidden_size
        expected -= scale.block_bytes(vision, tokens, 2 if bf16 else 4, step.rank)
        expected -= 2 * scale.block_weights(vision) if bf16 else 0
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("options", [{"rank": RANK}, {"checkpointing": True}, {"candidates": 2000, "seen": 0}])
def test_peak_is_what_a_step_allocates(scale, options):
    check = importlib.import_module("scale_check")
    step = scale.Step(small_config(), **{"pairs": 16, "candidates": 50, **options})
    assert scale.peak(step) == pytest.approx(check.counted_peak(step), rel=0.05)


def test_an_all_reduce_sends_the_gradients_nearly_twice(scale):
    config = scale.MODELS["B/32"]
    for options in ({}, {"rank": 16}):
        step = scale.Step(config, gpus=8, **options)
        assert scale.exchanged(step) == 2 * 7 / 8 * 4 * step.trained
    assert scale.exchanged(scale.Step(config)) == 0


def test_sharding_gathers_twice_and_reduces_once(scale):
    config = scale.MODELS["B/32"]
    vision, text = scale.vision_parameters(config), scale.text_parameters(config)
    step = scale.Step(config, gpus=4, sharded=True, bf16=False)
    # The frozen text tower has no backward pass to be gathered for.
    assert scale.exchanged(step) == 3 * (4 * (3 * vision + text)) // 4
    whole, share = scale.memory(scale.Step(config, gpus=4)), scale.memory(step)
    assert [share[name] for name in ("optimizer", "gradients")] == [
        whole[name] // 4 for name in ("optimizer", "gradients")
    ]
    # Adapters are small to reduce, but the frozen weights are gathered all the same.
    adapted = scale.Step(config, gpus=4, rank=16)
    assert scale.exchanged(dataclasses.replace(adapted, sharded=True)) > 50 * scale.exchanged(adapted)


def test_only_what_the_backward_pass_does_not_hide_is_waited_for(scale):
    step = scale.Step(scale.MODELS["L/14"], pairs=8, gpus=64)
    slow = scale.seconds(step, scale.Machine(between=1e9))
    fast = scale.seconds(step, scale.Machine(between=1e12))
    assert fast["waiting"] == 0
    assert 0 < slow["waiting"] < slow["exchange"]
    assert slow["step"] - fast["step"] == pytest.approx(slow["waiting"])


def test_the_page_holds_the_tables_as_they_are_printed(scale, tmp_path, monkeypatch, capsys):
    main = importlib.import_module("scale").main
    plot, record = tmp_path / "scale.png", tmp_path / "scale.json"
    monkeypatch.setattr("sys.argv", ["scale.py", "--plot", str(plot), "--json", str(record)])
    main()
    tables = re.findall(r"^\|.*?(?=\n\n)", capsys.readouterr().out, re.MULTILINE | re.DOTALL)
    page = (ROOT / "docs" / "scale.md").read_text()
    assert len(tables) > 8
    assert [table.splitlines()[0] for table in tables if table not in page] == []
    assert plot.stat().st_size > 10_000
    assert '"Exchange"' in record.read_text()
