"""Inputs of the benchmarks: a CLIP of the real size with random weights, and images with made-up classes."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as Pictures
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.utils import logging

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.models import load_model

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = 49_408
MODEL, IMAGES = "model", "images"
"""Folders created by `write_inputs`."""


def clip_config(quick: bool) -> CLIPConfig:
    """Return CLIPConfig's defaults (ViT-B/32) or, for a quick try, towers of six narrow blocks."""
    if not quick:
        return CLIPConfig()
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 6}
    return CLIPConfig(
        text_config=tower, vision_config={**tower, "image_size": 64, "patch_size": 16}, projection_dim=64
    )


def letter_processor(config: CLIPConfig) -> CLIPProcessor:
    """Return a processor whose tokens are letters, numbered within the model's whole vocabulary.

    A class name of 6 to 8 letters then has 8 to 10 tokens, as "a photo of a {class}" has in CLIP's own tokenizer.
    """
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    vocabulary |= {"<|startoftext|>": VOCABULARY - 2, "<|endoftext|>": VOCABULARY - 1}
    side = config.vision_config.image_size
    return CLIPProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
    )


def class_names(count: int) -> list[str]:
    """Return distinct made-up words of 6 to 8 letters, always the same."""
    rng = random.Random(0)
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(LETTERS, k=rng.randint(6, 8)))] = None
    return list(names)


def write_inputs(folder: Path, rows: int, quick: bool, sides: tuple[int, int] = (320, 240)) -> None:
    """Write a model with its processor, and `rows` JPEG images, into a folder."""
    logging.disable_progress_bar()
    config = clip_config(quick)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder / MODEL)
    letter_processor(config).save_pretrained(folder / MODEL)
    (folder / IMAGES).mkdir()
    for row in range(rows):
        blocks = np.random.default_rng(row).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Pictures.fromarray(blocks).resize(sides, Pictures.Resampling.BICUBIC)
        picture.save(folder / IMAGES / f"{row:06}.jpg", quality=90)


def read_model(folder: Path) -> tuple[CLIPModel, CLIPProcessor]:
    """Load the model and the processor written by `write_inputs`, without progress output."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT reads it
    return load_model(str(folder / MODEL)), CLIPProcessor.from_pretrained(folder / MODEL)


def preferences(
    folder: Path, rows: int, classes: int, redraw: Literal["never", "every_epoch"], first: int = 0
) -> TypographicPreferences:
    """Return preferences of the images written by `write_inputs`, from row `first` on. Files are read row by row."""
    names = class_names(classes)
    paths = [str(folder / IMAGES / f"{row:06}.jpg") for row in range(first, first + rows)]
    dataset = Dataset.from_dict({"image": paths, "label": [row % classes for row in range(rows)]})
    attack = TypographicAttack(words=names, redraw=redraw)
    return TypographicPreferences(dataset.cast_column("image", Image()), attack, names, template="{}")
