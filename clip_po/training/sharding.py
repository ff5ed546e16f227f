"""Two-tower models under FSDP2: preparation, and use of a sharded model outside training."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from clip_po.dual_encoder import as_dual_encoder

SHARDING_IS_EXACT = Version(torch.__version__) >= Version("2.11")
"""Whether FSDP2 trains as one process does. Gradient norms of two CPU processes were wrong with torch 2.7 and 2.9."""


def allow_sharding(encoder: PreTrainedModel) -> None:
    """Change a two-tower model so that accelerate's FSDP2 preparation and torch's `fully_shard` accept it.

    The logit scale is a single number, which can't be split among processes. It becomes a buffer, which is whole in
    every process and has the same name in checkpoints; so does a bias. CLIPModel also defines no input embeddings,
    which accelerate shards as a unit of their own: the embeddings of the text tower are used.

    Args:
        encoder: The model before sharding. Changed in place.

    Raises:
        ValueError: If the logit scale is trained, because a buffer can't be, or if torch is older than 2.11.
    """
    if not SHARDING_IS_EXACT:
        raise ValueError(
            f"FSDP with torch {torch.__version__}: sharded gradients are wrong before torch 2.11. Update torch, or "
            "train with DDP."
        )
    towers = as_dual_encoder(encoder)
    scales = {name: getattr(encoder, name) for name in (*towers.scales, *towers.biases)}
    if any(scale.requires_grad for scale in scales.values()):
        raise ValueError(
            "train_logit_scale=True under FSDP: a single number can't be split among processes. Leave it frozen, or "
            "train with DDP."
        )
    for name, scale in scales.items():
        delattr(encoder, name)
        encoder.register_buffer(name, scale.detach())
    # A method, not a lambda, so that a copy of the model gets a method bound to the copy.
    encoder.get_input_embeddings = types.MethodType(_text_embeddings, encoder)


def _text_embeddings(encoder: PreTrainedModel) -> nn.Module:
    # Not the token table inside: it is already sharded if CLIPTextEmbeddings is wrapped as a unit.
    return next(module for name, module in encoder.text_model.named_modules() if name.endswith("embeddings"))


@contextlib.contextmanager
def whole_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Gather the weights of a sharded model, so that its towers can be called outside its `forward`.

    Every process must enter the block. Inside, processes may run different numbers of batches.

    Args:
        model: The model as it is trained. Nothing happens if it is not sharded by FSDP2.
        accelerator: The accelerator that sharded it.

    Yields:
        Nothing. Afterwards the weights are sharded again.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)
            unit.reshard()
