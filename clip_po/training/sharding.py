"""CLIPModel under FSDP2: what stands in the way of sharding its parameters, taken away."""

from __future__ import annotations

import types

from torch import nn
from transformers import CLIPModel


def allow_sharding(encoder: CLIPModel) -> None:
    """Make a CLIPModel one that accelerate's preparation for FSDP2, and torch's `fully_shard`, accept.

    Its logit scale is a parameter of shape [], which can't be split among processes: it becomes a buffer, whole in
    every process and the same in a checkpoint. And CLIPModel names no input embeddings, which become a unit of
    their own: they are those of its text tower.

    Args:
        encoder: Changed in place, before it is sharded.

    Raises:
        ValueError: The logit scale trains, which no buffer does.
    """
    scale = encoder.logit_scale
    if scale.requires_grad:
        raise ValueError(
            "train_logit_scale=True under FSDP: a single number can't be split among processes. Leave it frozen, or "
            "train with DDP."
        )
    del encoder.logit_scale
    encoder.register_buffer("logit_scale", scale.detach())
    # A method, not a lambda: it is bound anew in a copy of the model.
    encoder.get_input_embeddings = types.MethodType(_text_embeddings, encoder)


def _text_embeddings(encoder: CLIPModel) -> nn.Module:
    # Not the table of tokens inside: it is sharded already where CLIPTextEmbeddings is wrapped as a unit.
    return encoder.text_model.embeddings
