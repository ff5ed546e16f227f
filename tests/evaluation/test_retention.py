"""Accuracy and its cost on several sets, against answers counted by hand."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features

from clip_po.evaluation.retention import RetentionEvaluator, RetentionSet
from clip_po.evaluation.zero_shot import class_embeddings, classify, zero_shot_accuracy

TEMPLATES = ["a photo of a {}", "the {}"]


@pytest.fixture
def models(model, other_model):
    return {"base": model, "aligned": other_model}


@pytest.fixture
def sets(dataset):
    """13 images of three classes, and 5 of them under four other names and columns."""
    few = dataset.select(range(5)).rename_columns({"image": "photo", "label": "what"})
    few = few.cast_column("what", ClassLabel(names=["x", "y", "z", "w"]))
    names = ["tree", "house", "sea", "river"]
    return {"many": RetentionSet(dataset), "few": RetentionSet(few, TEMPLATES, names, "photo", "what")}


def right(model, processor, dataset, names, templates, columns):
    """Whether each image is nearest to the prompts of its class."""
    image, label = columns
    pixels = processor.image_processor([row[image] for row in dataset], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        nearest = classify(model, pixels, class_embeddings(model, processor, names, templates)).argmax(1)
    return [answer == row[label] for answer, row in zip(nearest.tolist(), dataset, strict=True)]


def test_accuracy_and_cost_of_each_set_and_their_mean(models, processor, sets):
    found = RetentionEvaluator(sets, processor, resamples=200)(models, "base", disable_tqdm=True)
    share = {}
    for name, model in models.items():
        many = right(model, processor, sets["many"].dataset, ["cat", "dog", "car"], TEMPLATES[:1], ("image", "label"))
        few = right(model, processor, sets["few"].dataset, sets["few"].class_names, TEMPLATES, ("photo", "what"))
        share[name] = {"many": sum(many) / 13, "few": sum(few) / 5}
        for part, accuracy in share[name].items():
            assert found[name][f"{part}: accuracy"].value == pytest.approx(accuracy)
        assert found[name]["accuracy"].value == pytest.approx((share[name]["many"] + share[name]["few"]) / 2)
    costs = {part: 100 * (share["base"][part] - share["aligned"][part]) for part in sets}
    assert costs["many"] != costs["few"]
    for part, cost in costs.items():
        assert found["aligned"][f"{part}: retention_cost"].value == pytest.approx(cost)
    mean = found["aligned"]["retention_cost"]
    assert mean.value == pytest.approx(sum(costs.values()) / 2)
    assert mean.low < mean.value < mean.high
    assert not any("cost" in metric for metric in found["base"])


def evaluator_of(labels):
    """An evaluator of rows whose images no test looks at."""
    features = Features({"label": ClassLabel(names=["a", "b"])})
    rows = [RetentionSet(Dataset.from_dict({"label": label}, features=features)) for label in labels]
    return RetentionEvaluator({f"set {number}": known for number, known in enumerate(rows)}, None, resamples=4000)


def test_intervals_are_paired_within_a_set():
    """The models differ on 4 of 400 images: unpaired, the interval would be ten times as wide."""
    label = [0, 1] * 200
    was = np.array([0, 0] * 200)
    now = was.copy()
    now[[0, 2, 4, 6]] = 1
    cost = evaluator_of([label]).report({"base": {"set 0": was}, "now": {"set 0": now}}, "base", 4000)["now"]
    assert cost["retention_cost"].value == pytest.approx(1)
    deviation = 100 * np.sqrt(0.01 * 0.99 / 400)
    assert cost["retention_cost"].high - cost["retention_cost"].low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    assert cost["set 0: retention_cost"].value == pytest.approx(1)


def test_the_mean_counts_each_set_once_and_its_interval_joins_theirs():
    """Sets of 100 and 900 images that lose 10 and 0 points: 5 on average, and half the width of the first alone."""
    labels = [[0] * 100, [0] * 900]
    was = {f"set {number}": np.zeros(len(label), dtype=int) for number, label in enumerate(labels)}
    now = {name: answers.copy() for name, answers in was.items()}
    now["set 0"][:10] = 1
    found = evaluator_of(labels).report({"base": was, "now": now}, "base", 4000)["now"]
    widths = {metric: estimate.high - estimate.low for metric, estimate in found.items()}
    assert found["retention_cost"].value == pytest.approx(5)
    assert found["set 1: retention_cost"].value == 0
    assert widths["retention_cost"] == pytest.approx(widths["set 0: retention_cost"] / 2, rel=0.15)


def test_the_upper_end_of_a_ninety_percent_interval_is_a_one_sided_bound():
    was = {"set 0": np.zeros(400, dtype=int)}
    now = {"set 0": np.array([1] * 40 + [0] * 360)}
    upper = (
        evaluator_of([[0] * 400]).report({"base": was, "now": now}, "base", 4000, 0.9)["now"]["retention_cost"].high
    )
    assert upper == pytest.approx(10 + 1.645 * 100 * np.sqrt(0.1 * 0.9 / 400), abs=0.3)


def test_a_set_alone_is_the_zero_shot_accuracy(models, processor, dataset):
    evaluator = RetentionEvaluator({"rows": RetentionSet(dataset)}, processor, batch_size=5, resamples=50)
    apart = {}
    for name, model in models.items():
        apart |= evaluator.measure({name: model}, disable_tqdm=True)
    for name, model in models.items():
        expected = zero_shot_accuracy(model, processor, dataset, TEMPLATES[:1], disable_tqdm=True, resamples=50)
        np.testing.assert_array_equal(apart[name]["rows"], expected.predicted)
        metrics = evaluator.report(apart, None, 50)[name]
        assert metrics.keys() == {"accuracy", "rows: accuracy"}
        assert metrics["accuracy"].value == metrics["rows: accuracy"].value == expected.accuracy.value


def test_wrong_arguments_are_refused_before_any_measurement(models, processor, dataset):
    with pytest.raises(ValueError, match="sets is empty"):
        RetentionEvaluator({}, processor)
    with pytest.raises(ValueError, match="what"):
        RetentionEvaluator({"rows": RetentionSet(dataset, label_column="what")}, processor)
    evaluator = RetentionEvaluator({"rows": RetentionSet(dataset)}, processor)
    with pytest.raises(ValueError, match="'before', which is none of the models"):
        evaluator.report(evaluator.measure(models, disable_tqdm=True), "before", 5)
    with pytest.raises(ValueError, match="models is empty"):
        evaluator.measure({}, disable_tqdm=True)
