"""Bounds on clean cost, drift and retention cost: which point keeps them, which bound binds, what proof would take."""

import math
import re

import numpy as np
import pytest

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.bounds import Bounds, Cost, describe_promise, describe_retention_promise
from clip_po.evaluation.interpolation import SweepPoint, choose_alpha, interpolation_table


def cost(value, upper, images=100):
    return Cost(Estimate(value, value - 0.01, upper + 0.01), upper, images)


def point(alpha, typographic, clean=(0.0, 0.0), drift=(0.0, 0.0), retention=(0.0, 0.0)):
    costs = {
        "clean_cost": cost(*clean),
        "drift": cost(*drift, images=1000),
        "retention_cost": cost(*retention, images=400),
    }
    return SweepPoint(alpha, Estimate(0.9), Estimate(typographic), costs)


BASE = point(0, 0.3)


def test_every_bound_is_kept_and_the_most_robust_point_that_keeps_all_is_chosen():
    rng = np.random.default_rng(0)
    chosen = set()
    for _ in range(200):
        values, widths = rng.uniform(-1, 1, (10, 3)), rng.uniform(0, 1, (10, 3))
        accuracy = (rng.permutation(10) + 0.5) / 10
        points = [BASE] + [
            point(0.1 * (i + 1), accuracy[i], *zip(values[i], values[i] + widths[i], strict=True)) for i in range(10)
        ]
        limits = rng.uniform(0, 1, 3)
        kept = [i for i in range(10) if accuracy[i] > 0.3 and (values[i] + widths[i] <= limits).all()]
        found = choose_alpha(points, Bounds(*limits))
        assert found.point is (points[1 + max(kept, key=lambda i: accuracy[i])] if kept else BASE)
        chosen.add(found.point.alpha)
    assert len(chosen) > 5


def test_the_bound_that_the_next_better_point_breaks_binds():
    points = [
        BASE,
        point(0.5, 0.6, clean=(0.1, 0.3), drift=(0.02, 0.03)),
        point(0.6, 0.7, clean=(0.2, 0.4), drift=(0.061, 0.066)),
        point(1, 0.8, clean=(3.0, 4.0), drift=(0.2, 0.3)),
    ]
    choice = choose_alpha(points, Bounds(max_clean_cost=0.5, max_drift=0.05))
    assert choice.point is points[1]
    assert choice.next_better is points[2]
    assert choice.binding == ["drift"]
    assert choice.unproven is None
    assert str(choice).splitlines() == [
        "alpha 0.5: typographic accuracy .600, clean cost of .10 points, at most .30 with 95 % confidence (bound 0.5, "
        "100 images), drift of .020 nats, at most .030 with 95 % confidence (bound 0.05, 1,000 images).",
        "What binds is max_drift: the next better, alpha 0.6 (.700), has a drift of .061 [.051, .076] nats, at most "
        ".066.",
    ]
    assert choose_alpha(points, Bounds(max_clean_cost=0.5)).point is points[2]


def test_two_bounds_bind_where_the_next_better_point_breaks_both():
    points = [BASE, point(1, 0.8, clean=(3.0, 4.0), retention=(2.0, 3.0))]
    choice = choose_alpha(points, Bounds(max_clean_cost=0.5, max_retention_cost=1))
    assert choice.binding == ["clean_cost", "retention_cost"]
    said = str(choice).splitlines()
    assert said[1] == "Nothing was changed: alpha 0 is the base."
    assert said[2].startswith("What binds is max_clean_cost and max_retention_cost: the next better, alpha 1 (.800), ")
    assert said[2].endswith(
        "has a clean cost of 3.00 [2.99, 4.01] points, at most 4.00 and a retention cost of 2.00 "
        "[1.99, 3.01] points, at most 3.00."
    )


def test_no_bound_binds_if_the_most_robust_point_keeps_all():
    choice = choose_alpha([BASE, point(1, 0.8, drift=(0.01, 0.02))], Bounds(max_clean_cost=0.5, max_drift=0.05))
    assert choice.binding == []
    assert str(choice).splitlines()[1] == ("No bound binds: no other interpolation has a higher typographic accuracy.")


def test_each_uncertain_bound_comes_with_the_images_that_it_needs():
    # Clean: 1.5 wide with .5 left. Drift: .02 wide with .01 left. Retention: certain.
    unsure = point(0.8, 0.7, clean=(0.5, 2.0), drift=(0.04, 0.06), retention=(0.1, 0.2))
    hopeless = point(1, 0.9, clean=(0.5, 2.0), drift=(0.06, 0.07))
    choice = choose_alpha([BASE, unsure, hopeless], Bounds(1.0, 0.05, 1.0))
    assert choice.point is BASE
    assert choice.unproven is unsure
    assert choice.images_needed == {"clean_cost": 900, "drift": 4000}
    assert str(choice).splitlines()[-1] == (
        "alpha 0.8 would be better (.700) at a clean cost of .50 points, at most 2.00 and a drift of .040 nats, at "
        "most .060. Proving that it is within the bounds takes about this many images: 900 (clean cost) and 4,000 "
        "(drift)."
    )


def test_a_cost_without_an_interval_keeps_no_bound():
    single = point(1, 0.8, retention=(0.0, math.nan))
    choice = choose_alpha([BASE, single], Bounds(max_retention_cost=1))
    assert choice.is_base
    assert choice.unproven is None


def test_a_bounded_cost_must_be_measured():
    unmeasured = SweepPoint(1, Estimate(0.9), Estimate(0.8), {"clean_cost": cost(0.0, 0.1)})
    with pytest.raises(ValueError, match="bound on drift, but only clean_cost were measured"):
        choose_alpha([unmeasured], Bounds(max_clean_cost=1, max_drift=0.1))


@pytest.mark.parametrize("name", ["max_clean_cost", "max_drift", "max_retention_cost"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_bounds_that_are_no_finite_number_from_0_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a finite number of .* >= 0, got {value}"):
        Bounds(**{name: value})


def test_the_table_has_two_columns_for_each_measured_cost():
    header, _, base, aligned = interpolation_table([BASE, point(1, 0.8, drift=(0.04, 0.05))]).splitlines()
    assert header.count("at most (95 %)") == 3
    assert [cell.strip() for cell in header.split("|")[4:10:2]] == [
        "clean cost (points)",
        "drift (nats)",
        "retention cost (points)",
    ]
    assert [cell.strip() for cell in aligned.split("|")[6:8]] == [".040 [.030, .060]", ".050"]
    assert len(base.split("|")) == len(header.split("|"))


@pytest.mark.parametrize("sets", [1, 2, 5])
def test_on_fewer_images_than_said_a_set_hides_a_larger_retention_cost(sets):
    # The definition: all of the loss in one set shows there with 95 % probability, on one image fewer not.
    needed = int(re.search(r"at least (\d+)", describe_retention_promise(0.5, [1] * sets))[1])
    share = sets * 0.5 / 100
    assert (1 - share) ** needed <= 0.05 < (1 - share) ** (needed - 1)


def test_the_smallest_retention_set_limits_the_promise():
    said = describe_retention_promise(1.0, [400, 30])
    assert re.search(r"at least 149 images in each of the 2 retention sets", said)
    assert re.search(r"There are 30 in the smallest: .* the cost may be 4\.8 points\.", said)
    assert describe_retention_promise(1.0, [149, 400]).endswith("There are 149 in the smallest.")
    assert describe_retention_promise(0.0, [400]).startswith("No number of images in the retention set proves")
    alone = describe_retention_promise(0.5, [100]).replace("retention cost", "clean cost")
    assert alone.replace("images in the retention set", "validation images") == describe_promise(0.5, 100)
