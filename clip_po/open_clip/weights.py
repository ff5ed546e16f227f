"""The weights of a CLIP under open_clip's names and under those of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPConfig


@dataclass(frozen=True)
class Correspondence:
    """One weight of open_clip, and the weights of CLIPModel that hold the same numbers.

    Attributes:
        open_clip: Name in open_clip.
        transformers: Names in CLIPModel. Several lie one below the other in the weight of open_clip.
        transposed: Whether the matrix is transposed.
    """

    open_clip: str
    transformers: tuple[str, ...]
    transposed: bool = False


def correspondences(config: CLIPConfig) -> Iterator[Correspondence]:
    """Return the correspondence of every weight.

    Args:
        config: The configuration of the CLIPModel.

    Yields:
        The correspondences. Each name occurs once.
    """
    yield Correspondence("logit_scale", ("logit_scale",))
    yield Correspondence("visual.class_embedding", ("vision_model.embeddings.class_embedding",))
    yield Correspondence("visual.conv1.weight", ("vision_model.embeddings.patch_embedding.weight",))
    yield Correspondence("visual.proj", ("visual_projection.weight",), transposed=True)
    yield Correspondence("text_projection", ("text_projection.weight",), transposed=True)
    yield Correspondence("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",))
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    for name, same in norms.items():
        yield from _weight_and_bias(name, same)
    for prefix, tower, settings in (
        ("visual.", "vision_model", config.vision_config),
        ("", "text_model", config.text_config),
    ):
        yield Correspondence(f"{prefix}positional_embedding", (f"{tower}.embeddings.position_embedding.weight",))
        for layer in range(settings.num_hidden_layers):
            yield from _block(f"{prefix}transformer.resblocks.{layer}", f"{tower}.encoder.layers.{layer}")


def _block(name: str, same: str) -> Iterator[Correspondence]:
    for kind in ("weight", "bias"):
        fused = tuple(f"{same}.self_attn.{part}_proj.{kind}" for part in "qkv")
        yield Correspondence(f"{name}.attn.in_proj_{kind}", fused)
    yield from _weight_and_bias(f"{name}.attn.out_proj", f"{same}.self_attn.out_proj")
    yield from _weight_and_bias(f"{name}.ln_1", f"{same}.layer_norm1")
    yield from _weight_and_bias(f"{name}.ln_2", f"{same}.layer_norm2")
    yield from _weight_and_bias(f"{name}.mlp.c_fc", f"{same}.mlp.fc1")
    yield from _weight_and_bias(f"{name}.mlp.c_proj", f"{same}.mlp.fc2")


def _weight_and_bias(name: str, same: str) -> Iterator[Correspondence]:
    for kind in ("weight", "bias"):
        yield Correspondence(f"{name}.{kind}", (f"{same}.{kind}",))


NOT_WEIGHTS = frozenset({"attn_mask", "input_resolution", "context_length", "vocab_size"})
"""Entries of old checkpoints that are computed from the configuration."""

TEXT = "text."
"""Prefix of the text tower in open_clip's CustomTextCLIP."""


def plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of open_clip under the names of its class CLIP.

    Args:
        weights: Weights of CLIP or CustomTextCLIP, as saved with or without DistributedDataParallel.

    Returns:
        The weights, without the prefixes `module.` and `text.` and without entries that are no weights.
    """
    found = {name.removeprefix("module.").removeprefix(TEXT): weight for name, weight in weights.items()}
    return {name: weight for name, weight in found.items() if name not in NOT_WEIGHTS}


def to_transformers(weights: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """Rename the weights of open_clip.

    Args:
        weights: All weights under the names of open_clip's class CLIP.
        config: The configuration of the CLIPModel.

    Returns:
        All weights of the CLIPModel, each contiguous and in its own memory.

    Raises:
        ValueError: If a weight is missing, or there is one more. The message names it.
    """
    table = list(correspondences(config))
    missing = sorted({entry.open_clip for entry in table} - weights.keys())
    more = sorted(weights.keys() - {entry.open_clip for entry in table})
    if missing or more:
        raise ValueError(
            "The weights do not belong to the architecture: "
            + "; ".join(
                f"{len(names)} {what}, such as {names[0]!r}"
                for names, what in ((missing, "are missing"), (more, "are not in it"))
                if names
            )
            + ". Give the architecture of this checkpoint. Towers of another kind can't be converted."
        )
    found: dict[str, Tensor] = {}
    for entry in table:
        weight = weights[entry.open_clip]
        for name, part in zip(
            entry.transformers,
            weight.chunk(len(entry.transformers)) if len(entry.transformers) > 1 else (weight,),
            strict=True,
        ):
            found[name] = (part.T if entry.transposed else part).clone(memory_format=torch.contiguous_format)
    found["logit_scale"] = found["logit_scale"].reshape(())  # nonscalar_logit_scale has one dimension
    return found


def to_open_clip(weights: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """Rename the weights of a CLIPModel.

    Args:
        weights: All weights of the CLIPModel.
        config: Its configuration.

    Returns:
        All weights of open_clip's class CLIP, each contiguous.
    """
    found: dict[str, Tensor] = {}
    for entry in correspondences(config):
        parts = [weights[name] for name in entry.transformers]
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]
        found[entry.open_clip] = (weight.T if entry.transposed else weight).contiguous()
    return found
