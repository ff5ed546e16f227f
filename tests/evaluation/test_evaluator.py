"""Evaluators return what the functions beneath them compute, whether models are measured together or one by one."""

import datasets
import numpy as np
import pytest

from clip_po.evaluation.evaluator import RetrievalEvaluator, RobustnessEvaluator, ZeroShotEvaluator, trade_off
from clip_po.evaluation.retrieval import evaluate_retrieval, retrieval_report
from clip_po.evaluation.robustness import RobustnessImages, evaluate_robustness, robustness_report
from clip_po.evaluation.zero_shot import zero_shot_accuracy

TEMPLATES = ["a photo of a {}"]


@pytest.fixture
def models(model, other_model):
    return {"base": model, "aligned": other_model}


def values(metrics):
    return {name: estimate.as_dict() for name, estimate in metrics.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, metrics in expected.items():
        assert found[name].keys() == metrics.keys()
        for metric, numbers in values(metrics).items():
            assert values(found[name])[metric] == pytest.approx(numbers, nan_ok=True, abs=0, rel=0)


def test_robustness(models, dataset, attack, processor):
    images = RobustnessImages(dataset, attack, processor)
    evaluator = RobustnessEvaluator(images, TEMPLATES, batch_size=5, resamples=50, seed=3)
    answers = evaluate_robustness(models, images, TEMPLATES, disable_tqdm=True)
    expected = {name: robustness_report(answers, name, "base", resamples=50, seed=3) for name in models}
    assert_same(evaluator(models, "base", disable_tqdm=True), expected)
    alone = {name: robustness_report(answers, name, resamples=50, seed=3) for name in models}
    assert_same(evaluator(models, disable_tqdm=True), alone)
    assert (evaluator.primary_metric, evaluator.greater_is_better) == ("typographic_accuracy", True)


@pytest.mark.parametrize("kind", [RobustnessEvaluator, ZeroShotEvaluator, RetrievalEvaluator])
def test_an_unknown_base_is_named_with_the_models(kind, models, dataset, attack, processor):
    if kind is RobustnessEvaluator:
        evaluator = kind(RobustnessImages(dataset, attack, processor), TEMPLATES, resamples=2)
    else:
        rows = dataset.add_column("caption", [f"a cat {row}" for row in range(len(dataset))])
        evaluator = kind(rows, processor, *([TEMPLATES] if kind is ZeroShotEvaluator else []), resamples=2)
    measured = evaluator.measure(models, disable_tqdm=True)
    with pytest.raises(ValueError, match=r"'bass'.*\['base', 'aligned'\]"):
        evaluator.report(measured, "bass", 2)
    assert evaluator.report(measured, None, 2).keys() == models.keys()


def test_a_bound_on_the_clean_cost_adds_the_trade_off(models, dataset, attack, processor):
    evaluator = RobustnessEvaluator(RobustnessImages(dataset, attack, processor), TEMPLATES, max_clean_cost=0.0)
    found = evaluator(models, "base", disable_tqdm=True)
    now = found["aligned"]
    expected = trade_off(now["typographic_accuracy"].value, now["clean_cost"].value, 0.0)
    assert now[evaluator.primary_metric].value == expected
    assert evaluator.primary_metric == "trade_off"
    assert "trade_off" not in found["base"]


def test_models_measured_one_by_one_are_compared_the_same(models, dataset, attack, processor):
    evaluator = RobustnessEvaluator(RobustnessImages(dataset, attack, processor), TEMPLATES, resamples=20)
    apart = {}
    for name, model in models.items():
        apart |= evaluator.measure({name: model}, disable_tqdm=True)
    assert_same(evaluator.report(apart, "base", 20), evaluator(models, "base", disable_tqdm=True))


def test_zero_shot(models, dataset, processor):
    evaluator = ZeroShotEvaluator(dataset, processor, TEMPLATES, resamples=50)
    found = evaluator(models, "base", disable_tqdm=True)
    results = {
        name: zero_shot_accuracy(model, processor, dataset, TEMPLATES, disable_tqdm=True, resamples=50)
        for name, model in models.items()
    }
    for name, result in results.items():
        assert found[name]["accuracy"] == result.accuracy
    right = {name: np.mean(result.predicted == result.label) for name, result in results.items()}
    assert found["aligned"]["difference"].value == pytest.approx(100 * (right["aligned"] - right["base"]))
    assert found["aligned"]["difference"].low <= found["aligned"]["difference"].high
    assert found["base"].keys() == {evaluator.primary_metric} == {"accuracy"}


def test_retrieval(models, dataset, processor):
    captions = [f"a photo of {row}" for row in range(len(dataset))]
    rows = dataset.select_columns(["image"]).add_column("caption", captions, feature=datasets.Value("string"))
    evaluator = RetrievalEvaluator(rows, processor, ks=(1, 3), resamples=50)
    hits = evaluate_retrieval(models, processor, rows, ks=(1, 3), disable_tqdm=True)
    expected = {
        "base": retrieval_report(hits["base"], resamples=50),
        "aligned": retrieval_report(hits["aligned"], hits["base"], resamples=50),
    }
    assert_same(evaluator(models, "base", disable_tqdm=True), expected)
    assert evaluator.primary_metric in expected["base"]
