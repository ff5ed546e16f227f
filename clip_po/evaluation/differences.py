"""Metrics of a model with intervals, and their differences from a base on the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from clip_po.evaluation.bootstrap import Estimate, Statistic, bootstrap_interval

_BASE = "base "


def estimates_against_base(
    statistics: Mapping[str, Statistic],
    columns: Mapping[str, np.ndarray],
    base_columns: Mapping[str, np.ndarray] | None,
    clusters: np.ndarray | None,
    shares: frozenset[str],
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Compute metrics of column means, and their paired differences from a base.

    Args:
        statistics: Functions of the column means by name of the metric, as for `bootstrap_interval`.
        columns: Arrays [N] by name.
        base_columns: The columns of the base for the same rows; None for no differences.
        clusters: As for `bootstrap_interval`.
        shares: Metrics whose difference is in percentage points. Others keep their unit.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        Estimates of the metrics and, with a base, of `<metric>_difference`.

    Raises:
        ValueError: As for `bootstrap_interval`.
    """
    table, metrics = dict(columns), dict(statistics)
    if base_columns is not None:
        table |= {f"{_BASE}{name}": column for name, column in base_columns.items()}
        for name, statistic in statistics.items():
            scale = 100.0 if name in shares else 1.0
            metrics[f"{name}_difference"] = partial(_difference, statistic=statistic, scale=scale)
    return {
        name: bootstrap_interval(statistic, table, clusters, resamples=resamples, seed=seed)
        for name, statistic in metrics.items()
    }


def _difference(means: Mapping[str, np.ndarray], statistic: Statistic, scale: float) -> np.ndarray:
    before = {name.removeprefix(_BASE): mean for name, mean in means.items() if name.startswith(_BASE)}
    return scale * (statistic(means) - statistic(before))
