"""The model that is trained: loaded, checked, and frozen where it does not train."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    set_seed,
)
from transformers.utils import logging

from clip_po.concept.transform import ConceptTransform
from clip_po.config import ContrastivePOConfig
from clip_po.hub.safe_loading import refuse_pickles
from clip_po.policy import dual_encoder
from clip_po.training.resuming import differences, first_line

logger = logging.get_logger(__name__)

TEXT_TOWER = ("text_model.", "text_projection.")


def load_model(name: str, **kwargs: Any) -> CLIPModel:
    """Load a CLIPModel in float32, from safetensors.

    Args:
        name: Folder or Hub id.
        **kwargs: As for `CLIPModel.from_pretrained`.

    Raises:
        TypeError: The checkpoint is of another architecture.
        OSError: There is no such model, or its weights are not in safetensors.
        ValueError: The folder holds no model, or weights that can't be read or lack some of the model's.
    """
    if not kwargs.get("use_safetensors", True):
        raise ValueError(
            f"use_safetensors={kwargs['use_safetensors']!r} would read weights from a pickle, which may run any "
            "program. Leave it out: weights are read from safetensors only."
        )
    hub = {k: v for k, v in kwargs.items() if k in ("revision", "token")}
    # The type as it is written: where AutoConfig does not know it, it asks whether to run the model's own code.
    written, _ = PreTrainedConfig.get_config_dict(name, **hub)
    kind = written.get("model_type") or AutoConfig.from_pretrained(name, trust_remote_code=False, **hub).model_type
    if kind != "clip":
        raise TypeError(
            f"{name!r} is a {kind!r} model, but clip_po aligns CLIPModel checkpoints (model_type "
            "'clip'), which have an image and a text tower. Give such a checkpoint, for example "
            "'openai/clip-vit-base-patch32'."
        )
    if os.path.isdir(name):  # on the Hub transformers looks for a converted copy beside a pickle, and reads no other
        refuse_pickles(name)
    given = {"dtype": torch.float32, **kwargs, "use_safetensors": True}
    try:
        model, found = CLIPModel.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **given)
    except SafetensorError as error:
        raise ValueError(f"The weights of {name!r} can't be read ({error}). Copy or download them again.") from error
    # What is missing or of another size would start from random weights.
    missing = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    if missing:
        raise ValueError(
            f"The weights of {name!r} are not those of its config.json: {len(missing)} are missing or of another "
            f"size, such as {missing[0]!r}. Copy or download the checkpoint again, config.json and weights together."
        )
    return model


def load_any(name: str) -> CLIPModel | PeftModel:
    """A plain model, or a base model with the adapters that a folder or Hub id holds.

    Args:
        name: Folder or Hub id.

    Raises:
        ValueError: Adapters that can't be read, that name no base model, or that are of another one.
        TypeError, OSError, ValueError: As for `load_model`.
    """
    try:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    except json.JSONDecodeError as error:
        raise ValueError(
            f"The adapter_config.json of {name!r} can't be read ({error}). Save the adapters again."
        ) from error
    except ValueError:  # no adapters there
        return load_model(name)
    if base is None or (os.path.isabs(base) and not os.path.isdir(base)):
        raise ValueError(
            f"The adapters in {name!r} name {base!r} as their base model, which is not there. Write its Hub id or "
            "folder into their adapter_config.json, as base_model_name_or_path."
        )
    refuse_pickles(name)
    model = load_model(base)
    try:
        adapted = PeftModel.from_pretrained(model, name)
        stored = {key: tuple(weight.shape) for key, weight in load_peft_weights(name, device="cpu").items()}
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"The adapters in {name!r} can't be put on their base model {base!r} ({first_line(error)}). Give the "
            "model that they were trained on as base_model_name_or_path in their adapter_config.json, or save them "
            "again."
        ) from error
    wanted = {key: tuple(weight.shape) for key, weight in get_peft_model_state_dict(adapted).items()}
    if stored != wanted:
        raise ValueError(
            f"The adapters in {name!r} are of another model than their base model {base!r}: "
            f"{differences(stored, wanted)}. Write the model that they were trained on into their "
            "adapter_config.json, as base_model_name_or_path."
        )
    return adapted


def check_finite(model: nn.Module, name: str = "model") -> None:
    """Refuse a model with weights that are no finite numbers: whatever it is asked, it answers nothing.

    Args:
        model: The model.
        name: What messages call it.

    Raises:
        ValueError: Says which weights.
    """
    spoiled = [n for n, p in model.named_parameters() if not p.is_meta and not bool(torch.isfinite(p).all())]
    if spoiled:
        raise ValueError(
            f"{len(spoiled)} weights of {name} hold nan or infinity, such as {spoiled[0]!r}: its training diverged, "
            "or the file is damaged. Load an earlier checkpoint."
        )


def load_policy(
    model: str | PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | None,
    args: ContrastivePOConfig,
    peft_config: PeftConfig | None,
) -> PreTrainedModel | PeftModel:
    """The policy as it starts: loaded where it is a name, with new adapters, frozen where it does not train.

    Raises:
        ValueError: The arguments don't fit together; the message says which and what to do.
        TypeError: No CLIPModel.
    """
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config must be a PeftConfig, such as LoraConfig(r=16, target_modules=...), got {peft_config!r}."
        )
    if peft_config is not None and peft_config.task_type is not None:
        raise ValueError(
            f"peft_config.task_type is {str(peft_config.task_type)!r}, which asks for a language model's methods. Set "
            "task_type=None."
        )
    if ref_model is not None:
        reference = dual_encoder(ref_model, "ref_model")
        if not isinstance(model, str) and reference is dual_encoder(model):
            raise ValueError(
                "model and ref_model are the same object, or one holds the other inside its adapters: the reference "
                "would train along with the policy. Leave ref_model out to compare with the model as training starts, "
                "or load it a second time."
            )
    if args.train_logit_scale and (peft_config is not None or isinstance(model, PeftModel)):
        raise ValueError(
            "train_logit_scale=True with adapters: an adapter checkpoint can't hold the logit scale, so it would be "
            "lost. Leave it frozen, or train the full model."
        )
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if isinstance(model, str):
        model = load_model(model, **init_kwargs(args.model_init_kwargs))
    elif args.model_init_kwargs:
        logger.warning("model_init_kwargs are ignored: the model is an object already, not a name.")
    encoder = dual_encoder(model)
    check_finite(encoder)
    if ref_model is not None:
        check_finite(ref_model, "ref_model")
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError(
                "peft_config was given with a PeftModel, which has adapters already. Leave peft_config out to go on "
                "training them, or merge them first: model = model.merge_and_unload()."
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "The PeftModel has nothing to train: PeftModel.from_pretrained loads adapters frozen. Load it with "
                "is_trainable=True."
            )
    elif peft_config is not None:
        # Adapters start from random weights: the same ones for the same seed.
        set_seed(args.seed)
        try:
            model = get_peft_model(encoder, peft_config)
        except ValueError as error:
            raise ValueError(
                f"peft_config does not fit the model ({error}). Target the layers of its vision tower, with "
                r"target_modules=r'.*vision_model.*\.(q_proj|v_proj)'."
            ) from error
    else:
        for name, parameter in encoder.named_parameters():
            frozen = name.startswith(TEXT_TOWER) and not args.train_text_model
            parameter.requires_grad_(not frozen and (name != "logit_scale" or args.train_logit_scale))
    _check_adapters(model, args)
    if args.base_model_id is None and isinstance(model, PeftModel) and os.path.isdir(encoder.config.name_or_path):
        logger.warning(
            f"The adapters will name the folder {encoder.config.name_or_path!r} as their base model, which means "
            "nothing on another machine. Give base_model_id, its id on the Hub."
        )
    if args.base_model_id is not None and isinstance(model, PeftModel):
        for config in model.peft_config.values():
            config.base_model_name_or_path = args.base_model_id
    return model


def check_concept(
    concept: ConceptTransform,
    model: nn.Module,
    ref_model: nn.Module | None,
    args: ContrastivePOConfig,
    peft_config: PeftConfig | None,
) -> None:
    """Refuse a transformation of another size, and what would train or compare with another model beside it.

    Raises:
        ValueError: The message says which argument and what to do.
    """
    given = {
        "peft_config": peft_config is not None,
        "ref_model": ref_model is not None,
        "train_text_model=True": args.train_text_model,
        "train_logit_scale=True": args.train_logit_scale,
        "activation_checkpointing=True": bool(args.gradient_checkpointing),
    }
    wrong = [name for name, there in given.items() if there]
    if wrong:
        raise ValueError(
            f"concept was given with {' and '.join(wrong)}, but a transformation is trained on the embeddings of a "
            "model that stays as it is, and that is its own reference. Leave them out."
        )
    dim = dual_encoder(model).config.projection_dim
    if concept.dim != dim:
        raise ValueError(
            f"concept transforms embeddings of {concept.dim} numbers, but those of the model have {dim}: give "
            f"ConceptTransform({dim})."
        )


def init_kwargs(kwargs: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """`model_init_kwargs` as a dictionary of its own."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(f"model_init_kwargs must be a dict (as JSON on the command line), got {kwargs!r}.")
    return dict(kwargs or {})


def _check_adapters(model: nn.Module, args: ContrastivePOConfig) -> None:
    if not isinstance(model, PeftModel) or args.train_text_model:
        return
    text = [n for n, p in model.named_parameters() if p.requires_grad and any(part in n for part in TEXT_TOWER)]
    if text:
        raise ValueError(
            f"{len(text)} trainable parameters of the adapters lie in the text tower (such as {text[0]!r}), which is "
            "frozen. Target the vision tower alone, with target_modules="
            r"r'.*vision_model.*\.(q_proj|v_proj)', or set train_text_model=True."
        )


def load_processor(model: nn.Module, args: ContrastivePOConfig) -> ProcessorMixin:
    """The processor from where the model came from.

    Raises:
        ValueError: There is none.
    """
    name = dual_encoder(model).config.name_or_path
    kwargs = init_kwargs(args.model_init_kwargs)
    try:
        hub = {k: v for k, v in kwargs.items() if k in ("revision", "token")}
        return CLIPProcessor.from_pretrained(name, trust_remote_code=False, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No processor was given, and none can be loaded from {name!r}, where the model came from ({error}). "
            "Pass processing_class=CLIPProcessor.from_pretrained(...)."
        ) from error


def check_processor(processor: Any, model: nn.Module) -> None:
    """Refuse a processor that is none of images and texts, or makes images of another size than the model reads.

    Raises:
        TypeError: No image processor or no tokenizer in it.
        ValueError: Another image size, or more tokens than the model knows.
    """
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise TypeError(
            f"processing_class must be a CLIPProcessor, with an image_processor and a tokenizer, got "
            f"{type(processor).__name__}."
        )
    config = dual_encoder(model).config
    size = image_size(processor)
    if size is not None and size != config.vision_config.image_size:
        raise ValueError(
            f"The processor makes images of {size} pixels, but the model reads {config.vision_config.image_size}. "
            "Load the processor from the same checkpoint as the model."
        )
    if len(processor.tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer knows {len(processor.tokenizer)} tokens, but the model only "
            f"{config.text_config.vocab_size}. Load the processor from the same checkpoint as the model."
        )


def image_size(processor: ProcessorMixin) -> int | None:
    """Height in pixels of the images that a processor makes, None where it does not say."""
    images = processor.image_processor
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    return (size or {}).get("height") or (size or {}).get("shortest_edge")


def crop_side(processor: ProcessorMixin) -> int | None:
    """Side of the square in the middle of an image that a processor shows, None where it shows anything else."""
    images = processor.image_processor
    if not getattr(images, "do_center_crop", False) or not getattr(images, "do_resize", False):
        return None
    sides = {(images.size or {}).get("shortest_edge"), *((images.crop_size or {}).get(n) for n in ("height", "width"))}
    return sides.pop() if len(sides) == 1 else None


def default_output_dir(model: str | os.PathLike[str] | nn.Module) -> str:
    """Where a trainer without arguments writes: the model's name and -PO."""
    name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else dual_encoder(model).config.name_or_path
    return f"{name.rstrip('/').split('/')[-1] or 'clip'}-PO"


def without_new_adapters(reference: nn.Module, peft_config: PeftConfig | None) -> nn.Module:
    """The copy of a model that just got adapters as it was before: with them switched off for good."""
    if peft_config is not None and isinstance(reference, PeftModel):
        reference.base_model.disable_adapter_layers()
    return reference
