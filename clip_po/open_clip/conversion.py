"""Convert a whole checkpoint: weights, configuration, tokenizer and preprocessing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerBase

from clip_po.families import HIGHEST_ENDS
from clip_po.hub.checkpoint_files import check_files
from clip_po.models import check_processor, load_any, read_processor
from clip_po.open_clip.architecture import VOCABULARY, clip_config, open_clip_config
from clip_po.open_clip.checkpoint import CONFIG_FILE, WEIGHTS_FILES, read_config, read_weights, weights_file
from clip_po.open_clip.preprocessing import image_processor, preprocess_cfg
from clip_po.open_clip.weights import to_open_clip as open_clip_weights
from clip_po.open_clip.weights import to_transformers
from clip_po.validation import check_writable

TOKENIZER = "openai/clip-vit-base-patch32"
"""A checkpoint with CLIP's byte-pair encoding, which is open_clip's default tokenizer."""


def from_open_clip(
    checkpoint: str, output_dir: str, arch: str | None = None, tokenizer: str | None = None
) -> CLIPModel:
    """Convert a checkpoint of open_clip to transformers, with processor.

    Args:
        checkpoint: File of the weights (`.safetensors`, `.pt` or `.bin`), or folder with `open_clip_model.safetensors`
            or `open_clip_pytorch_model.bin`.
        output_dir: Where the CLIPModel and its CLIPProcessor are written. An empty or new folder.
        arch: open_clip's name of the architecture, such as "ViT-B-32-quickgelu", or the JSON file of its
            configuration. Default: `open_clip_config.json` beside the weights.
        tokenizer: Folder or Hub id of a tokenizer. Default: the tokenizer files beside the weights, else CLIP's own
            from `openai/clip-vit-base-patch32`.

    Returns:
        The model, in the dtype of the checkpoint and in evaluation mode.

    Raises:
        ValueError: If CLIPModel can't express the architecture, or the weights or the tokenizer do not belong to it.
            The message names the key.
        OSError: If there is no tokenizer, or `output_dir` can't be written to.

    Source: Ilharco et al. 2021, OpenCLIP, https://github.com/mlfoundations/open_clip.
    """
    _check_empty(output_dir)
    file = weights_file(checkpoint)
    model_cfg, preprocessing = read_config(file, arch)
    config = clip_config(model_cfg)
    words = _tokenizer(tokenizer or _beside(file), config)
    images = image_processor(preprocessing, config.vision_config.image_size)
    weights = to_transformers(read_weights(file), config)
    _check_shapes({name: tuple(weight.shape) for name, weight in weights.items()}, config)
    config.dtype = weights["visual_projection.weight"].dtype
    model = CLIPModel.from_pretrained(None, config=config, state_dict=weights, dtype=config.dtype)
    model.save_pretrained(output_dir)
    CLIPProcessor(image_processor=images, tokenizer=words).save_pretrained(output_dir)
    return model


def to_open_clip(checkpoint: str, output_dir: str) -> dict[str, Any]:
    """Convert a checkpoint of transformers to open_clip, with tokenizer and preprocessing. Adapters are merged.

    Args:
        checkpoint: Folder or Hub id of a CLIPModel or of its adapters, with processor.
        output_dir: Where `open_clip_model.safetensors`, `open_clip_config.json` and the tokenizer are written. An
            empty or new folder. open_clip loads it as `local-dir:FOLDER`.

    Returns:
        The configuration that was written.

    Raises:
        ValueError: If open_clip can't express the model or its preprocessing. The message names the field.
        TypeError: If the model is not a CLIPModel.
        OSError: If there is no model or processor, or `output_dir` can't be written to.

    Source: Ilharco et al. 2021, OpenCLIP, https://github.com/mlfoundations/open_clip.
    """
    _check_empty(output_dir)
    processor = read_processor(checkpoint)
    model = load_any(checkpoint)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    if not isinstance(model, CLIPModel):
        raise TypeError(
            f"{checkpoint!r} is a {type(model).__name__}, but only a CLIPModel can be converted to open_clip. Give "
            "another checkpoint."
        )
    words, text = processor.tokenizer, model.config.text_config
    check_processor(processor, model)
    own = text.eos_token_id in (HIGHEST_ENDS, VOCABULARY - 1) and len(words) == text.vocab_size == VOCABULARY
    written = {
        "model_cfg": open_clip_config(model.config, named_tokenizer=not own),
        "preprocess_cfg": preprocess_cfg(processor.image_processor, model.config.vision_config.image_size),
    }
    weights = open_clip_weights(model.state_dict(), model.config)
    save_file(weights, Path(output_dir, WEIGHTS_FILES[0]), metadata={"format": "pt"})
    words.save_pretrained(output_dir)
    Path(output_dir, CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n")
    return written


def _check_empty(folder: str) -> None:
    check_writable(folder)
    if found := sorted(os.listdir(folder)):
        raise ValueError(f"output_dir {folder!r} holds {found[0]}, and maybe more. Choose an empty or new folder.")


def _beside(weights: Path) -> str:
    known = any((weights.parent / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return str(weights.parent) if known else TOKENIZER


def _tokenizer(name: str, config: CLIPConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, and enter its special tokens into the configuration."""
    check_files(name)
    try:
        found = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise OSError(
            f"There is no tokenizer in {name!r} ({str(error).splitlines()[0]}). Give the folder of one with "
            "--tokenizer: any CLIP checkpoint has it, if open_clip's own is meant."
        ) from error
    text = config.text_config
    if found.eos_token_id != text.eos_token_id or len(found) > text.vocab_size:
        raise ValueError(
            f"The tokenizer of {name!r} has {len(found):,} tokens and ends a text with {found.eos_token_id}, but the "
            f"text tower of the checkpoint has {text.vocab_size:,} and reads {text.eos_token_id} as the end. Give the "
            "tokenizer of this checkpoint with --tokenizer."
        )
    found.model_max_length = text.max_position_embeddings
    text.bos_token_id, text.pad_token_id = found.bos_token_id, found.pad_token_id
    return found


def _check_shapes(shapes: dict[str, tuple[int, ...]], config: CLIPConfig) -> None:
    """Raise if weights have other shapes than those of the model, before it takes memory."""
    with torch.device("meta"):
        wanted = {name: tuple(weight.shape) for name, weight in CLIPModel(config).state_dict().items()}
    other = sorted(name for name, shape in wanted.items() if shapes[name] != shape)
    if other:
        raise ValueError(
            f"The weights do not belong to the architecture: {len(other)} have other shapes, such as {other[0]} with "
            f"{list(shapes[other[0]])} in place of {list(wanted[other[0]])}. Give the architecture of this checkpoint."
        )
