"""The architectures of open_clip that CLIPModel can express, as configurations of both libraries.

A key of open_clip's configuration that is not expressed here must have open_clip's default: CLIPModel would compute
something else.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from transformers import CLIPConfig, CLIPModel

from clip_po.bounded_text import parse_json
from clip_po.families import HIGHEST_ENDS
from clip_po.hub.checkpoint_files import LIMITS
from clip_po.validation import COUNT, POSITIVE, check_number

VOCABULARY = 49_408
"""Number of tokens of CLIP's byte-pair encoding, open_clip's default tokenizer. The end of a text is the last one."""

EPS = 1e-5
"""Epsilon of torch's LayerNorm, which open_clip uses unless `norm_kwargs` names another."""

_ACTIVATIONS: Mapping[tuple[bool, str], str] = {
    (True, "none"): "quick_gelu",
    (False, "none"): "gelu",
    (False, "tanh"): "gelu_pytorch_tanh",
}
"""transformers' name of an activation by open_clip's `quick_gelu` and the approximation in `act_kwargs`."""

_EXPRESSED: Mapping[str, frozenset[str]] = {
    "model_cfg": frozenset({"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}),
    "vision_cfg": frozenset(
        {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "norm_kwargs", "act_kwargs"}
    ),
    "text_cfg": frozenset(
        {
            *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs", "act_kwargs"),
            *("pool_type", "eos_id"),
        }
    ),
}
"""Keys that have a counterpart in CLIPConfig."""

_WITHOUT_EFFECT: Mapping[str, frozenset[str]] = {
    "model_cfg": frozenset({"custom_text", "init_logit_scale", "nonscalar_logit_scale"}),
    "vision_cfg": frozenset({"patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads"}),
    "text_cfg": frozenset({"output_tokens", "pad_id", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"}),
}
"""Keys that do not change the embeddings of given pixels and token ids."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "model_cfg": {"init_logit_bias": None},
    "vision_cfg": {"no_ln_pre": False, "pos_embed_type": "learnable", "pool_type": "tok", "timm_model_name": ""},
    "text_cfg": {"proj_type": "linear", "hf_model_name": ""},
}
"""Other keys with a default that is neither None nor False."""

_CLUES: Mapping[str, str] = {
    "hf_model_name": "Its text tower is another model of transformers.",
    "timm_model_name": "Its vision tower is a model of timm. For SigLIP, load google/siglip-* with SiglipModel.",
    "multimodal_cfg": "CoCa has a decoder and an attentional pooler.",
    "init_logit_bias": "CLIPModel has no bias of the logits.",
}


def architecture(name: str) -> dict[str, Any]:
    """Return open_clip's configuration of an architecture.

    Args:
        name: open_clip's name, such as "ViT-B-32" or "ViT-B-32-quickgelu".

    Returns:
        The configuration.

    Raises:
        ValueError: If CLIPModel can't express an architecture of this name, or there is none.
    """
    known = parse_json(files("clip_po").joinpath("assets", "open_clip_architectures.json").read_text())
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0)
        raise ValueError(
            f"The architecture {name!r} is unknown, or CLIPModel can't express it. Did you mean "
            f"{' or '.join(near)}? If it has another name, give the JSON file of open_clip's configuration."
        )
    return known[name]


def clip_config(model_cfg: Mapping[str, Any]) -> CLIPConfig:
    """Convert a configuration of open_clip.

    Args:
        model_cfg: open_clip's configuration of a model, with `embed_dim`, `vision_cfg` and `text_cfg`.

    Returns:
        The configuration of the same CLIPModel.

    Raises:
        ValueError: If CLIPModel can't express it. The message names the key.
    """
    _check_keys(model_cfg, "model_cfg")
    vision, text = (_part(model_cfg, name) for name in ("vision_cfg", "text_cfg"))
    if isinstance(vision.get("layers"), list):
        raise ValueError(
            f"open_clip's vision_cfg has layers={vision['layers']!r}: a ResNet, which CLIPModel can't express. Only "
            "vision transformers can be converted."
        )
    _check_keys(vision, "vision_cfg")
    _check_keys(text, "text_cfg")
    quick = bool(model_cfg.get("quick_gelu", False))
    width, head_width = _size(vision, "width", 768), _size(vision, "head_width", 64)
    projection = _size(model_cfg, "embed_dim", None)
    vocabulary = _size(text, "vocab_size", VOCABULARY, "vocab_size")
    config = CLIPConfig(
        projection_dim=projection,
        vision_config={
            **_tower(vision, width, width // head_width, quick, "vision_cfg"),
            "image_size": _square(vision.get("image_size", 224)),
            "patch_size": _size(vision, "patch_size", 16, "patch_size"),
            "projection_dim": projection,
        },
        text_config={
            **_tower(text, _size(text, "width", 512), _size(text, "heads", 8), quick, "text_cfg"),
            "max_position_embeddings": _size(text, "context_length", 77),
            "vocab_size": vocabulary,
            "projection_dim": projection,
            **_special_tokens(text, vocabulary),
        },
    )
    config.architectures = [CLIPModel.__name__]
    return config


def open_clip_config(config: CLIPConfig, *, named_tokenizer: bool) -> dict[str, Any]:
    """Convert a configuration of transformers.

    Args:
        config: The configuration of a CLIPModel.
        named_tokenizer: Whether open_clip reads the tokenizer from the files of the checkpoint instead of its own.

    Returns:
        open_clip's configuration of the same model, with every key that is not open_clip's default.

    Raises:
        ValueError: If open_clip can't express it. The message names the field.
    """
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act != text.hidden_act:
        raise ValueError(
            f"The towers have the activations {vision.hidden_act!r} and {text.hidden_act!r}, but open_clip's "
            "quick_gelu is one for both. This checkpoint can't be converted."
        )
    known = {name: switches for switches, name in _ACTIVATIONS.items()}
    if vision.hidden_act not in known:
        raise ValueError(
            f"hidden_act={vision.hidden_act!r} has no counterpart in open_clip. Only {sorted(known)} can be converted."
        )
    if vision.num_channels != 3:
        raise ValueError(f"num_channels={vision.num_channels!r}, but open_clip's vision towers read 3.")
    if vision.hidden_size % vision.num_attention_heads:
        raise ValueError(
            f"hidden_size={vision.hidden_size} is no multiple of num_attention_heads={vision.num_attention_heads}."
        )
    quick, approximation = known[vision.hidden_act]
    shared = {} if approximation == "none" else {"act_kwargs": {"approximate": approximation}}
    end = text.vocab_size - 1 if text.eos_token_id == HIGHEST_ENDS else text.eos_token_id
    pooling = {"hf_tokenizer_name": "tokenizer", "pool_type": "eos", "eos_id": end} if named_tokenizer else {}
    return {
        "embed_dim": config.projection_dim,
        **({"quick_gelu": True} if quick else {}),
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            **_open_clip_tower(vision),
            **shared,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
            **_open_clip_tower(text),
            **shared,
            **pooling,
        },
    }


def _part(model_cfg: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = model_cfg.get(name)
    if not isinstance(part, Mapping):
        raise ValueError(f"open_clip's configuration has no {name}, got {part!r}. Give the configuration of a model.")
    return part


def _check_keys(part: Mapping[str, Any], where: str) -> None:
    """Raise if a key that CLIPModel can't express has another value than open_clip's default."""
    for key, value in part.items():
        default = _DEFAULTS[where].get(key)
        if key in _EXPRESSED[where] | _WITHOUT_EFFECT[where] or (value == default if default else not value):
            continue
        raise ValueError(
            f"open_clip's {where} has {key}={value!r}, which CLIPModel can't express.{_clue(key)} Use this checkpoint "
            "with open_clip itself, or choose another one."
        )


def _clue(key: str) -> str:
    return f" {_CLUES[key]}" if key in _CLUES else ""


def _size(part: Mapping[str, Any], key: str, default: int | None, limit: str = "hidden_size") -> int:
    value = part.get(key, default)
    check_number(f"open_clip's {key}", value, COUNT)
    if value > LIMITS[limit]:
        raise ValueError(f"open_clip's {key} is {value:,}, more than {LIMITS[limit]:,}. Correct the configuration.")
    return value


def _square(size: Any) -> int:
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if height != width:
        raise ValueError(
            f"open_clip's vision_cfg has image_size={size!r}, but CLIPModel reads square images only. Choose another "
            "checkpoint."
        )
    return _size({"image_size": height}, "image_size", None, "image_size")


def _tower(part: Mapping[str, Any], width: int, heads: int, quick: bool, where: str) -> dict[str, Any]:
    activation, norm = dict(part.get("act_kwargs") or {}), dict(part.get("norm_kwargs") or {})
    approximation = activation.pop("approximate", "none")
    eps = norm.pop("eps", EPS)
    if activation or norm or (quick, approximation) not in _ACTIVATIONS:
        raise ValueError(
            f"open_clip's {where} has act_kwargs={part.get('act_kwargs')!r} and norm_kwargs="
            f"{part.get('norm_kwargs')!r} with quick_gelu={quick}, which CLIPModel can't express."
        )
    ratio = part.get("mlp_ratio", 4.0)
    for name, number in (("mlp_ratio", ratio), ("norm_kwargs eps", eps)):
        check_number(f"open_clip's {name}", number, POSITIVE)
    if heads < 1 or width % heads:
        raise ValueError(f"open_clip's {where} has width={width}, which {heads} heads can't share equally.")
    return {
        "hidden_size": width,
        "num_hidden_layers": _size(part, "layers", 12, "num_hidden_layers"),
        "num_attention_heads": heads,
        "intermediate_size": int(width * ratio),
        "hidden_act": _ACTIVATIONS[quick, approximation],
        "layer_norm_eps": eps,
    }


def _special_tokens(text: Mapping[str, Any], vocabulary: int) -> dict[str, int]:
    """Return the ids of the special tokens. The embedding of a text is that of its first end-of-text token."""
    pooling = text.get("pool_type", "argmax")
    if pooling not in ("argmax", "eos"):
        raise ValueError(
            f"open_clip's text_cfg has pool_type={pooling!r}, but CLIPModel takes the end-of-text token (argmax or "
            "eos). Use this checkpoint with open_clip itself, or choose another one."
        )
    end = vocabulary - 1 if pooling == "argmax" else text.get("eos_id", HIGHEST_ENDS)
    if end == HIGHEST_ENDS:
        raise ValueError(
            f"open_clip's text_cfg has pool_type='eos' and eos_id={end}, an id for which CLIPModel takes the highest "
            "token instead. MetaCLIP 2 checkpoints are on the Hub as MetaClip2Model: load one of those."
        )
    return {"bos_token_id": max(end - 1, 0), "eos_token_id": end, "pad_token_id": end}


def _open_clip_tower(tower: Any) -> dict[str, Any]:
    width, inner = tower.hidden_size, tower.intermediate_size
    ratio = inner / width
    while int(width * ratio) < inner:  # open_clip rounds down
        ratio = math.nextafter(ratio, math.inf)
    norm = {} if tower.layer_norm_eps == EPS else {"norm_kwargs": {"eps": tower.layer_norm_eps}}
    return {"width": width, "layers": tower.num_hidden_layers, "mlp_ratio": ratio, **norm}
