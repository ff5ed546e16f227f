"""Calibration: whether what a model holds for likely is right as often as it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

BINS = 20
"""Number of bins of equal width between 0 and 1."""


@dataclass(frozen=True)
class ReliabilityBin:
    """The rows whose probability falls into one bin.

    Attributes:
        low: Lower end of the bin.
        high: Upper end of the bin.
        probability: Their mean probability.
        frequency: The share of them that came true.
        rows: Their number.
    """

    low: float
    high: float
    probability: float
    frequency: float
    rows: int


def bins_of(probability: np.ndarray) -> np.ndarray:
    """Return the bin of each probability, 0..BINS - 1."""
    return np.minimum((probability * BINS).astype(np.int64), BINS - 1)


def gap_columns(probability: np.ndarray, outcome: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of which `calibration_error` takes the means.

    Args:
        probability: Array [N] in [0, 1].
        outcome: Array [N]: 1 if it came true, 0 if not, or the share of annotators who say so.
        weight: Array [N] of weights >= 0.

    Returns:
        Array [N] for each bin that has rows.
    """
    bins = bins_of(probability)
    return {f"gap {number}": weight * (bins == number) * (outcome - probability) for number in np.unique(bins)}


def calibration_error(means: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute the expected calibration error: the mean over bins of |frequency - probability|, by their rows.

    Args:
        means: Means of `gap_columns`, and of `weight`.

    Returns:
        Array of errors in [0, 1].

    Source: Guo et al. 2017, arXiv 1706.04599, Eq. 3.
    """
    gaps = [abs(mean) for name, mean in means.items() if name.startswith("gap ")]
    return np.sum(gaps, axis=0) / means["weight"]


def reliability(probability: np.ndarray, outcome: np.ndarray, weight: np.ndarray) -> list[ReliabilityBin]:
    """Compute the reliability diagram.

    Args:
        probability: As for `gap_columns`.
        outcome: As for `gap_columns`.
        weight: As for `gap_columns`.

    Returns:
        The bins that have rows of weight > 0, from low to high.
    """
    bins = bins_of(probability)
    found = []
    for number in np.unique(bins[weight > 0]).tolist():
        own = (bins == number) & (weight > 0)
        mean, share = (float(np.average(values[own], weights=weight[own])) for values in (probability, outcome))
        found.append(ReliabilityBin(number / BINS, (number + 1) / BINS, mean, share, int(own.sum())))
    return found
