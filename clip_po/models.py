"""Loading models: from safetensors, checked, and with adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import CONFIG_NAME, logging

from clip_po.adapters import add_adapters, check_adapters
from clip_po.config import ContrastivePOConfig
from clip_po.data.images import probe_image, to_pixels
from clip_po.dual_encoder import as_dual_encoder, dual_encoder
from clip_po.families import FAMILIES, PolicyKind
from clip_po.hub.checkpoint_files import CONCEPT_FILE, LIMITS, check_config, check_files, check_rank
from clip_po.hub.retries import find_file
from clip_po.hub.safe_loading import refuse_pickles
from clip_po.other_kinds import type_remedy
from clip_po.text_identity import check_tokenizer
from clip_po.training.batch_statistics import keep_batch_statistics
from clip_po.training.resuming import differences
from clip_po.validation import check_finite
from clip_po.weights import check_in_memory, to_float32

logger = logging.get_logger(__name__)


def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """Load a two-tower model in float32, from safetensors, and without running code from its folder.

    Args:
        name: Folder or Hub id of a model whose type is in `clip_po.dual_encoder.FAMILIES`.
        **kwargs: As in `AutoModel.from_pretrained`. `dtype` overrides float32.

    Returns:
        The model, in evaluation mode.

    Raises:
        TypeError: If the checkpoint has another architecture.
        OSError: If there is no such model, or its weights are not in safetensors.
        ValueError: If the folder holds no model, or weights that are not readable or incomplete, or if
            `use_safetensors` is given but not true.
    """
    if not kwargs.get("use_safetensors", True):
        raise ValueError(
            f"use_safetensors={kwargs['use_safetensors']!r} would read weights from a pickle, which can run any "
            "program. Leave it out: weights are read from safetensors only."
        )
    hub = {k: v for k, v in kwargs.items() if k in ("revision", "token")}
    check_files(name)
    # Read the type from the file: for an unknown type, AutoConfig asks whether to run the code of the model.
    try:
        written, _ = PreTrainedConfig.get_config_dict(name, **hub)
    except OSError:
        if not os.path.isdir(name):  # transformers says "couldn't connect" of a refusal too
            find_file(name, CONFIG_NAME, "Give a folder or Hub id of a CLIP checkpoint.", **hub)
        raise
    if "model_type" not in written and os.path.isfile(os.path.join(name, CONCEPT_FILE)):
        raise TypeError(
            f"{name!r} holds a concept transformation ({CONCEPT_FILE}) and no model. Give the checkpoint into which "
            f"clip-po steer has folded it, such as {os.path.join(name, 'checkpoint')!r}, or fold it with "
            "ConceptTransform.fold_into(model)."
        )
    kind = written.get("model_type") or AutoConfig.from_pretrained(name, trust_remote_code=False, **hub).model_type
    if kind in FAMILIES and kind not in CONFIG_MAPPING:
        raise TypeError(
            f"{name!r} is a {kind!r} model, which transformers {transformers.__version__} does not have. Update it: "
            "pip install -U transformers."
        )
    if kind not in FAMILIES:
        raise TypeError(
            f"{name!r} is a {kind!r} model, but clip_po aligns CLIPModel checkpoints (model_type 'clip') and other "
            f"two-tower models of transformers ({', '.join(FAMILIES)}). {type_remedy(kind)}"
        )
    check_config(name, written)
    if os.path.isdir(name):  # for the Hub, transformers finds a converted copy of pickled weights
        refuse_pickles(name)
    given = {"dtype": torch.float32, **kwargs, "use_safetensors": True, "trust_remote_code": False}
    try:
        model, found = AutoModel.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **given)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {name!r} are not readable ({error}). Copy or download them again."
        ) from error
    # Weights that are missing or have another size would start from random values.
    missing = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    if missing:
        raise ValueError(
            f"The weights of {name!r} do not match its config.json: {len(missing)} are missing or have another size, "
            f"such as {missing[0]!r}. Copy or download the checkpoint again, config.json and weights together."
        )
    return model


def load_any(name: str) -> PreTrainedModel | PeftModel:
    """Load a plain model, or a base model with the adapters in a folder or Hub repository.

    The base model is loaded at the revision that the adapters name.

    Args:
        name: Folder or Hub id.

    Returns:
        The model in float32; with adapters, a `PeftModel` whose adapters are frozen.

    Raises:
        ValueError: If adapters are not readable, name no base model, or belong to another base model.
        TypeError, OSError, ValueError: As in `load_model`.
    """
    check_files(name)
    try:
        config = PeftConfig.from_pretrained(name)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"The adapter_config.json of {name!r} is not readable ({error}). Save the adapters again."
        ) from error
    except ValueError:  # no adapters there
        return load_model(name)
    base = config.base_model_name_or_path
    if base is None or (os.path.isabs(base) and not os.path.isdir(base)):
        raise ValueError(
            f"The adapters in {name!r} name {base!r} as their base model, which does not exist. Set "
            "base_model_name_or_path in their adapter_config.json to its Hub id or folder."
        )
    refuse_pickles(name)
    check_rank(name, config)
    model = load_model(base, **({"revision": config.revision} if config.revision else {}))
    try:
        adapted = PeftModel.from_pretrained(model, name)
        stored = {key: tuple(weight.shape) for key, weight in load_peft_weights(name, device="cpu").items()}
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"The adapters in {name!r} do not fit their base model {base!r} ({_first_lines(error)}). Set "
            "base_model_name_or_path in their adapter_config.json to the model that they were trained on, or save "
            "them again."
        ) from error
    wanted = {key: tuple(weight.shape) for key, weight in get_peft_model_state_dict(adapted).items()}
    if stored != wanted:
        raise ValueError(
            f"The adapters in {name!r} belong to another model than their base model {base!r}: "
            f"{differences(stored, wanted)}. Set base_model_name_or_path in their adapter_config.json to the model "
            "that they were trained on."
        )
    return adapted


def load_policy(
    model: str | PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | None,
    args: ContrastivePOConfig,
    peft_config: PeftConfig | None,
) -> PreTrainedModel | PeftModel:
    """Make the initial policy: load it if it is a name, and add new adapters.

    Args:
        model: The model, or its folder or Hub id. An object is changed in place, not copied. 16-bit weights are
            converted to float32.
        ref_model: The reference policy, if it is another model; None if not.
        args: `seed` draws new adapters, and `model_init_kwargs` are used if `model` is a name.
        peft_config: New adapters; None for no new ones.

    Returns:
        The model; with adapters, a `PeftModel`.

    Raises:
        ValueError: If arguments do not fit together, or a weight is not finite or not in memory. The message says
            which, and what to do.
        TypeError: If `model` or `ref_model` is no supported two-tower model, or `peft_config` is not a PeftConfig.
        OSError: As for `load_model`.
    """
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config must be a PeftConfig, such as LoraConfig(r=16, target_modules=...), got {peft_config!r}."
        )
    if peft_config is not None and peft_config.task_type is not None:
        raise ValueError(
            f"peft_config.task_type is {str(peft_config.task_type)!r}, which needs the methods of a language model. "
            "Set task_type=None."
        )
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if ref_model is not None:
        reference = dual_encoder(ref_model, "ref_model")
        if not isinstance(model, str) and reference is dual_encoder(model):
            raise ValueError(
                "model and ref_model are the same object, or one holds the other inside its adapters, so the "
                "reference would train along with the policy. Leave ref_model out to compare with the initial model, "
                "or load it a second time."
            )
    if args.train_logit_scale and (peft_config is not None or isinstance(model, PeftModel)):
        raise ValueError(
            "train_logit_scale=True with adapters: an adapter checkpoint does not hold the logit scale, so it would "
            "be lost. Leave it frozen, or train the full model."
        )
    revision = None
    if isinstance(model, str):
        given_kwargs = init_kwargs(args.model_init_kwargs)
        model, revision = load_model(model, **given_kwargs), given_kwargs.get("revision")
    elif args.model_init_kwargs:
        logger.warning("model_init_kwargs are ignored because the model is an object, not a name.")
    encoder = dual_encoder(model)
    check_policy(args.policy, model, "model")
    if ref_model is not None:
        check_policy(args.policy, ref_model, "ref_model")
    keep_batch_statistics(encoder)
    for given, name in ((model, "model"), (ref_model, "ref_model")):
        if given is not None:
            check_in_memory(given, name)
            check_finite(given, name)
            to_float32(given, name)
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError(
                "peft_config was given with a PeftModel, which already has adapters. Leave peft_config out to train "
                "these adapters, or merge them first: model = model.merge_and_unload()."
            )
        check_adapters(model)
    elif peft_config is not None:
        model = add_adapters(encoder, peft_config, args.seed)
        if args.base_model_id in (None, encoder.config.name_or_path):
            config = model.peft_config[model.active_adapters[0]]
            config.revision = config.revision or revision
    if args.base_model_id is None and isinstance(model, PeftModel) and os.path.isdir(encoder.config.name_or_path):
        logger.warning(
            f"The adapters will name the folder {encoder.config.name_or_path!r} as their base model, which does not "
            "exist on other machines. Set base_model_id to its id on the Hub."
        )
    if args.base_model_id is not None and isinstance(model, PeftModel):
        for config in model.peft_config.values():
            config.base_model_name_or_path = args.base_model_id
    return model


def check_policy(policy: PolicyKind, model: nn.Module, name: str) -> None:
    """Raise if a model can't be the policy.

    Args:
        policy: As in `ContrastivePOConfig`.
        model: Two-tower model or PeftModel.
        name: Name of the argument, for messages.

    Raises:
        ValueError: If the policy is "sigmoid", and the model was not trained by a sigmoid of each pair.
    """
    encoder = as_dual_encoder(model)
    if policy == "sigmoid" and not encoder.pairwise:
        raise ValueError(
            f"policy='sigmoid' reads the sigmoid of a logit as a probability, but {name} is a {encoder.class_name}, "
            "whose logits were trained to be compared by a softmax: without a bias, the sigmoid of nearly all of them "
            "is 1. Leave policy out, or choose a SigLIP checkpoint."
        )


def init_kwargs(kwargs: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Return a copy of `model_init_kwargs`.

    Args:
        kwargs: The argument; None for no keyword arguments.

    Returns:
        A new dictionary. Changes to it do not reach the configuration.

    Raises:
        ValueError: If they are not a dictionary, for instance JSON that was not parsed.
    """
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(f"model_init_kwargs must be a dict (as JSON on the command line), got {kwargs!r}.")
    return dict(kwargs or {})


def load_processor(model: nn.Module, args: ContrastivePOConfig) -> ProcessorMixin:
    """Load the processor of the checkpoint that a model was loaded from.

    Args:
        model: Two-tower model or PeftModel. Its `config.name_or_path` is the checkpoint.
        args: `revision` and `token` in its `model_init_kwargs` are used.

    Returns:
        The processor, such as a `CLIPProcessor`.

    Raises:
        ValueError: If the checkpoint has none, or `model_init_kwargs` is not a dictionary.
        TypeError: As for `dual_encoder`.
    """
    name = dual_encoder(model).config.name_or_path
    kwargs = init_kwargs(args.model_init_kwargs)
    try:
        hub = {k: v for k, v in kwargs.items() if k in ("revision", "token")}
        return read_processor(name, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No processor was given, and the checkpoint of the model, {name!r}, has none ({error}). Pass "
            "processing_class=AutoProcessor.from_pretrained(...)."
        ) from error


def read_processor(name: str | os.PathLike[str], **hub: Any) -> ProcessorMixin:
    """Read the processor of a checkpoint, without running code from it.

    Args:
        name: Folder or Hub id.
        **hub: `revision` and `token`.

    Returns:
        The processor.

    Raises:
        OSError, ValueError: If there is none, it is not readable, or it makes images of more than 10,000 pixels.
    """
    check_files(name)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=False, **hub)
    for field in ("size", "crop_size"):
        sides = getattr(processor.image_processor, field, None) or {}
        for side, pixels in dict(sides).items():
            if pixels is not None and not 1 <= pixels <= LIMITS["image_size"]:
                raise ValueError(
                    f"The processor of {str(name)!r} has {field} {side}={pixels!r}, but it must be from 1 to "
                    f"{LIMITS['image_size']:,} pixels. Correct its preprocessor_config.json or processor_config.json."
                )
    return processor


def check_processor(processor: Any, model: nn.Module) -> None:
    """Raise if a processor does not fit a model.

    Args:
        processor: The value to check. A size that it does not state is not checked.
        model: Two-tower model or PeftModel.

    Raises:
        TypeError: If it has no image processor or no tokenizer, or as for `dual_encoder`.
        ValueError: If it makes images of another size, its tokenizer has more tokens than the model, or as for
            `check_tokenizer`.
    """
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise TypeError(
            f"processing_class must be a processor, with an image_processor and a tokenizer, got "
            f"{type(processor).__name__}. Pass AutoProcessor.from_pretrained(...) of the model's checkpoint."
        )
    encoder, probe = as_dual_encoder(model), probe_image()
    config, side = encoder.model.config, encoder.image_side
    height, width = to_pixels(processor, [probe]).shape[-2:]
    if side is not None and (height, width) != (side, side):
        size = f"{width}" if width == height else f"{width} x {height}"
        raise ValueError(
            f"The processor makes images of {size} pixels from one of {probe.width} x {probe.height}; the model reads "
            f"{side} x {side}. Load the processor of the same checkpoint as the model, with its own resizing and "
            "cropping."
        )
    if len(processor.tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(processor.tokenizer)} tokens, but the model only "
            f"{config.text_config.vocab_size}. Load the processor of the same checkpoint as the model."
        )
    check_tokenizer(processor.tokenizer, model)


def image_size(processor: ProcessorMixin) -> int | None:
    """Return the height of the images that a processor makes.

    Args:
        processor: Processor with an image processor.

    Returns:
        Height in pixels: of the crop if it crops, else its `height` or `shortest_edge`; None if it states neither.
    """
    images = processor.image_processor
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    return (size or {}).get("height") or (size or {}).get("shortest_edge")


def crop_side(processor: ProcessorMixin) -> int | None:
    """Return the side of the center square that a processor resizes to and crops.

    Args:
        processor: Processor with an image processor.

    Returns:
        Side in pixels; None if it does not resize and crop, or if short side, height and width of the crop differ.
    """
    images = processor.image_processor
    if not getattr(images, "do_center_crop", False) or not getattr(images, "do_resize", False):
        return None
    sides = {(images.size or {}).get("shortest_edge"), *((images.crop_size or {}).get(n) for n in ("height", "width"))}
    return sides.pop() if len(sides) == 1 else None


def default_output_dir(model: str | os.PathLike[str] | nn.Module) -> str:
    """Return the output folder of a trainer without arguments: the name of the model and -PO.

    Args:
        model: Folder or Hub id, or a Two-tower model or PeftModel, whose `config.name_or_path` counts.

    Returns:
        Last part of the name and "-PO"; "clip-PO" if there is no name.

    Raises:
        TypeError: As for `dual_encoder`.
    """
    name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else dual_encoder(model).config.name_or_path
    return f"{name.rstrip('/').split('/')[-1] or 'clip'}-PO"


def _first_lines(error: Exception) -> str:
    """Return the first two lines of an error: errors of torch list every weight of a model."""
    return " ".join(str(error).split("\n")[:2]).strip()
