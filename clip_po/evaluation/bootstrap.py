"""Confidence intervals by resampling the rows, or clusters of rows, that a number was measured on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

Statistic = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""A number from the means of columns, by their names: it maps arrays [R] of means to an array [R]."""

_CELLS_AT_ONCE = 4_000_000  # draws held in memory together: 32 MB of indices


@dataclass(frozen=True)
class Estimate:
    """A measured number with its confidence interval.

    Attributes:
        value: The number on all rows; nan where it is undefined.
        low: Lower end of the interval; nan where there is none.
        high: Upper end of the interval; nan where there is none.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    def as_dict(self) -> dict[str, float]:
        """The three numbers by name: value, low, high."""
        return asdict(self)


def bootstrap_interval(
    statistic: Statistic,
    columns: Mapping[str, np.ndarray],
    clusters: np.ndarray | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A statistic of column means with its percentile bootstrap interval.

    Whole clusters are drawn with replacement, as many as there are, and every row of a cluster drawn twice
    counts twice: rows that share an image, a scene or a subject vary together, and drawn one by one they
    would feign more evidence than there is. All columns come from the same rows and are drawn together, so
    that a difference of two models on the same images is a paired one. Because the statistic sees nothing but
    means, a resample is a weight per cluster, and all resamples are one matrix product.

    The interval runs between the (1 - confidence) / 2 quantiles of the resampled statistic. It is not
    corrected for bias or skewness, and with few clusters (below about thirty) it is too narrow.

    Args:
        statistic: Function of the columns' means by name, called with arrays ([1] for the value, [R] for
            resamples): plain arithmetic on the means is enough. Division by zero is allowed.
        columns: Arrays [N] of numbers or truth values, by name, all of one length.
        clusters: Array [N], the cluster of each row (numbers or strings); None for every row on its own.
        confidence: Probability that the interval is to cover the true value, in (0, 1).
        resamples: Number R of resamples, >= 1.
        seed: Seed of the draws; the same seed gives the same interval.

    Returns:
        The value and its interval. The value is nan, and the interval with it, where the statistic is not
        finite on all rows (a denominator of 0, no rows). The interval alone is nan where there is a single
        cluster, or where the statistic is undefined on more than 1 - confidence of the resamples; fewer
        undefined ones are left out.

    Raises:
        ValueError: No columns, columns or clusters of unequal lengths, `confidence` or `resamples` out of
            range.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, Sec. 13.3 (percentile interval);
    Field and Welsh 2007, Bootstrapping clustered data, JRSS B 69(3) (the cluster bootstrap).
    """
    table, members = _cluster_sums(columns, clusters)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}; 0.95 is usual.")
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


def _cluster_sums(columns: Mapping[str, np.ndarray], clusters: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums [G, K] of the columns over each cluster, and the clusters' numbers of rows [G]."""
    if not columns:
        raise ValueError("columns is empty; give at least one array of per-row numbers.")
    lengths = {name: np.shape(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or any(len(shape) != 1 for shape in lengths.values()):
        raise ValueError(f"columns must be arrays [N] of one length, got the shapes {lengths}.")
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
    """How often each cluster was drawn, [resamples, groups]: multinomial, by counting uniform draws."""
    drawn = rng.integers(0, groups, size=(resamples, groups))
    drawn += np.arange(resamples)[:, None] * groups
    counts = np.bincount(drawn.ravel(), minlength=resamples * groups)
    return counts.reshape(resamples, groups).astype(np.float64)


def _evaluate(
    statistic: Statistic, columns: Mapping[str, np.ndarray], sums: np.ndarray, members: np.ndarray
) -> np.ndarray:
    """The statistic [R] for weighted sums [R, K] over weighted numbers of rows [R]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums / members[:, None]
        result = statistic({name: means[:, position] for position, name in enumerate(columns)})
    return np.broadcast_to(np.asarray(result, dtype=np.float64), members.shape)
