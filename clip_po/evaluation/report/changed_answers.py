"""Clean images of other tasks whose answer has changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from clip_po.evaluation.report.before_after import Gallery, draw_examples
from clip_po.evaluation.robustness import Answers


def changed_answers(answers: Answers, before: str, after: str) -> dict[str, np.ndarray]:
    """Find the clean images that two models answer differently.

    Args:
        answers: Answers to the variant "clean".
        before: Name of the model before alignment.
        after: Name of the model after alignment.

    Returns:
        Array of item indices for each of `CHANGES`, newly broken ones first. "Still wrong" are images with another
        wrong answer than before.

    Raises:
        ValueError: If `answers` has no model of that name.
    """
    was, now = (answers.predictions_of(model)["clean"] for model in (before, after))
    right, changed = answers.label, was != now
    kinds = {
        "newly broken": was == right,
        "fixed": now == right,
        "still wrong": (was != right) & (now != right),
    }
    return {name: np.flatnonzero(changed & chosen) for name, chosen in kinds.items()}


def changed_answers_gallery(
    answers: Answers,
    before: str,
    after: str,
    name: str,
    picture: Callable[[int], Image.Image],
    count: int = 12,
    seed: int = 0,
) -> Gallery | None:
    """Choose images whose answer has changed at random: mostly newly broken ones, and a few of the others.

    Args:
        answers: As in `changed_answers`.
        before: As in `changed_answers`.
        after: As in `changed_answers`.
        name: Name of the set in the heading.
        picture: Function that returns an image by its index.
        count: Largest number of images, >= 1.
        seed: Seed of the choice.

    Returns:
        The gallery; None if no answer has changed.

    Raises:
        ValueError: As in `changed_answers`, or if `count` < 1.
    """
    kinds = changed_answers(answers, before, after)
    examples = draw_examples(answers, before, after, "clean", kinds, count, seed)
    if not examples:
        return None
    counts = {kind: len(found) for kind, found in kinds.items()}
    listed = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    same = len(answers.label) - sum(counts.values())
    note = f"Of {len(answers.label):,} images of {name}: {listed} with another answer, {same:,} with the same answer."
    return Gallery(f"Changed answers: {name}", note, examples, picture)
