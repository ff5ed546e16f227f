import copy
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from samples import PROMPTS
from transformers import CLIPModel

from clip_po.encoding import encode_images, encode_texts
from clip_po.training import sharding
from clip_po.training.sharding import allow_sharding

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(sharding, "SHARDING_IS_EXACT", True)


def test_a_torch_whose_sharded_gradients_are_wrong_is_refused(model, monkeypatch):
    monkeypatch.setattr(sharding, "SHARDING_IS_EXACT", False)
    with pytest.raises(ValueError, match=r"before torch 2\.11.*train with DDP"):
        allow_sharding(model.requires_grad_(False))


def test_nothing_but_the_kind_of_the_logit_scale_changes(model, processor, tmp_path):
    before = copy.deepcopy(model)
    allow_sharding(model.requires_grad_(False))
    assert all(parameter.ndim > 0 for parameter in model.parameters())
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(encode_images(model, pixels), encode_images(before, pixels))
    assert torch.equal(encode_texts(model, processor, PROMPTS), encode_texts(before, processor, PROMPTS))
    model.save_pretrained(tmp_path)
    saved = CLIPModel.from_pretrained(tmp_path)
    assert saved.logit_scale.shape == ()
    assert saved.state_dict().keys() == before.state_dict().keys()
    assert torch.equal(saved.logit_scale, before.logit_scale)


def test_the_input_embeddings_of_a_copy_are_its_own(model):
    allow_sharding(model.requires_grad_(False))
    copied = copy.deepcopy(model)
    assert model.get_input_embeddings() is model.text_model.embeddings
    assert copied.get_input_embeddings() is copied.text_model.embeddings


def test_a_logit_scale_that_trains_is_refused(model):
    with pytest.raises(ValueError, match="train_logit_scale=True under FSDP"):
        allow_sharding(model)


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("ddp", DistributedType.MULTI_GPU, 4),
        ("ddp_cpu", DistributedType.MULTI_GPU, 2),
        ("multi_node", DistributedType.MULTI_GPU, 16),
        ("fsdp2", DistributedType.FSDP, 4),
        ("deepspeed_zero2", DistributedType.DEEPSPEED, 4),
    ],
)
def test_accelerate_reads_the_configurations_of_the_examples(name, kind, processes):
    found = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses a key that it does not know
    assert (found.distributed_type, found.num_processes, found.use_cpu) == (kind, processes, False)
    if kind == DistributedType.FSDP:
        assert found.fsdp_config["fsdp_version"] == 2
    if kind == DistributedType.DEEPSPEED:
        assert found.deepspeed_config["zero_stage"] == 2


def test_every_configuration_is_read():
    assert {path.stem for path in CONFIGS.iterdir()} == {
        "ddp",
        "ddp_cpu",
        "multi_node",
        "fsdp2",
        "deepspeed_zero2",
    }
