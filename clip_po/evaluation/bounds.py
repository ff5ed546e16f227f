"""Bounds on what a model may lose against its base, and whether a measured loss is within them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.tables import format_estimate, format_number

_CHANCE = 0.05  # What 95% confidence leaves open.
_ROUNDING = 1e-9  # Costs are multiples of 100 / N, so they often equal a bound exactly.


@dataclass(frozen=True)
class CostKind:
    """A kind of loss against the base, as it is printed.

    Attributes:
        label: Name in sentences and tables.
        unit: Unit of value and bound, in the short form of tables.
        long_unit: Unit in full.
        digits: Number of decimals.
    """

    label: str
    unit: str
    long_unit: str
    digits: int


COSTS: Mapping[str, CostKind] = {
    "clean_cost": CostKind("clean cost", "points", "percentage points", 2),
    "drift": CostKind("drift", "nats", "nats", 3),
    "retention_cost": CostKind("retention cost", "points", "percentage points", 2),
}
"""Everything that can be bounded, by name. `Bounds` has a `max_<name>` for each."""


@dataclass(frozen=True)
class Cost:
    """A measured loss against the base.

    Attributes:
        estimate: The loss with its 95 % interval; negative for a gain.
        upper: Upper end of the one-sided 95 % interval.
        images: Number of images measured.
    """

    estimate: Estimate
    upper: float
    images: int

    def is_within(self, bound: float) -> bool:
        """Return whether the loss is within a bound with 95 % confidence.

        Args:
            bound: The bound, in the unit of the loss.

        Returns:
            True if the one-sided interval ends at or below the bound.
        """
        return within(self.upper, bound)

    def may_be_within(self, bound: float) -> bool:
        """Return whether a loss that is not within a bound with 95 % confidence could be, on more images.

        Args:
            bound: The bound, in the unit of the loss.

        Returns:
            True if the estimate is below the bound.
        """
        return bound - self.estimate.value > _ROUNDING and math.isfinite(self.upper)

    def images_needed(self, bound: float) -> int:
        """Estimate the number of images at which the one-sided interval would end at a bound.

        The width of the interval is assumed to fall with 1 / sqrt(images), and the estimate to stay.

        Args:
            bound: The bound, in the unit of the loss. It must be one that the loss `may_be_within`.

        Returns:
            The number.
        """
        width, room = self.upper - self.estimate.value, bound - self.estimate.value
        return math.ceil(self.images * (width / room) ** 2)


@dataclass(frozen=True)
class Bounds:
    """The most that a model may lose against its base, each bound by itself. None sets no bound.

    Args:
        max_clean_cost: Largest loss of accuracy on clean validation images, in percentage points, >= 0.
        max_drift: Largest KL(base || model) on clean validation images over an open vocabulary, in nats, >= 0.
        max_retention_cost: Largest loss of accuracy on the retention sets, in percentage points, >= 0.

    Raises:
        ValueError: If a bound is negative or not finite.
    """

    max_clean_cost: float | None = None
    max_drift: float | None = None
    max_retention_cost: float | None = None

    def __post_init__(self) -> None:
        """Raise if a bound is not valid."""
        for name, bound in self.given.items():
            check_bound(bound, name)

    @property
    def given(self) -> dict[str, float]:
        """The bounds that are set, by name of the cost in `COSTS`."""
        bounds = {name: getattr(self, f"max_{name}") for name in COSTS}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    def broken_by(self, costs: Mapping[str, Cost]) -> list[str]:
        """Return which bounds measured costs are not within with 95 % confidence.

        Args:
            costs: Costs by name, at least those that are bounded.

        Returns:
            Names of the costs; empty if all bounds are kept.

        Raises:
            ValueError: If a bounded cost was not measured.
        """
        if missing := self.given.keys() - costs.keys():
            raise ValueError(
                f"There is a bound on {', '.join(sorted(missing))}, but only {', '.join(costs)} were measured. Pass a "
                "measure of the others to sweep_interpolation, or leave the bound out."
            )
        return [name for name, bound in self.given.items() if not costs[name].is_within(bound)]

    def may_be_kept_by(self, costs: Mapping[str, Cost]) -> bool:
        """Return whether every bound that measured costs are not within could be kept, on more images.

        Args:
            costs: As for `broken_by`.

        Returns:
            True if all their estimates are below the bounds.

        Raises:
            ValueError: As for `broken_by`.
        """
        return all(costs[name].may_be_within(self.given[name]) for name in self.broken_by(costs))


def within(cost: float, bound: float) -> bool:
    """Return whether a cost is within a bound, up to rounding.

    Args:
        cost: The cost, in any unit.
        bound: The bound, in the same unit.

    Returns:
        True if it is.
    """
    return cost <= bound + _ROUNDING


def check_bound(bound: float, name: str = "clean_cost") -> None:
    """Raise if a bound is invalid.

    Args:
        bound: The bound, in the unit of the cost.
        name: Name of the cost in `COSTS`.

    Raises:
        ValueError: If the bound is negative or not finite.
    """
    if not 0 <= bound < math.inf:
        kind = COSTS[name]
        size = " One point is 1.0." if kind.unit == "points" else ""
        raise ValueError(
            f"max_{name} must be a finite number of {kind.long_unit} >= 0, got {bound!r}. The base itself "
            f"has a {kind.label} of 0.{size}"
        )


def describe_cost(name: str, cost: Cost) -> str:
    """Describe a measured cost.

    Args:
        name: Name of the cost in `COSTS`.
        cost: The cost.

    Returns:
        Text such as "clean cost of .20 points, at most .45".
    """
    kind = COSTS[name]
    value, upper = (format_number(number, kind.digits) for number in (cost.estimate.value, cost.upper))
    return f"{kind.label} of {value} {kind.unit}, at most {upper}"


def describe_broken(name: str, cost: Cost) -> str:
    """Describe a measured cost with its interval.

    Args:
        name: Name of the cost in `COSTS`.
        cost: The cost.

    Returns:
        Text such as "drift of .061 [.055, .068] nats, at most .066".
    """
    kind = COSTS[name]
    upper = format_number(cost.upper, kind.digits)
    return f"{kind.label} of {format_estimate(cost.estimate, kind.digits)} {kind.unit}, at most {upper}"


def describe_promise(max_clean_cost: float, images: int) -> str:
    """Describe how many validation images a bound on the clean cost takes, before any is measured.

    If a share p of all answers got worse, n images show none of them with probability (1 - p)^n. The bound therefore
    takes at least log(0.05) / log(1 - p) images, about 300 divided by the percentage points.

    Args:
        max_clean_cost: The bound, in percentage points, >= 0.
        images: Number of validation images, >= 1.

    Returns:
        One line.

    Source: Hanley and Lippman-Hand 1983, JAMA 249(13), "If nothing goes wrong, is everything all right?".
    """
    return _promise("clean_cost", max_clean_cost, images, "validation images")


def describe_retention_promise(max_retention_cost: float, images: Sequence[int]) -> str:
    """Describe how many images of each retention set a bound on the retention cost takes, before any is measured.

    The retention cost is a mean over k sets. A loss of k times the bound in a single set exceeds it, so each set takes
    as many images as k times the bound does in `describe_promise`.

    Args:
        max_retention_cost: The bound, in percentage points, >= 0.
        images: Number of images of each set, each >= 1.

    Returns:
        One line.
    """
    sets = len(images)
    where = "images in the retention set" if sets == 1 else f"images in each of the {sets} retention sets"
    return _promise("retention_cost", max_retention_cost, min(images), where, sets)


def _promise(name: str, bound: float, images: int, where: str, sets: int = 1) -> str:
    label = COSTS[name].label
    possible = 100 * (1 - _CHANCE ** (1 / images)) / sets
    count = f"{images:,}" if sets == 1 else f"{images:,} in the smallest"
    given = f"There are {count}: even if no answer gets worse on them, the cost may be {possible:.2g} points."
    if bound == 0:
        return f"No number of {where} proves a {label} of 0 points with 95% confidence. {given}"
    share = sets * bound / 100
    needed = 1 if share >= 1 else math.ceil(math.log(_CHANCE) / math.log1p(-share))
    takes = (
        f"A {label} of at most {bound:g} points, with 95% confidence, takes at least {needed:,} {where}, and more if "
        "answers get worse."
    )
    return f"{takes} {given}" if images < needed else f"{takes} There are {count}."
