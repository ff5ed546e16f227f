"""Sweeps over interpolations, and the choice of alpha under a bound on the clean cost."""

import re
import weakref

import pytest
import torch
from samples import make_scenes

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.bounds import Bounds, Cost, describe_promise
from clip_po.evaluation.interpolation import (
    Measure,
    SweepPoint,
    choose_alpha,
    interpolate,
    interpolation_table,
    sweep_interpolation,
)
from clip_po.evaluation.robustness import RobustnessImages, evaluate_robustness, robustness_report

TEMPLATES = ["a photo of a {}"]


def point(alpha, typographic, cost, upper, images=100):
    costs = {"clean_cost": Cost(Estimate(cost), upper, images)}
    return SweepPoint(alpha, Estimate(0.9), Estimate(typographic), costs)


def within(points, max_clean_cost):
    return choose_alpha(points, Bounds(max_clean_cost))


@pytest.fixture
def images(dataset, attack, processor):
    return RobustnessImages(dataset, attack, processor, renderings=2)


def test_a_sweep_measures_each_interpolation_against_the_base(model, other_model, attack, processor):
    images = RobustnessImages(make_scenes(60), attack, processor, renderings=2)
    points = sweep_interpolation(model, other_model, images, TEMPLATES, (0, 0.5, 1), disable_tqdm=True)
    assert [p.alpha for p in points] == [0, 0.5, 1]
    assert points[0].costs["clean_cost"].estimate == Estimate(0.0, 0.0, 0.0)
    assert points[0].costs["clean_cost"].upper == 0.0
    both = {"base": model, "half": interpolate(model, other_model, 0.5)}
    answers = evaluate_robustness(both, images, TEMPLATES, disable_tqdm=True)
    report = robustness_report(answers, "half", "base")
    assert points[1].clean_accuracy == report["clean_accuracy"]
    assert points[1].typographic_accuracy == report["typographic_accuracy"]
    assert points[1].costs["clean_cost"].estimate == report["clean_cost"]
    assert (
        points[1].costs["clean_cost"].upper
        == robustness_report(answers, "half", "base", confidence=0.9)["clean_cost"].high
    )
    assert report["clean_cost"].value < points[1].costs["clean_cost"].upper < report["clean_cost"].high
    assert {p.costs["clean_cost"].images for p in points} == {60}
    assert len({p.clean_accuracy.value for p in points}) > 1
    assert len(interpolation_table(points).splitlines()) == 5


def test_a_sweep_holds_one_interpolation_at_a_time(model, other_model, images, monkeypatch):
    alive, most = weakref.WeakSet(), []

    def watched(*arguments):
        most.append(len(alive))
        mixed = interpolate(*arguments)
        alive.add(mixed)
        return mixed

    monkeypatch.setattr("clip_po.evaluation.interpolation.interpolate", watched)
    sweep_interpolation(model, other_model, images, TEMPLATES, (0.2, 0.4, 0.6), disable_tqdm=True)
    assert max(most) == 0


def test_the_best_point_within_the_bound_is_chosen():
    points = [point(0, 0.3, 0.0, 0.0), point(0.5, 0.6, -0.5, 0.5), point(1, 0.8, 3.0, 4.0)]
    choice = within(points, 1.0)
    assert choice.point is points[1]
    assert choice.unproven is None
    assert str(choice) == (
        "alpha 0.5: typographic accuracy .600, clean cost of -.50 points, at most .50 with 95 % confidence "
        "(bound 1, 100 images)."
    )
    assert within(points, 4.0).point is points[2]
    assert within(points, 0.0).point is points[0]


def test_a_better_point_that_is_unproven_comes_with_the_images_it_needs():
    points = [point(0, 0.3, 0.0, 0.0), point(0.5, 0.6, 0.0, 1.0), point(0.8, 0.7, 0.5, 2.0), point(1, 0.8, 3.0, 4.0)]
    choice = within(points, 1.0)
    assert choice.point is points[1]
    assert choice.unproven is points[2]
    assert choice.images_needed == {
        "clean_cost": 900
    }  # The interval is 1.5 wide and .5 points are left: 3 ** 2 times as many.
    assert choice.describe().splitlines()[1] == (
        "alpha 0.8 would be better (.700) at a clean cost of .50 points, at most 2.00. Proving that it is within the "
        "bound takes about 900 images."
    )


def test_rounding_does_not_exclude_a_point_that_equals_the_bound():
    exactly = 100 * (0.93 - 0.92)
    assert exactly > 1
    met = point(0.5, 0.6, 0.0, exactly)
    assert within([point(0, 0.3, 0.0, 0.0), met], 1.0).point is met


def test_a_point_whose_estimate_equals_the_bound_is_not_reported_as_unproven():
    points = [point(0, 0.3, 0.0, 0.0), point(1, 0.8, 100 * (0.93 - 0.92), 4.0)]
    assert within(points, 1.0).unproven is None


def test_ties_go_to_the_lower_clean_cost():
    points = [point(0, 0.3, 0.0, 0.0), point(0.9, 0.6, 0.5, 0.9), point(0.8, 0.6, 0.2, 0.5)]
    assert within(points, 1.0).point is points[2]


def test_invalid_arguments_are_refused(model, other_model, images, dataset, attack, processor):
    with pytest.raises(ValueError, match="percentage points >= 0, got -1"):
        within([point(0, 0.3, 0.0, 0.0)], -1)
    with pytest.raises(ValueError, match="Measure alpha 0 too"):
        within([point(1, 0.8, 3.0, 4.0)], 1.0)
    with pytest.raises(ValueError, match=r"at least one, got \(\)"):
        sweep_interpolation(model, other_model, images, TEMPLATES, ())
    single = RobustnessImages(dataset.select(range(2)), attack, processor, cluster_column="scene")
    with pytest.raises(ValueError, match="single cluster"):
        sweep_interpolation(model, other_model, single, TEMPLATES)


@pytest.mark.parametrize(
    ("bound", "images", "said"),
    [
        (0.5, 100, r"takes at least 598 .* There are 100: .* the cost may be 3 points\."),
        (0.5, 598, r"takes at least 598 .* There are 598\.$"),
        (1.0, 12, r"takes at least 299 .* There are 12: .* the cost may be 22 points\."),
        (0, 5000, r"^No number of validation images proves .* the cost may be 0\.06 points\."),
        (100, 2, r"takes at least 1 validation "),
    ],
)
def test_the_number_of_images_that_a_promise_takes_is_said(bound, images, said):
    assert re.search(said, describe_promise(bound, images))


def test_on_fewer_images_than_said_a_larger_cost_goes_unseen():
    # The definition: at the smallest number, a cost of the bound shows with 95 % probability, one image fewer not.
    needed = int(re.search(r"at least (\d+)", describe_promise(0.5, 1))[1])
    assert (1 - 0.005) ** needed <= 0.05 < (1 - 0.005) ** (needed - 1)


class WeightDistance:
    """A stand-in for an evaluator: how far the weights of a model are from those of the base, twice measured."""

    def __init__(self):
        self.asked = []

    def measure(self, models, *, accelerator=None, disable_tqdm=False):
        return {name: torch.cat([w.flatten() for w in model.parameters()]).clone() for name, model in models.items()}

    def report(self, measured, base, resamples, confidence=0.95):
        self.asked.append((resamples, confidence))
        distance = (measured["model"] - measured[base]).norm().item()
        return {"model": {"distance": Estimate(distance, distance - confidence, distance + confidence)}, base: {}}


def test_a_sweep_measures_other_costs_of_the_same_models_against_the_base(model, other_model, images):
    stub = WeightDistance()
    measures = {"drift": Measure(stub, "distance", 70)}
    points = sweep_interpolation(
        model, other_model, images, TEMPLATES, (0, 0.5, 1), measures=measures, disable_tqdm=True, resamples=20
    )
    whole = sum((a - b).pow(2).sum() for a, b in zip(model.parameters(), other_model.parameters(), strict=True))
    for found in points:
        expected = found.alpha * whole.sqrt().item()
        assert found.costs["drift"].estimate.value == pytest.approx(expected, rel=1e-4)
        assert found.costs["drift"].estimate.high == pytest.approx(expected + 0.95, rel=1e-4)
        assert found.costs["drift"].upper == pytest.approx(expected + 0.9, rel=1e-4)  # 5 % above, as one-sided 95 %
        assert found.costs["drift"].images == 70
        assert list(found.costs) == ["clean_cost", "drift"]
    assert set(stub.asked) == {(20, 0.9), (20, 0.95)}
    alone = sweep_interpolation(model, other_model, images, TEMPLATES, (0, 0.5, 1), disable_tqdm=True, resamples=20)
    assert [p.costs["clean_cost"] for p in alone] == [p.costs["clean_cost"] for p in points]
