"""Which parameters train: the towers and layers that the arguments name, without what the user froze."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import get_args

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers.utils import logging

from clip_po.config import ContrastivePOConfig
from clip_po.dual_encoder import as_dual_encoder
from clip_po.families import FAMILIES, DualEncoder, Tower

logger = logging.get_logger(__name__)

PARTS: Mapping[Tower, set[str]] = {
    tower: {name for family in FAMILIES.values() for name in family.towers[tower]} for tower in get_args(Tower)
}
"""Names of the modules of all supported models, by tower."""

FINAL_LAYERS = (
    *("post_layernorm", "final_layer_norm", "visual_projection", "text_projection"),
    *("head", "pooler", "layernorm", "layer_norm", "pre_LN", "transformation"),
)
"""The layers above the blocks of both towers, which train with any `trainable_layers`."""

_SCALES = {name for family in FAMILIES.values() for name in (*family.scales, *family.biases)}
WITHOUT_DECAY = (
    *sorted(_SCALES),
    *("class_embedding", "cls_token", "position_embedding", "probe"),
    *("batchnorm", "_bn.", "depthwise_norm", "lambda1"),
    *("image_weight", "text_weight"),
)
"""Parts of the names of parameters that have no weight decay, because 0 means nothing for them.

These are scales of logits and layers, embeddings of positions and of a whole image, batch normalizations, and the
matrices of a `ConceptTransform`.
"""

_BLOCK = re.compile(r"\.(layers?|blocks?)\.(\d+)\.")


def tower_of(name: str) -> Tower | None:
    """Return the tower of a parameter of a two-tower model or PeftModel.

    Args:
        name: Name of the parameter, as in `named_parameters`.

    Returns:
        "vision" or "text"; None for the logit scale and a bias.
    """
    parts = name.split(".")
    return next((tower for tower in get_args(Tower) if any(part in parts for part in PARTS[tower])), None)


def tower_trains(model: nn.Module, tower: Tower) -> bool:
    """Return whether a tower trains.

    Args:
        model: Two-tower model or PeftModel.
        tower: "vision" or "text".

    Returns:
        Whether any parameter of the tower or its projection requires gradients.
    """
    return any(parameter.requires_grad and tower_of(name) == tower for name, parameter in model.named_parameters())


def choose_trainable(model: nn.Module, args: ContrastivePOConfig) -> None:
    """Freeze the parameters that the arguments do not train. Parameters that are frozen already stay frozen.

    Args:
        model: Two-tower model or PeftModel. Changed in place.
        args: `train_vision_model`, `train_text_model`, `train_logit_scale` and `trainable_layers`.

    Raises:
        ValueError: If nothing is left to train, adapters are in a part that does not train, or a trained tower has
            fewer blocks than `trainable_layers`.
    """
    encoder = as_dual_encoder(model)
    _check_layers(encoder, args)
    for name, parameter in encoder.model.named_parameters():
        if name.startswith(encoder.unused):
            parameter.requires_grad_(False)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    excluded = {name: found for name in trainable if (found := _excluded(name, encoder, args)) is not None}
    if isinstance(model, PeftModel):
        _check_adapters(model, trainable, excluded)
    for name in excluded:
        trainable[name].requires_grad_(False)
    if len(excluded) == len(trainable):
        asked = {"train_vision_model": args.train_vision_model, **_asked(args)}
        raise ValueError(
            "Nothing is left to train: every parameter that "
            f"{', '.join(f'{name}=True' for name, is_asked in asked.items() if is_asked)} would train is frozen in "
            "the model. Unfreeze what should train, for instance with model.vision_model.requires_grad_(True), before "
            "you pass the model."
        )
    left = trainable.keys() - excluded.keys()
    trains = {
        "train_text_model": any(tower_of(name) == "text" for name in left),
        "train_logit_scale": any(_is_scale(name) for name in left),
    }
    cause = "the model was passed with those parameters frozen. To train them, call requires_grad_(True) on them first"
    if isinstance(model, PeftModel):
        cause = "no adapter is there. To train adapters there, name its layers in target_modules"
    for tower in get_args(Tower):
        rate = getattr(args, f"{tower}_learning_rate")
        if rate is not None and not any(tower_of(name) == tower for name in left):
            raise ValueError(f"{tower}_learning_rate={rate!r} has no effect, because {cause}.")
    for name, is_asked in _asked(args).items():
        if is_asked and not trains[name]:
            logger.warning(f"{name}=True trains nothing, because {cause}.")


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, args: ContrastivePOConfig) -> None:
    """Raise if an optimizer of the user holds none of the parameters that train, or has learning rates given twice.

    Args:
        optimizer: The optimizer.
        model: The module to train.
        args: The learning rates of towers and blocks are read.

    Raises:
        ValueError: If no step of the optimizer would change the model, or a learning rate has no effect.
    """
    if args.learning_rates:
        raise ValueError(
            f"{', '.join(f'{name}={value!r}' for name, value in args.learning_rates.items())} has no effect with "
            "optimizers, which have their own learning rates. Leave one of the two out."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(parameter.requires_grad and id(parameter) in held for parameter in model.parameters()):
        raise ValueError(
            "optimizers holds none of the parameters that train, so nothing would: they are frozen, or of another "
            "object. Make the optimizer from the parameters of the model that you pass, or leave optimizers out."
        )


def trained_linear_layers(model: nn.Module, args: ContrastivePOConfig) -> str:
    """Return a pattern for the linear layers of attention and MLP that the arguments train, as `target_modules`.

    Args:
        model: Two-tower model.
        args: As for `choose_trainable`.

    Returns:
        A regular expression that matches names of modules, of the vision tower alone by default.
    """
    encoder = as_dual_encoder(model)
    return "|".join(
        rf"{_blocks_pattern(tower, encoder, args)}\.{encoder.linear_layers[tower]}" for tower in _trained_towers(args)
    )


def _blocks_pattern(tower: Tower, encoder: DualEncoder, args: ContrastivePOConfig) -> str:
    if args.trainable_layers is None:
        return rf".*{tower}_model.*"
    found = _blocks(encoder, tower)
    numbers = sorted({int(block[2]) for block in found})
    last = "|".join(map(str, numbers[len(numbers) - args.trainable_layers :]))
    return rf".*{tower}_model.*{found[0][1]}\.({last})\..*"


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] in _SCALES


def _trained_towers(args: ContrastivePOConfig) -> list[Tower]:
    trains = {"vision": args.train_vision_model, "text": args.train_text_model}
    return [tower for tower in get_args(Tower) if trains[tower]]


def _asked(args: ContrastivePOConfig) -> dict[str, bool]:
    return {"train_text_model": args.train_text_model, "train_logit_scale": args.train_logit_scale}


def _blocks(encoder: DualEncoder, tower: Tower) -> list[re.Match[str]]:
    """Return the name of the list of blocks and a number for each parameter in the blocks of a tower."""
    names = (name for name, _ in encoder.model.named_parameters() if tower_of(name) == tower)
    return [block for name in names if (block := _BLOCK.search(name))]


def _block_count(encoder: DualEncoder, tower: Tower) -> int:
    return len({block[2] for block in _blocks(encoder, tower)})


def _check_layers(encoder: DualEncoder, args: ContrastivePOConfig) -> None:
    for tower in _trained_towers(args):
        blocks = _block_count(encoder, tower)
        if args.trainable_layers is not None and args.trainable_layers > blocks:
            raise ValueError(
                f"trainable_layers={args.trainable_layers}, but the {tower} tower has {blocks} blocks. Give a number "
                f"from 0 to {blocks}, or leave it out to train the whole tower."
            )


def _check_adapters(
    model: PeftModel, trainable: Mapping[str, nn.Parameter], excluded: Mapping[str, tuple[str, str]]
) -> None:
    """Raise if adapters do not train, train where the arguments do not, or something trains beside them."""
    if not trainable:
        raise ValueError(
            "The PeftModel has no trainable parameters: PeftModel.from_pretrained freezes adapters. Load it with "
            "is_trainable=True."
        )
    if excluded:
        place, remedy = next(iter(excluded.values()))
        names = [name for name, found in excluded.items() if found == (place, remedy)]
        raise ValueError(
            f"{len(names)} trainable adapter parameters are {place} (such as {names[0]!r}), which is frozen. {remedy}"
        )
    states = [
        get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False) for name in model.peft_config
    ]
    saved = {weight.data_ptr() for state in states for weight in state.values()}
    lost = [name for name, parameter in trainable.items() if parameter.data_ptr() not in saved]
    if lost:
        raise ValueError(
            f"{len(lost)} trainable parameters of the PeftModel are not part of its adapters (such as {lost[0]!r}), "
            "so a checkpoint would not hold them. Freeze them, or name their modules in modules_to_save of the "
            "adapters' configuration."
        )


def _excluded(name: str, encoder: DualEncoder, args: ContrastivePOConfig) -> tuple[str, str] | None:
    """Return where a frozen parameter is, and what to do about adapters there; None if the arguments train it."""
    tower = tower_of(name)
    if tower is None:
        if _is_scale(name) and not args.train_logit_scale:
            return "the logit scale", "Freeze it in the model, too."
        if name.endswith(encoder.biases) and args.policy == "softmax":  # which a bias does not change
            return "the logit bias", "Freeze it in the model, too."
        return None
    other: Tower = "text" if tower == "vision" else "vision"
    if tower not in _trained_towers(args):
        targets = rf".*{other}_model.*\.{encoder.adapter_targets(other)}"
        return (
            f"in the {tower} tower",
            f"Target the {other} tower alone, with target_modules=r'{targets}', or set train_{tower}_model=True.",
        )
    if args.trainable_layers is None:
        return None
    blocks, block = _block_count(encoder, tower), _BLOCK.search(name)
    if block is None and any(layer in name.split(".") for layer in FINAL_LAYERS):
        return None
    if block is not None and int(block[2]) >= blocks - args.trainable_layers:
        return None
    targets = rf"{_blocks_pattern(tower, encoder, args)}\.{encoder.adapter_targets(tower)}"
    return (
        f"below the last {args.trainable_layers} blocks of the {tower} tower",
        f"Target the last blocks alone, with target_modules=r'{targets}', or leave trainable_layers out.",
    )
