"""The fairness report: all metrics of several models with intervals, and the level of a random ranking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.fairness.metrics import (
    Desired,
    Rankings,
    answer_counts,
    desired_shares,
    mean,
    ndkl_per_query,
    number_groups,
    rank_images,
    rate_gaps,
    skews,
    top_k,
)

RESAMPLES = 200
"""Default number of resamples. Each one ranks all images again, so it is lower than for other reports."""

_CELLS_AT_ONCE = 4_000_000  # counts held in memory together: 32 MB


class _Measure:
    """All metrics of one model, on images that are each counted any number of times."""

    def __init__(
        self,
        scores: np.ndarray,
        group: np.ndarray,
        shares: Callable[[np.ndarray], np.ndarray],
        groups: int,
        ks: Sequence[int],
        labels: np.ndarray | None,
        zero_count: float,
    ) -> None:
        self.group, self.shares, self.groups, self.ks = group, shares, groups, ks
        self.labels, self.zero_count, self.classes = labels, zero_count, len(scores)
        at_once = max(1, _CELLS_AT_ONCE // (groups * len(group)))
        self.rankings: list[tuple[Rankings, Rankings | None]] = []
        for start in range(0, len(scores), at_once):
            part = scores[start : start + at_once]
            relevant = None
            if labels is not None:
                own = labels == np.arange(start, start + len(part))[:, None]
                relevant = rank_images(part, np.where(own, group, groups), groups)
            self.rankings.append((rank_images(part, group, groups), relevant))
        self.answers = scores.argmax(axis=0)

    def __call__(self, weights: np.ndarray | None = None) -> dict[str, float]:
        sizes = np.bincount(self.group, weights, self.groups)
        share = self.shares(sizes)
        found: dict[str, list[np.ndarray]] = {}
        for rankings, relevant in self.rankings:
            counts = rankings.counts(weights)
            asked = None if relevant is None else relevant.counts(weights)
            for k in self.ks:
                # A resample of clusters may contain fewer images than k.
                last = min(k, counts.shape[1]) - 1
                skew = skews(counts[:, last], share, self.zero_count)
                found.setdefault(f"max_skew@{k}", []).append(np.nanmax(skew, axis=1))
                found.setdefault(f"min_skew@{k}", []).append(np.nanmin(skew, axis=1))
                found.setdefault(f"retrieval_parity_gap@{k}", []).append(rate_gaps(counts[:, last], sizes))
                if asked is not None:
                    gaps = rate_gaps(asked[:, last], asked[:, -1])
                    found.setdefault(f"retrieval_opportunity_gap@{k}", []).append(gaps)
            found.setdefault("ndkl", []).append(ndkl_per_query(counts, share))
        means = {name: mean(np.concatenate(parts)) for name, parts in found.items()}
        return means | self._classification(weights, sizes)

    def _classification(self, weights: np.ndarray | None, sizes: np.ndarray) -> dict[str, float]:
        count = partial(answer_counts, group=self.group, classes=self.classes, groups=self.groups, weights=weights)
        answered = count(self.answers)
        found = {"demographic_parity_gap": mean(rate_gaps(answered[answered.any(axis=1)], sizes))}
        if self.labels is not None:
            right = np.where(self.answers == self.labels, self.labels, -1)
            found["equal_opportunity_gap"] = mean(rate_gaps(count(right), count(self.labels)))
        return found


def fairness_report(
    scores: Mapping[str, np.ndarray],
    groups: Sequence[Any] | np.ndarray,
    ks: Sequence[float],
    *,
    base: str | None = None,
    labels: np.ndarray | None = None,
    clusters: np.ndarray | None = None,
    desired: Desired = "dataset",
    zero_count: float = 1.0,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """Compute the bias of several models with intervals over images, in nats or as a difference of probabilities.

    - max_skew@k, min_skew@k, ndkl: of retrieval, averaged over queries.
    - retrieval_parity_gap@k: largest difference between groups of P(in the top k | group).
    - retrieval_opportunity_gap@k: the same over relevant images only; with `labels`.
    - demographic_parity_gap: largest difference between groups of P(answer | group), averaged over queries; the answer
      for an image is the query that matches it best.
    - equal_opportunity_gap: the same over images for which that answer is right; with `labels`.
    - <metric>_difference: metric - base metric, paired on the same images.
    - <metric>_reduction: 100 (1 - metric / base metric), in percent. Every metric is 0 if groups are treated alike.

    None of these metrics is a mean over images, so every resample of the images (or clusters) is ranked again; the
    desired share "dataset" is then that of the resample. By noise alone, a largest skew or gap is higher in a resample
    than in the data. The interval excludes this bias: it is the spread of the resamples, centered on the value. Use
    `chance_level` to see how much of the value itself is noise.

    Args:
        scores: Arrays [Q, N] by model, as from `query_scores`, all for the same queries and images.
        groups: N groups, as for `skew_at_k`.
        ks: Numbers of images, or shares of them below 1.
        base: Name of the model that the others are compared with; None for no differences.
        labels: Array [N] of the right query 0..Q-1 for each image, -1 for none; None if no query is right.
        clusters: Array [N] that identifies related images (subject, scene); None if images are independent.
        desired: As for `skew_at_k`.
        zero_count: As for `skew_at_k`.
        confidence: Coverage of the intervals, in (0, 1).
        resamples: Number of resamples; 0 for no intervals.
        seed: Seed of the resamples.

    Returns:
        Estimates by model and metric.

    Raises:
        ValueError: If there are no models or ks, `base` is unknown, scores, labels or clusters have different lengths,
            or as for `skew_at_k`.
        TypeError: As for `skew_at_k`.
    """
    names, group = number_groups(groups)
    numbers = [top_k(k, len(group), desired) for k in ks]
    shapes = {np.shape(table) for table in scores.values()}
    if not numbers or len(shapes) != 1 or any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"Expected at least one k, and scores [Q, N] of each model, got {list(ks)} and {shapes}.")
    if base is not None and base not in scores:
        raise ValueError(f"base is {base!r}, which is none of the models {list(scores)}. Name one of them.")
    for called, rows in (("labels", labels), ("clusters", clusters)):
        if rows is not None and np.shape(rows) != group.shape:
            raise ValueError(
                f"{called} must have one entry for each of the {len(group)} images, got {np.shape(rows)}."
            )
    if resamples < 0 or not 0 < confidence < 1:
        raise ValueError(f"Expected resamples >= 0 and a confidence in (0, 1), got {resamples} and {confidence}.")
    shares = partial(desired_shares, desired, names)
    measures = {
        name: _Measure(table, group, shares, len(names), numbers, labels, zero_count) for name, table in scores.items()
    }
    value = _compared({name: measure() for name, measure in measures.items()}, base)
    drawn: dict[str, dict[str, list[float]]] = {name: {metric: [] for metric in value[name]} for name in value}
    for weights in _resampled(len(group), clusters, resamples, seed):
        for name, metrics in _compared({name: measure(weights) for name, measure in measures.items()}, base).items():
            for metric, number in metrics.items():
                drawn[name][metric].append(number)
    return {
        name: {
            metric: _estimate(metric, number, np.array(drawn[name][metric]), confidence)
            for metric, number in metrics.items()
        }
        for name, metrics in value.items()
    }


def _resampled(images: int, clusters: np.ndarray | None, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each image is drawn, `resamples` times."""
    _, member = np.unique(np.arange(images) if clusters is None else clusters, return_inverse=True)
    total = int(member.max()) + 1
    rng = np.random.default_rng(seed)
    for _ in range(resamples if total > 1 else 0):
        yield np.bincount(rng.integers(0, total, total), minlength=total)[member]


def _compared(found: Mapping[str, dict[str, float]], base: str | None) -> dict[str, dict[str, float]]:
    """Return the metrics of each model and, for all but the base, their difference and reduction."""
    result = {name: dict(metrics) for name, metrics in found.items()}
    for name, metrics in found.items():
        if base is None or name == base:
            continue
        before = found[base]
        result[name] |= {f"{metric}_difference": now - before[metric] for metric, now in metrics.items()}
        result[name] |= {
            f"{metric}_reduction": 100 * (1 - now / before[metric]) if before[metric] else math.nan
            for metric, now in metrics.items()
        }
    return result


def _estimate(metric: str, value: float, drawn: np.ndarray, confidence: float) -> Estimate:
    defined = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or not len(defined) or len(defined) < confidence * len(drawn):
        return Estimate(value if math.isfinite(value) else math.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined - defined.mean() + value, [tail, 1 - tail])
    if not metric.endswith(("_difference", "_reduction")):
        # The lowest skew is at most 0, unless zero_count lifts the count of every group.
        most = max(0, value, defined.max())
        low, high = (low, min(high, most)) if metric.startswith("min_skew") else (max(low, 0), high)
    return Estimate(value, float(low), float(high))


def chance_level(
    groups: Sequence[Any] | np.ndarray,
    ks: Sequence[float],
    *,
    desired: Desired = "dataset",
    zero_count: float = 1.0,
    rankings: int = 200,
    seed: int = 0,
) -> dict[str, float]:
    """Compute the metrics of a model that ranks images at random: the noise in metrics whose ideal is 0.

    Args:
        groups: As for `fairness_report`.
        ks: As for `fairness_report`.
        desired: As for `fairness_report`.
        zero_count: As for `fairness_report`.
        rankings: Number of random rankings to average.
        seed: Seed of the rankings.

    Returns:
        max_skew@k, min_skew@k, retrieval_parity_gap@k and ndkl.
    """
    scores = np.random.default_rng(seed).random((rankings, len(groups)))
    found = fairness_report({"chance": scores}, groups, ks, desired=desired, zero_count=zero_count, resamples=0)[
        "chance"
    ]
    return {metric: e.value for metric, e in found.items() if metric != "demographic_parity_gap"}
