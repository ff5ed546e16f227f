"""The pairs of benchmarks/feedback.py are as true as they claim."""

import random
import runpy
from pathlib import Path

import datasets
import numpy as np
import pytest
from samples import picture

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "feedback.py"))
NAMES = ["cat", "dog", "car", "truck"]


@pytest.fixture(scope="module")
def rows():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    columns = {"image": [picture(n) for n in range(12)], "label": [n % 4 for n in range(12)]}
    return datasets.Dataset.from_dict(columns, features=features)


def classes_of(image):
    """The classes of the rows with this image."""
    return {NAMES[number % 4] for number in range(12) if image.tobytes() == picture(number).tobytes()}


def test_the_rejected_image_shows_the_class_that_it_is_taken_for(rows):
    for row in BENCHMARK["class_pairs"](rows, random.Random(0)):
        name = row["text"].removeprefix("a photo of a ")
        assert classes_of(row["chosen_image"]) == {name}
        assert classes_of(row["rejected_image"]) == {BENCHMARK["TAKEN_FOR"][name]}


def test_the_worse_image_is_another_one_of_the_class_with_less_to_see(rows):
    for row in BENCHMARK["sharpness_pairs"](rows, random.Random(0)):
        name = row["text"].removeprefix("a photo of a ")
        assert classes_of(row["chosen_image"]) == {name}
        assert classes_of(row["rejected_image"]) == set()
        shown = np.asarray(row["rejected_image"], float)
        others = [np.asarray(picture(n), float) for n in range(12) if NAMES[n % 4] == name]
        nearest = min(others, key=lambda pixels: np.abs(pixels - shown).mean())
        assert shown.std() < nearest.std()
        assert not np.array_equal(nearest, np.asarray(row["chosen_image"], float))


def test_half_of_the_texts_are_right(rows):
    found = BENCHMARK["unpaired"](datasets.concatenate_datasets([rows] * 10), random.Random(0))
    assert 40 <= sum(found["label"]) <= 80
    for row in found:
        assert (f"a photo of a {next(iter(classes_of(row['image'])))}" == row["text"]) == row["label"]


def test_both_directions_are_in_the_mixture(rows):
    found = BENCHMARK["both_directions"](datasets.concatenate_datasets([rows] * 2), random.Random(0))
    assert [row["chosen"] is not None for row in found] == [True] * 12 + [False] * 12
    assert [row["chosen_image"] is not None for row in found] == [False] * 12 + [True] * 12
