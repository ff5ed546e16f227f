"""A tiny random model of every supported two-tower architecture, with its processor."""

from pathlib import Path

import torch
import transformers
from samples import IMAGE_SIZE
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
PIXELS = {"image_size": IMAGE_SIZE, "patch_size": 8}
LIMIT = 24
"""Tokens that the text towers read."""


def _words(length, **positions):
    return {**TOWER, "vocab_size": 64, "max_position_embeddings": length, **positions}


BERT = {**_words(LIMIT), "pad_token_id": 0, "hidden_dropout_prob": 0.1}
ROBERTA = {**_words(LIMIT + 2), "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
ALIGN_VISION = {
    "image_size": IMAGE_SIZE,
    "hidden_dim": 16,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "kernel_sizes": [3, 3],
    "in_channels": [8, 16],
    "out_channels": [16, 16],
    "strides": [2, 1],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
}

# Class, and arguments of its configuration.
ARCHITECTURES = {
    "clip": ("CLIP", {"text_config": _words(LIMIT, eos_token_id=3), "vision_config": {**TOWER, **PIXELS}}),
    "siglip": ("Siglip", {"text_config": _words(LIMIT), "vision_config": {**TOWER, **PIXELS}}),
    "siglip2": (
        "Siglip2",
        {"text_config": _words(LIMIT), "vision_config": {**TOWER, "patch_size": 8, "num_patches": 16}},
    ),
}
KINDS = list(ARCHITECTURES)


def tiny_tokenizer(first_special: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer of letters: `<pad>`, `<unk>`, `<bos>` and `<eos>` around the text, in lower case."""
    special = ["<pad>", "<unk>", "<bos>", "<eos>"]
    if first_special:  # RoBERTa pads with 1
        special = ["<unk>", "<pad>", "<bos>", "<eos>"]
    letters = [" ", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({t: n for n, t in enumerate([*special, *letters])}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "bos", "eos")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LIMIT, **names)


def _processor(kind: str):
    tokenizer = tiny_tokenizer(kind in ("altclip",))
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if kind == "siglip":
        return transformers.SiglipProcessor(transformers.SiglipImageProcessorPil(size=side), tokenizer)
    if kind == "siglip2":
        images = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
        return transformers.Siglip2Processor(images, tokenizer)
    images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)
    return getattr(transformers, f"{ARCHITECTURES[kind][0]}Processor")(images, tokenizer)


def tiny_dual_encoder(kind: str, folder: Path) -> Path:
    """Save a tiny model of a supported `model_type`, with its processor.

    Args:
        kind: A key of `ARCHITECTURES`.
        folder: Where to save it.

    Returns:
        The folder.
    """
    name, arguments = ARCHITECTURES[kind]
    torch.manual_seed(0)
    if kind not in ("siglip", "siglip2"):
        arguments = {"projection_dim": 16, **arguments}
    config = getattr(transformers, f"{name}Config")(**arguments)
    model = getattr(transformers, f"{name}Model")(config)
    if kind in ("siglip", "siglip2"):  # far from 0, so that a forgotten bias or scale shows
        model.logit_scale.data.fill_(2.0)
        model.logit_bias.data.fill_(-3.0)
    model.save_pretrained(folder)
    _processor(kind).save_pretrained(folder)
    return folder
