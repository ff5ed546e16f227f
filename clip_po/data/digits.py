"""The embedded dataset of the demo: handwritten digits on paper, and the words that attack them."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.fonts import PILLOW_FONT, font_files

if TYPE_CHECKING:
    from datasets import Dataset

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The classes, and the attack words."""

PROMPT_TEMPLATE = "a photo of the number {}"
"""Prompt of a class, to be filled with one of `DIGIT_NAMES`."""

IMAGE_SIDE = 48
"""Width and height of a rendering in pixels, the input size of the embedded model."""

MODEL_PATH = Path(__file__).parents[1] / "assets" / "digits-clip"
"""Folder of the embedded model: `CLIPModel.from_pretrained(MODEL_PATH)`."""

_ATTACKS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "training": (("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique"), ("top-left", "bottom", "bottom-right")),
    "unseen": (
        ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold"),
        ("top", "top-right", "bottom-left"),
    ),
}
"""Fonts (from matplotlib) and places of each attack."""

_PER_CLASS = {"test": 50, "validation": 30}  # handwritten digits of each class; the rest is for training
_LARGEST_VALUE = 16  # of a pixel in the table


@functools.cache
def digits_table() -> tuple[np.ndarray, np.ndarray]:
    """Load the handwritten digits that come with scikit-learn.

    Returns:
        pixels (float32[1797, 8, 8]): ink, 0 (none) to 1.
        labels (int64[1797]): 0..9.

    Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI, its test part.
    """
    from sklearn.datasets import load_digits

    table = load_digits()
    pixels, labels = (table.images / _LARGEST_VALUE).astype(np.float32), table.target.astype(np.int64)
    for array in (pixels, labels):
        array.setflags(write=False)  # one copy serves every caller
    return pixels, labels


@functools.cache
def _split() -> dict[str, tuple[int, ...]]:
    _, labels = digits_table()
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for label in range(len(DIGIT_NAMES)):
        ids = np.flatnonzero(labels == label).tolist()
        random.Random(f"split/{label}").shuffle(ids)
        start = 0
        for name, count in _PER_CLASS.items():
            parts[name] += ids[start : start + count]
            start += count
        parts["train"] += ids[start:]
    return {name: tuple(sorted(ids)) for name, ids in parts.items()}


def split_digits() -> dict[str, list[int]]:
    """Return the split of the handwritten digits, shared by the pretraining of the embedded model and the demo.

    Returns:
        Ids of handwritten digits (0..1796), ascending, each in one part: "train" (997), "validation" (30 of each
        class, to choose between methods) and "test" (50 of each class, never trained on).
    """
    return {name: list(ids) for name, ids in _split().items()}


def render_digit(
    pixels: np.ndarray,
    key: str,
    side: int = IMAGE_SIDE,
    size: tuple[float, float] = (0.46, 0.56),
    rotation: float = 8.0,
    shear: float = 0.1,
) -> Image.Image:
    """Draw a handwritten digit on a sheet of paper, small enough that a word fits beside it.

    Args:
        pixels: float[8, 8], ink, 0..1.
        key: Seed of the rendering: the same key gives the same place, size, slant and colours.
        side: Width and height of the result in pixels.
        size: Lowest and highest height of the digit as a share of `side`.
        rotation: Largest angle in degrees, either way.
        shear: Largest slant, either way, as a share of the height.

    Returns:
        RGB image, `side` by `side`.
    """
    rng = random.Random(key)
    paper = tuple(rng.randint(200, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 110) for _ in range(3))
    cell = rng.uniform(*size) * side / 8  # pixels of the rendering per pixel of the table
    aspect = rng.uniform(0.9, 1.1)
    angle, slant = math.radians(rng.uniform(-rotation, rotation)), rng.uniform(-shear, shear)
    free = side - 8 * cell
    x, y = (4 * cell + rng.random() * free for _ in range(2))  # the digit's centre
    gain = rng.uniform(1.3, 1.9)  # turns the blur of enlarging into a pen's stroke

    # Pillow needs, for each pixel of the result, its place in the source.
    sine, cosine = math.sin(angle) / cell, math.cos(angle) / cell
    a, b = (cosine + slant * sine) / aspect, (sine - slant * cosine) / aspect
    c, d = -sine, cosine
    matrix = (a, b, 5 - a * x - b * y, c, d, 5 - c * x - d * y)
    source = np.pad(pixels * 255, 1).astype(np.uint8)  # with a margin, so that no stroke ends abruptly
    mask = Image.fromarray(source).transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    mask = mask.point([round(min(255, max(0, (ink_value - 115) * gain + 115))) for ink_value in range(256)])
    image = Image.new("RGB", (side, side), paper)
    image.paste(ink, (0, 0), mask)
    return image


def load_digits_dataset(split: str, renderings: int = 1, seed: int = 0) -> Dataset:
    """Render the handwritten digits of one part of the split.

    Args:
        split: "train", "validation" or "test".
        renderings: Number of renderings of each digit, >= 1.
        seed: Seed of all renderings.

    Returns:
        Dataset with the columns image (RGB, `IMAGE_SIDE` square), label (ClassLabel of `DIGIT_NAMES`) and digit (id of
        the handwritten digit, 0..1796: the cluster of a bootstrap). All digits come once, then again.

    Raises:
        ValueError: If the split is unknown, or `renderings` < 1.
    """
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    parts = split_digits()
    if split not in parts:
        raise ValueError(f"split must be one of {sorted(parts)}, got {split!r}.")
    if renderings < 1:
        raise ValueError(f"renderings must be a whole number >= 1, got {renderings!r}.")
    pixels, labels = digits_table()
    digits = parts[split] * renderings
    images = [
        render_digit(pixels[digit], f"{seed}/{digit}/{row // len(parts[split])}") for row, digit in enumerate(digits)
    ]
    features = Features(
        {"image": ImageFeature(), "label": ClassLabel(names=list(DIGIT_NAMES)), "digit": Value("int32")}
    )
    return Dataset.from_dict(
        {"image": images, "label": [int(labels[digit]) for digit in digits], "digit": digits},
        features=features,
    )


def digit_attack(settings: str = "training", seed: int = 0) -> TypographicAttack:
    """Return the attack that writes the name of another number on a digit.

    Args:
        settings: "training", or "unseen" for fonts that neither the pretraining nor the training attack uses, at
            places where the training attack does not write.
        seed: Seed of all draws.

    Returns:
        The attack. It writes upright words without outline or sticker, for images of `IMAGE_SIDE` pixels.

    Raises:
        ValueError: If the settings are unknown.
    """
    if settings not in _ATTACKS:
        raise ValueError(f"settings must be one of {sorted(_ATTACKS)}, got {settings!r}.")
    fonts, places = _ATTACKS[settings]
    return TypographicAttack(
        words=DIGIT_NAMES,
        fonts=(PILLOW_FONT, *font_files(fonts)) if settings == "training" else font_files(fonts),
        size=(0.22, 0.28),
        places=places,
        outline=(0.0, 0.0),
        rotation=(0.0, 0.0),
        sticker=0.0,
        min_contrast=3.0,
        min_side=IMAGE_SIDE,
        seed=seed,
    )
