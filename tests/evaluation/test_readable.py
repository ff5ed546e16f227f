"""on_bad_image="skip" in evaluations: the same as without the rows whose images can't be read, which are counted."""

import datasets
import numpy as np
import pytest
from samples import CLASSES, make_labelled
from streaming_worker import BROKEN, with_broken

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.evaluation import (
    DriftEvaluator,
    RetentionEvaluator,
    RetentionSet,
    RetrievalEvaluator,
    RobustnessEvaluator,
    RobustnessImages,
    ZeroShotEvaluator,
    evaluate_fairness,
    readable_rows,
)
from clip_po.validation import UnreadableImage

PROMPT = ["a photo of a {}"]
ATTACK = TypographicAttack(CLASSES, min_side=32)
BAD = {1, 6}
GOOD = [row for row in range(9) if row not in BAD]


def make_rows():
    rows = make_labelled(9).add_column("caption", [[f"a {CLASSES[row % 4]}", f"dog {row}"] for row in range(9)])
    return rows.add_column("group", ["man", "woman", "woman"] * 3)


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def broken():
    return with_broken(make_rows(), BAD)


@pytest.fixture
def models(model, other_model):
    return {"base": model, "aligned": other_model}


def zero_shot(rows, processor, **arguments):
    return ZeroShotEvaluator(rows, processor, PROMPT, resamples=20, **arguments)


def retrieval(rows, processor, **arguments):
    return RetrievalEvaluator(rows, processor, resamples=20, **arguments)


def robustness(rows, processor, **arguments):
    images = RobustnessImages(rows, ATTACK, processor, renderings=2, **arguments)
    return RobustnessEvaluator(images, PROMPT, resamples=20)


def drift(rows, processor, **arguments):
    return DriftEvaluator(rows, processor, ["a cat", "a dog", "the sea"], resamples=20, **arguments)


def retention(rows, processor, **arguments):
    return RetentionEvaluator({"rows": RetentionSet(rows, PROMPT)}, processor, resamples=20, **arguments)


EVALUATORS = [zero_shot, retrieval, robustness, drift, retention]


def skipped_rows(evaluator):
    return getattr(evaluator, "images", evaluator).skipped_rows


@pytest.mark.parametrize("make", EVALUATORS)
def test_evaluators_measure_the_other_rows_and_count(make, rows, broken, models, processor):
    found = make(broken, processor, on_bad_image="skip")
    assert skipped_rows(found) == 2
    expected = make(rows.select(GOOD), processor)
    assert skipped_rows(expected) == 0
    assert found(models, "base", disable_tqdm=True) == expected(models, "base", disable_tqdm=True)


@pytest.mark.parametrize("make", EVALUATORS)
def test_by_default_evaluators_stop_and_another_word_is_refused(make, broken, models, processor):
    with pytest.raises(UnreadableImage, match="Row 1"):
        make(broken, processor)(models, disable_tqdm=True)
    with pytest.raises(ValueError, match="on_bad_image must be 'raise' or 'skip', got 'ignore'"):
        make(broken, processor, on_bad_image="ignore")


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_left_out_for_any_evaluation(workers, rows, broken, models, processor, caplog):
    kept = readable_rows(broken, num_workers=workers, disable_tqdm=True)
    assert kept["label"][:] == rows.select(GOOD)["label"][:]
    assert "2 of 9 rows are skipped" in caplog.text
    assert "Row 1: the image in column 'image' can't be read" in caplog.text
    arguments = {"base": "base", "resamples": 2, "disable_tqdm": True}
    found, expected = (
        evaluate_fairness(models, processor, part, "group", ["a doctor", "a nurse"], ks=[2], **arguments)
        for part in (kept, rows.select(GOOD))
    )
    np.testing.assert_equal(found, expected)


def test_nothing_is_copied_or_said_where_every_image_can_be_read(rows, caplog):
    assert readable_rows(rows, disable_tqdm=True) is rows
    assert readable_rows(with_broken(rows, BAD), on_bad_image="raise") is not None
    assert not caplog.records


@pytest.mark.parametrize("image", [BROKEN, None])
def test_a_dataset_without_a_readable_image_says_why(image):
    features = make_labelled(1).features
    nothing = datasets.Dataset.from_dict({"image": [image] * 2, "label": [0, 1]}, features=features)
    with pytest.raises(ValueError, match=r"None of the 2 images can be read\. Row 0: .*'image'"):
        readable_rows(nothing, disable_tqdm=True)
