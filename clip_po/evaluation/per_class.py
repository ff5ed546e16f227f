"""Which classes a model has lost or won against its base."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clip_po.evaluation.bootstrap import Estimate, bootstrap_interval
from clip_po.evaluation.class_doubles import unique_keys
from clip_po.evaluation.robustness import Answers


@dataclass(frozen=True)
class ClassChange:
    """How the accuracy on one class has changed.

    Attributes:
        name: Name of the class; with its number if another class has the same name.
        images: Number of its images.
        before: Share of its images that the base classifies correctly, 0..1.
        after: The same for the other model.
        lost: Number of images that only the base classifies correctly.
        won: Number of images that only the other model classifies correctly.
        cost: 100 (before - after), in percentage points, with an interval over the images of the class.
    """

    name: str
    images: int
    before: float
    after: float
    lost: int
    won: int
    cost: Estimate


def class_changes(
    answers: Answers, before: str, after: str, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> list[ClassChange]:
    """Compare two models on each class of clean images.

    Args:
        answers: Answers to the variant "clean".
        before: Name of the base.
        after: Name of the other model.
        confidence: As for `bootstrap_interval`.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        One change per class that has images, those that lost most first.

    Raises:
        ValueError: If there are no answers of one of the models.
    """
    was, now = (answers.predictions_of(model)["clean"] == answers.label for model in (before, after))
    names = unique_keys(answers.class_names)
    found = []
    for number in np.unique(answers.label):
        rows = answers.label == number
        columns = {"before": was[rows], "after": now[rows]}
        cost = bootstrap_interval(
            lambda means: 100 * (means["before"] - means["after"]), columns, None, confidence, resamples, seed
        )
        found.append(
            ClassChange(
                names[number],
                int(rows.sum()),
                float(was[rows].mean()),
                float(now[rows].mean()),
                int((rows & was & ~now).sum()),
                int((rows & now & ~was).sum()),
                cost,
            )
        )
    return sorted(found, key=lambda change: (-change.cost.value, change.name))
