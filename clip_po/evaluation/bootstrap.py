"""Confidence intervals by bootstrap over rows or clusters of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

Statistic = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Function from column means by name, arrays [R], to a statistic, array [R]."""

_CELLS_AT_ONCE = 4_000_000  # Number of draws held in memory at a time: 32 MB of indices.


@dataclass(frozen=True)
class Estimate:
    """A measured number with its confidence interval.

    Attributes:
        value: The number measured on all rows; NaN if undefined.
        low: Lower end of the interval; NaN if there is no interval.
        high: Upper end of the interval; NaN if there is no interval.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    def as_dict(self) -> dict[str, float]:
        """Return the estimate as a dictionary.

        Returns:
            value, low and high by name.
        """
        return asdict(self)


def bootstrap_interval(
    statistic: Statistic,
    columns: Mapping[str, np.ndarray],
    clusters: np.ndarray | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Compute a statistic of column means with its percentile bootstrap interval.

    Each resample draws whole clusters with replacement, as many as there are. Rows that share an image, a scene
    or a subject are correlated, and drawing them one by one would overstate the evidence. All columns come from
    the same rows and are drawn together, so the difference of two models on the same images is a paired
    difference. The statistic depends on means only, so a resample is one weight per cluster, and all resamples
    are one matrix product.

    The interval runs from the (1 - confidence) / 2 quantile to the (1 + confidence) / 2 quantile of the resampled
    statistic. It is not corrected for bias or skewness, and it is too narrow with fewer than about thirty clusters.

    Args:
        statistic: Function of the column means by name. It is called with arrays, [1] for the value and [R] for
            the resamples, so plain arithmetic on the means is enough. Division by zero is allowed.
        columns: By name, arrays [N] of numbers or booleans, all of the same length.
        clusters: Array [N], the cluster of each row, as numbers or strings; None if every row is its own cluster.
        confidence: Probability that the interval covers the true value, in (0, 1).
        resamples: Number R of resamples, >= 1.
        seed: Seed of the draws. The same seed gives the same interval.

    Returns:
        The value and its interval. Value and interval are NaN if the statistic is not finite on all rows, for
        example because a denominator is 0 or there are no rows. The interval alone is NaN if there is a single
        cluster, or if the statistic is undefined on more than 1 - confidence of the resamples; a smaller number
        of undefined resamples is left out.

    Raises:
        ValueError: If there are no columns, if columns or clusters differ in length, or if `confidence` or
            `resamples` is out of range.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, Sec. 13.3 (percentile interval);
    Field and Welsh 2007, Bootstrapping clustered data, JRSS B 69(3) (the cluster bootstrap).
    """
    table, members = _cluster_sums(columns, clusters)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence!r}; 0.95 is usual.")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples!r}; 1000 is usual.")

    value = _evaluate(statistic, columns, table.sum(axis=0, keepdims=True), members.sum(keepdims=True))[0]
    if not math.isfinite(value):
        return Estimate(math.nan)
    groups = len(members)
    if groups < 2:
        return Estimate(float(value))

    rng = np.random.default_rng(seed)
    at_once = max(1, _CELLS_AT_ONCE // groups)
    parts = []
    for start in range(0, resamples, at_once):
        weights = _draw_weights(rng, min(at_once, resamples - start), groups)
        parts.append(_evaluate(statistic, columns, weights @ table, weights @ members))
    drawn = np.concatenate(parts)
    defined = drawn[np.isfinite(drawn)]
    if len(defined) < confidence * resamples:
        return Estimate(float(value))
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))


def mean_over_sets(
    columns: Sequence[np.ndarray], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Compute the mean over datasets of the mean over their rows, with its interval.

    Each dataset counts once, whatever its size. The interval is over rows; the datasets are held fixed.

    Args:
        columns: For each dataset, array [N] of numbers or booleans. Datasets may differ in N.
        confidence: As for `bootstrap_interval`.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        The value and its interval.

    Raises:
        ValueError: If there are no datasets, or as for `bootstrap_interval`.
    """
    if not columns:
        raise ValueError("columns is empty. Give the numbers of at least one dataset.")
    member = np.repeat(np.arange(len(columns)), list(map(len, columns)))
    joined = np.concatenate(columns).astype(np.float64)
    table = {f"member {number}": member == number for number in range(len(columns))}
    table |= {f"sum {number}": (member == number) * joined for number in range(len(columns))}

    def mean(means: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.mean([means[f"sum {n}"] / means[f"member {n}"] for n in range(len(columns))], axis=0)

    return bootstrap_interval(mean, table, None, confidence, resamples, seed)


def _cluster_sums(columns: Mapping[str, np.ndarray], clusters: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums [G, K] of the columns over each cluster, and the number of rows [G] of each cluster."""
    if not columns:
        raise ValueError("columns is empty. Pass at least one array of per-row numbers.")
    lengths = {name: np.shape(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or any(len(shape) != 1 for shape in lengths.values()):
        raise ValueError(f"columns must be arrays [N] of one length, got shapes {lengths}.")
    stacked = np.stack([np.asarray(column, dtype=np.float64) for column in columns.values()], axis=1)
    rows = len(stacked)
    if clusters is None:
        return stacked, np.ones(rows)
    if np.shape(clusters) != (rows,):
        raise ValueError(f"clusters must name the cluster of each of the {rows} rows, got shape {np.shape(clusters)}.")
    names, inverse = np.unique(clusters, return_inverse=True)
    sums = np.stack([np.bincount(inverse, column, len(names)) for column in stacked.T], axis=1)
    return sums, np.bincount(inverse, minlength=len(names)).astype(np.float64)


def _draw_weights(rng: np.random.Generator, resamples: int, groups: int) -> np.ndarray:
    """Return how often each cluster is drawn, [resamples, groups]: multinomial counts of uniform draws."""
    drawn = rng.integers(0, groups, size=(resamples, groups))
    drawn += np.arange(resamples)[:, None] * groups
    counts = np.bincount(drawn.ravel(), minlength=resamples * groups)
    return counts.reshape(resamples, groups).astype(np.float64)


def _evaluate(
    statistic: Statistic, columns: Mapping[str, np.ndarray], sums: np.ndarray, members: np.ndarray
) -> np.ndarray:
    """Return the statistic [R] for weighted sums [R, K] and weighted numbers of rows [R]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums / members[:, None]
        result = statistic({name: means[:, position] for position, name in enumerate(columns)})
    return np.broadcast_to(np.asarray(result, dtype=np.float64), members.shape)
