"""Which classes lost or won, counted by hand."""

import numpy as np
import pytest

from clip_po.evaluation.per_class import class_changes
from clip_po.evaluation.robustness import Answers

LABEL = np.array([0] * 4 + [1] * 5 + [3] * 2)
BEFORE = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 3, 3])
AFTER = np.array([0, 1, 1, 0, 1, 1, 1, 0, 2, 3, 3])


def test_images_lost_and_won_by_class():
    """Of four cats, two are lost and one is won; of five dogs, one is won; ships keep both; no bird has an image."""
    answers = Answers.about_clean(("cat", "dog", "bird", "ship"), LABEL, {"base": BEFORE, "aligned": AFTER})
    found = class_changes(answers, "base", "aligned", resamples=500)
    plain = [(c.name, c.images, c.before, c.after, c.lost, c.won) for c in found]
    assert plain == [
        ("cat", 4, 0.75, 0.5, 2, 1),
        ("ship", 2, 1.0, 1.0, 0, 0),
        ("dog", 5, 0.4, pytest.approx(0.6), 0, 1),
    ]
    assert [change.cost.value for change in found] == pytest.approx([25, 0, -20])
    cat, ship = found[0].cost, found[1].cost
    assert (cat.low, cat.high) == (-50, 100)  # of all 256 draws of +100, +100, 0 and -100, 5 have a mean below -50
    assert (ship.low, ship.high) == (0, 0)


def test_classes_of_one_name_are_told_apart():
    predicted = {"base": np.array([0, 0]), "aligned": np.array([0, 0])}
    answers = Answers.about_clean(("missile", "missile"), np.array([0, 1]), predicted)
    found = class_changes(answers, "base", "aligned", resamples=2)
    assert [change.name for change in found] == ["missile", "missile (class 1)"]
