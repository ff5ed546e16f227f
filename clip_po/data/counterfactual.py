"""Counterfactual targets: an image should be answered as the reference answers a counterpart of another group.

If each face of a man is to be answered as the face of a woman, and the reverse, over texts that name no gender, the
answers change sides. A scale between the original and the trained model then answers both alike. The other groups of
the data, such as race and age, can be kept equal between an image and its counterpart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from clip_po.validation import NOT_NEGATIVE, check_candidates, check_number


def counterparts(groups: Sequence[Any] | np.ndarray, alike: Sequence[Any] | np.ndarray, seed: int = 0) -> np.ndarray:
    """Draw for each image another one of a different group that is alike otherwise.

    Args:
        groups: N groups, names or numbers, of the attribute that differs.
        alike: N names or numbers that are the same for an image and its counterpart, such as race with decade of age.
        seed: Seed of the draws.

    Returns:
        Array [N] of positions; -1 for an image that has no counterpart.

    Raises:
        ValueError: If there are fewer than two groups, or not one of `alike` for each image.
    """
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"groups must hold at least two different ones, got {names.tolist()}.")
    kind = np.unique(np.asarray(alike), return_inverse=True)[1]
    if kind.shape != group.shape:
        raise ValueError(f"alike must have an entry for each of the {len(group)} images, got {len(kind)}.")
    draw = np.random.default_rng(seed)
    found = np.full(len(group), -1)
    for number, like in {*zip(group.tolist(), kind.tolist(), strict=True)}:
        others = np.flatnonzero((group != number) & (kind == like))
        own = np.flatnonzero((group == number) & (kind == like))
        if len(others):
            found[own] = draw.choice(others, len(own))
    return found


def counterfactual_rows(
    images: Dataset, targets: Sequence[int] | np.ndarray, texts: Sequence[str], weight: float = 1.0
) -> Dataset:
    """Make rows for the loss "distillation" whose soft targets are the reference's answers on other images.

    Args:
        images: N images in a column `image`.
        targets: For each of them, the position of the image whose answer is the target: a counterpart, to change the
            answer, or the image itself, to keep it. Images with a negative position are left out.
        texts: The texts among which the model chooses.
        weight: Weight of the rows, >= 0.

    Returns:
        At most N rows: image, clean_image (the target's), chosen (not read by this loss), candidates and weight. Rows
        of several kinds can be joined with `datasets.concatenate_datasets`.

    Raises:
        TypeError: If `weight` is not a number.
        ValueError: If there is no column `image`, not one target for each image, a text is empty or given twice, or
            `weight` is negative.
    """
    check_candidates(list(texts), "texts")
    check_number("weight", weight, NOT_NEGATIVE)
    places = np.asarray(targets)
    if "image" not in images.column_names or len(places) != len(images):
        raise ValueError(
            f"Expected a column 'image' and a target for each of the {len(images)} images, got the columns "
            f"{images.column_names} and {len(places)} targets."
        )
    pixels, kept = images.select_columns(["image"]), np.flatnonzero(places >= 0)
    features: Mapping[str, Any] = {
        "chosen": Value("string"),
        "candidates": List(Value("string")),
        "weight": Value("float64"),
    }
    columns = {
        "chosen": [texts[0]] * len(kept),
        "candidates": [list(texts)] * len(kept),
        "weight": [float(weight)] * len(kept),
    }
    return concatenate_datasets(
        [
            pixels.select(kept),
            pixels.select(places[kept]).rename_column("image", "clean_image"),
            Dataset.from_dict(columns, features=Features(features)),
        ],
        axis=1,
    )
