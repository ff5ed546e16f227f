"""Adapters: added so that training starts from the model as it is, saved so that they load as they were trained."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from clip_po.dual_encoder import as_dual_encoder

logger = logging.get_logger(__name__)

MOST_CHANGE = 1e-4
"""Largest change of a unit-norm embedding that counts as rounding when adapters are added. An SVD makes about 1e-6."""

DEFAULT_ADAPTER = "default"
"""Name of an adapter that PEFT saves in the folder itself instead of a subfolder."""


def add_adapters(encoder: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """Add adapters to a model without changing what it answers.

    Args:
        encoder: The model. Its layers are wrapped in place. PiSSA and OLoRA also change their weights, by as much as
            the new adapters give back.
        config: The adapters.
        seed: Seed of their random weights.

    Returns:
        The model with adapters. It gives the embeddings of `encoder` up to rounding.

    Raises:
        ValueError: If the adapters can't be used here, do not fit the model, or change what it answers.
    """
    config = _checked(config)
    before = _embeddings(encoder)
    set_seed(seed)  # the same weights for the same seed
    try:
        model = get_peft_model(encoder, config)
        change = float((_embeddings(encoder) - before).abs().max())
        changes_base(model)  # of some kinds, adapters can't be disabled
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError, RuntimeError) as error:
        targets = as_dual_encoder(encoder).adapter_targets("vision")
        raise ValueError(
            f"peft_config does not fit the model ({type(error).__name__}: {error}). Target layers of its vision "
            rf"tower, with target_modules=r'.*vision_model.*\.{targets}'."
        ) from error
    if not change <= MOST_CHANGE:
        raise ValueError(
            f"The new adapters ({_described(config)}) change the embeddings by up to {change:.2g} before any "
            "training, so the policy would not start from the model. Choose an initialization that changes nothing, "
            "such as init_lora_weights=True, 'pissa' or 'olora', or init_weights=True for other kinds of adapters."
        )
    if getattr(config, "init_lora_weights", None) == "eva":
        logger.warning(
            "init_lora_weights='eva' saw no data, so the adapters start as those of plain LoRA. For EVA, add them "
            "with get_peft_model, call peft.initialize_lora_eva_weights with your images, and pass the PeftModel."
        )
    return model


def check_adapters(model: PeftModel) -> None:
    """Raise if the adapters of a model can't be trained, or would not load as they were trained.

    Args:
        model: The model with the adapters to train.

    Raises:
        ValueError: If several adapters are active, they are merged or disabled, or one is of a kind that
            `add_adapters` refuses.
    """
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"The PeftModel has the active adapters {active}, but one adapter is trained and saved. Activate one with "
            "model.set_adapter(NAME), and merge the others first."
        )
    config = model.peft_config[active[0]]
    if _checked(config) is not config:
        raise ValueError(
            f"The PeftModel has {_described(config)}, which PEFT draws anew when it loads the adapters. Save them "
            "with path_initial_model_for_weight_conversion first, and load the result."
        )
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if merged := sorted({name for layer in layers for name in layer.merged_adapters}):
        raise ValueError(
            f"The adapters {merged} of the PeftModel are merged into its weights, where they do not train and are not "
            "saved. Call model.unmerge_adapter() to train them, or model = model.merge_and_unload() to train the "
            "model."
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            "The adapters of the PeftModel are disabled, so they would not train. Call "
            "model.base_model.enable_adapter_layers() first."
        )
    if len(model.peft_config) > 1:
        logger.warning(
            f"The PeftModel has the adapters {list(model.peft_config)}. Only the active one, {active[0]!r}, is "
            "trained and saved."
        )


def changes_base(model: PeftModel) -> bool:
    """Return whether adding the adapters changed the weights of the base model, as PiSSA and OLoRA do.

    Args:
        model: A model of `add_adapters`, before training.

    Returns:
        Whether the model without its adapters gives other embeddings.
    """
    encoder = model.get_base_model()
    with model.disable_adapter():
        without = _embeddings(encoder)
    return not bool((without - _embeddings(encoder)).abs().max() <= MOST_CHANGE)


def save_adapters(model: PeftModel, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Save the active adapter in the folder itself, where every library looks for it, whatever its name.

    Args:
        model: The model.
        folder: The folder.
        state_dict: Weights as Trainer gathered them from several processes; None for those of `model`.
    """
    (name,) = model.active_adapters
    model.save_pretrained(folder, state_dict=state_dict, selected_adapters=[name])
    if name != DEFAULT_ADAPTER:
        for file in Path(folder, name).iterdir():
            file.replace(Path(folder, file.name))
        shutil.rmtree(Path(folder, name))


def _checked(config: PeftConfig) -> PeftConfig:
    """Return the configuration that is used: the same object, or a copy with an exact SVD.

    Raises:
        ValueError: If it is of a kind that is not supported.
    """
    if config.is_prompt_learning:
        raise ValueError(
            f"{_described(config)} adds virtual tokens to a language model, which a two-tower model does not read. "
            "Choose adapters of layers, such as LoraConfig."
        )
    if config.peft_type == PeftType.ADALORA:
        raise ValueError(
            "AdaLoRA redistributes its ranks by statistics that checkpoints do not hold, so a run could not be "
            "resumed exactly. Choose LoraConfig."
        )
    weights = getattr(config, "init_lora_weights", True)
    if weights in ("corda", "loftq", "lora_ga"):
        raise ValueError(
            f"init_lora_weights={weights!r} computes new base weights that the saved adapters do not hold, so they "
            "would not load as they were trained. Choose True, 'pissa' or 'olora'."
        )
    if isinstance(weights, str) and weights.startswith("pissa_niter_"):
        config = copy.deepcopy(config)
        config.init_lora_weights = "pissa"
        logger.warning(
            f"init_lora_weights={weights!r} is computed exactly, as 'pissa': the approximation is random, and PEFT "
            "would draw another one when it loads the adapters."
        )
    return config


def _described(config: PeftConfig) -> str:
    weights = getattr(config, "init_lora_weights", getattr(config, "init_weights", None))
    return type(config).__name__ if weights is None else f"{type(config).__name__} with initial weights {weights!r}"


@torch.no_grad()
def _embeddings(encoder: PreTrainedModel) -> Tensor:
    """Return the unit-norm embeddings of random pixels and of a text, Tensor[3, D]."""
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    towers = as_dual_encoder(encoder)
    pixels, tokens = towers.random_inputs(torch.Generator().manual_seed(0))
    features = [towers.image_features(pixels), towers.text_features(tokens)]
    for module, training in modes.items():
        module.training = training
    return nn.functional.normalize(torch.cat(features).float(), dim=-1)
