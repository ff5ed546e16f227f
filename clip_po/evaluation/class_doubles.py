"""Classes that share a text, as in the published lists of ImageNet names: each counts by its own position.

Published zero-shot numbers were made with such lists: the prediction is the position of the highest logit, and of
equal logits the first. So the images of the second class of a shared text count as wrong.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)


def first_alike(text_embeds: Tensor) -> Tensor:
    """Return the first class with the same embedding as each class, which is what a prediction counts as.

    Equal columns of a product of matrices may differ in their last bits, so the argmax alone is not the first.

    Args:
        text_embeds: Tensor[C, D].

    Returns:
        Tensor[C] of classes, int64, on the device of the embeddings.
    """
    _, group = torch.unique(text_embeds, dim=0, return_inverse=True)
    numbers = torch.arange(len(group), device=group.device)
    first = numbers.new_full((len(group),), len(group)).scatter_reduce(0, group, numbers, "amin")
    return first[group]


def unique_keys(class_names: Sequence[str]) -> list[str]:
    """Return the names of classes as keys: a name that occurs again gets the number of its class.

    Args:
        class_names: C names.

    Returns:
        C different names, such as "missile" and "missile (class 744)".
    """
    seen: set[str] = set()
    keys = []
    for number, name in enumerate(class_names):
        keys.append(f"{name} (class {number})" if name in seen else name)
        seen.add(name)
    return keys


def spaced_apart(class_names: Sequence[str]) -> list[str]:
    """Return names that a `datasets.ClassLabel` accepts: a name that occurs again ends in spaces.

    The tokenizer ignores these spaces, so prompts keep their token ids.

    Args:
        class_names: C names.

    Returns:
        C different names.
    """
    found: dict[str, None] = {}
    for name in class_names:
        while name in found:
            name += " "
        found[name] = None
    return list(found)


def say_doubles(class_names: Sequence[str], identities: Sequence[Hashable]) -> None:
    """Warn of classes that the model can't tell apart.

    Args:
        class_names: C names.
        identities: For each class what is the same for two classes with the same prompts.
    """
    classes: dict[Hashable, list[int]] = {}
    for number, known in enumerate(identities):
        classes.setdefault(known, []).append(number)
    doubles = [numbers for numbers in classes.values() if len(numbers) > 1]
    if doubles:
        logger.warning(
            f"{len(doubles)} prompts stand for several classes each, such as {class_names[doubles[0][0]]!r} for the "
            f"classes {doubles[0]}. Each class counts by its position, and a tie goes to the first one, as in "
            "published evaluations."
        )
