"""Which method of a comparison is named the best, and when none is."""

import math

import pytest

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.comparison import best_method, describe_best


def method(clean_cost, recovery):
    return {"clean_cost": Estimate(clean_cost), "recovery": Estimate(recovery)}


@pytest.mark.parametrize(
    ("methods", "best"),
    [
        ({"a": method(0.4, 0.2), "b": method(0.5, 0.3), "c": method(8.3, 0.9)}, "b"),
        ({"a": method(8.3, 0.9), "b": method(9.0, 0.95)}, None),
        ({"a": method(0.0, math.nan), "b": method(0.0, 0.1)}, "b"),
        ({"a": method(0.0, math.nan)}, None),
        ({"a": method(0.1 + 0.2 + 0.2, 0.1)}, "a"),  # a bound that is met exactly, up to rounding
        ({"a": method(math.nan, 0.9)}, None),
    ],
)
def test_no_method_beyond_the_bound_wins(methods, best):
    assert best_method(methods, 0.5) == best


def test_without_a_winner_the_cheapest_method_and_its_cost_are_named():
    said = describe_best({"DPO": method(8.3, 0.9), "CE": method(12.0, 0.95)}, 0.5)
    assert said.startswith("No method costs at most 0.5 points of clean accuracy. The cheapest, DPO, costs 8.3.")
    assert "Highest" not in said


def test_a_base_that_words_do_not_hurt_has_no_winner():
    assert describe_best({"DPO": method(0.0, math.nan)}, 0.5).startswith("No method has a recovery")
