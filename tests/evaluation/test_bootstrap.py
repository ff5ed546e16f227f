import math
import time

import numpy as np
import pytest

from clip_po.evaluation.bootstrap import Estimate, bootstrap_interval


def mean(means):
    return means["x"]


def ratio(means):
    return means["x"] / means["y"]


def test_the_value_is_the_statistic_of_the_means():
    columns = {"x": np.array([1.0, 2, 3, 6]), "y": np.array([True, False, False, True])}
    assert bootstrap_interval(mean, columns).value == 3
    assert bootstrap_interval(ratio, columns).value == 6
    assert bootstrap_interval(ratio, columns, clusters=np.array(["a", "a", "b", "b"])).value == 6


def test_the_interval_of_a_mean_agrees_with_the_normal_one():
    x = np.random.default_rng(0).normal(5, 2, 2000)
    estimate = bootstrap_interval(mean, {"x": x}, resamples=4000)
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert estimate.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_a_higher_confidence_is_a_wider_interval():
    x = np.random.default_rng(0).random(200)
    narrow, wide = (bootstrap_interval(mean, {"x": x}, confidence=c) for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        clusters = np.repeat(np.arange(60), 3)
        x = rng.normal(size=60)[clusters] + rng.normal(size=180)
        estimate = bootstrap_interval(mean, {"x": x}, clusters, resamples=400, seed=trial)
        covered += estimate.low <= 0 <= estimate.high
    assert 180 <= covered <= 198


def test_clusters_that_agree_widen_the_interval_by_the_root_of_their_size():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(200), 9)
    x = rng.random(200)[clusters]
    alone, together = (bootstrap_interval(mean, {"x": x}, groups, resamples=3000) for groups in (None, clusters))
    assert together.value == pytest.approx(alone.value)
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(3, rel=0.1)


def test_clusters_of_one_row_are_rows():
    x = np.random.default_rng(0).random(50)
    assert bootstrap_interval(mean, {"x": x}, np.arange(50)) == bootstrap_interval(mean, {"x": x})


def test_clusters_of_unequal_size_count_by_their_rows():
    x, clusters = np.array([0.0, 0, 0, 1]), np.array([0, 0, 0, 1])
    estimate = bootstrap_interval(mean, {"x": x}, clusters)
    assert (estimate.value, estimate.low, estimate.high) == (0.25, 0, 1)


def test_columns_are_paired():
    rng = np.random.default_rng(0)
    before = rng.normal(size=500)
    after = before + 0.1
    paired = bootstrap_interval(lambda means: means["y"] - means["x"], {"x": before, "y": after})
    assert paired.low == pytest.approx(0.1)
    assert paired.high == pytest.approx(0.1)
    shuffled = {"x": before, "y": rng.permutation(after)}
    unpaired = bootstrap_interval(lambda means: means["y"] - means["x"], shuffled)
    assert unpaired.high - unpaired.low > 0.1


def test_the_seed_fixes_the_interval_whatever_is_held_in_memory(monkeypatch):
    x = np.random.default_rng(0).random(40)
    whole = bootstrap_interval(mean, {"x": x}, seed=1)
    monkeypatch.setattr("clip_po.evaluation.bootstrap._CELLS_AT_ONCE", 70 * 40)
    assert bootstrap_interval(mean, {"x": x}, seed=1) == whole
    assert bootstrap_interval(mean, {"x": x}, seed=2) != whole


@pytest.mark.filterwarnings("error")
def test_a_denominator_of_zero_is_nan():
    estimate = bootstrap_interval(ratio, {"x": np.ones(4), "y": np.zeros(4)})
    assert all(math.isnan(part) for part in estimate.as_dict().values())


def test_no_rows_are_nan():
    assert math.isnan(bootstrap_interval(mean, {"x": np.array([])}).value)
    assert math.isnan(bootstrap_interval(mean, {"x": np.array([])}, np.array([])).value)


def test_a_single_cluster_has_a_value_and_no_interval():
    estimate = bootstrap_interval(mean, {"x": np.array([1.0, 0])}, np.array([7, 7]))
    assert estimate.value == 0.5
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


@pytest.mark.filterwarnings("error")
def test_few_undefined_resamples_are_left_out_and_many_leave_no_interval():
    few = {"x": np.ones(10), "y": np.arange(10) >= 5}
    assert bootstrap_interval(ratio, few).low > 1
    many = {"x": np.ones(10), "y": np.arange(10) == 0}
    estimate = bootstrap_interval(ratio, many)
    assert estimate.value == pytest.approx(10)
    assert math.isnan(estimate.low)


def test_a_thousand_resamples_of_five_thousand_rows_take_well_under_a_second():
    rng = np.random.default_rng(0)
    columns = {name: rng.random(5000) < 0.5 for name in "xyz"}
    start = time.perf_counter()
    bootstrap_interval(ratio, columns, np.arange(5000))
    assert time.perf_counter() - start < 2  # 0.2 s on two idle cores


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": {}}, "columns is empty"),
        ({"columns": {"x": np.ones(3), "y": np.ones(2)}}, r"one length.*\(2,\)"),
        ({"columns": {"x": np.ones((3, 1))}}, "one length"),
        ({"clusters": np.ones(2)}, r"each of the 3 rows, got shape \(2,\)"),
        ({"confidence": 95}, "between 0 and 1, got 95"),
        ({"resamples": 0}, "at least 1, got 0"),
    ],
)
def test_wrong_arguments_say_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(mean, **{"columns": {"x": np.ones(3)}, **arguments})


def test_an_estimate_is_a_dictionary_of_three_numbers():
    assert Estimate(0.5, 0.25, 0.75).as_dict() == {"value": 0.5, "low": 0.25, "high": 0.75}
