"""Fairness metrics of rankings and answers: MaxSkew@k, MinSkew@k, NDKL, and parity gaps.

Published implementations differ in three choices, so each is an argument here:

- `desired`: the desired share of each group. "dataset" is the share of the group among all images (demographic parity
  in Berg et al.), "uniform" is the same share for each group; or give shares by group.
- `zero_count`: the smallest count of a group in the top k, >= 0. With 1, as in the code of Berg et al., an absent
  group counts as one image, so that its skew is finite. With 0 its skew is minus infinity.
- `k`: a number of images, or a share of them below 1 (rounded up).

Tied images have no order: a top k that ends among them contains the expected number of each group, so that no result
depends on the order of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_po.validation import NOT_NEGATIVE, check_number

Desired = str | Mapping[Any, float]
"""The desired share of each group: "dataset", "uniform", or shares by group."""


@dataclass(frozen=True)
class Rankings:
    """N images as ranked by Q queries.

    Attributes:
        order: Array [Q, N], the image at each rank.
        group: Array [Q, N], the group of the image at each rank, 0..G-1; any other number means no group.
        tie: Array [Q, N]; images at ranks with the same number are tied. None if there are no ties.
        groups: Number G of groups.
    """

    order: np.ndarray
    group: np.ndarray
    tie: np.ndarray | None
    groups: int

    def counts(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Count the images of each group among the first i, for every i.

        Args:
            weights: Array [N] of whole numbers, how often each image is counted; None for once.

        Returns:
            Array [Q, M, G] of counts among the first 1..M; M is N, or the sum of the weights. Among tied images the
            counts are expected values.
        """
        times = None if weights is None else weights[self.order]
        group = _repeat(self.group, times)
        counts = np.stack([np.cumsum(group == number, axis=1) for number in range(self.groups)], axis=-1)
        if self.tie is None:
            return counts.astype(np.float64)
        return _expected(counts, _repeat(self.tie, times))


def _repeat(rows: np.ndarray, times: np.ndarray | None) -> np.ndarray:
    # The weights of every row have the same sum: all rows contain the same images.
    return rows if times is None else np.repeat(rows.ravel(), times.ravel()).reshape(len(rows), -1)


def _expected(counts: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """Return counts [Q, M, G] that increase evenly from the start of each run of ties [Q, M] to its end."""
    queries, ranks, groups = counts.shape
    runs = (tie + np.arange(queries)[:, None] * (tie.max() + 1)).ravel()
    first, last = np.searchsorted(runs, runs, "left"), np.searchsorted(runs, runs, "right") - 1
    flat = counts.reshape(-1, groups).astype(np.float64)
    before = np.where((first % ranks == 0)[:, None], 0, flat[first - 1])
    part = (np.arange(len(runs)) - first + 1) / (last - first + 1)
    return (before + part[:, None] * (flat[last] - before)).reshape(counts.shape)


def rank_images(scores: np.ndarray, group: np.ndarray, groups: int) -> Rankings:
    """Rank images by their scores, highest first.

    Args:
        scores: Array [Q, N] (or [N] for one query) of finite numbers.
        group: Array [N] of group numbers, or [Q, N] if they depend on the query.
        groups: Number of groups.

    Returns:
        The rankings of the Q queries.

    Raises:
        ValueError: If a score is not finite, there are no images, or there are not as many groups as images.
    """
    table = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if table.ndim != 2 or not table.size or group.shape[-1] != table.shape[1]:
        raise ValueError(
            f"Expected scores [Q, N] and a group for each of the N images, got scores of shape {np.shape(scores)} and "
            f"{group.shape[-1]} groups."
        )
    if not np.isfinite(table).all():
        raise ValueError(
            "The scores contain nan or infinity: the model is broken, or its precision is too low. Load an earlier "
            "checkpoint, or use float32."
        )
    order = np.argsort(-table, axis=1, kind="stable")
    ranked = np.take_along_axis(table, order, axis=1)
    falls = np.diff(ranked, axis=1) < 0
    tie = None if falls.all() else np.pad(np.cumsum(falls, axis=1), ((0, 0), (1, 0)))
    return Rankings(order, np.take_along_axis(np.broadcast_to(group, table.shape), order, axis=1), tie, groups)


def number_groups(groups: Sequence[Any] | np.ndarray) -> tuple[list[Any], np.ndarray]:
    """Return the different groups, sorted, and the number of each image's group.

    Args:
        groups: N names or numbers.

    Returns:
        G groups, and an array [N] of 0..G-1.

    Raises:
        ValueError: If there are fewer than two groups.
    """
    names, number = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"There must be at least two groups to compare, got {names.tolist()}.")
    return names.tolist(), number


def desired_shares(desired: Desired, names: Sequence[Any], sizes: np.ndarray) -> np.ndarray:
    """Return the desired share of each group.

    Args:
        desired: "dataset", "uniform", or positive shares by group that sum to 1.
        names: The G groups.
        sizes: Array [G] of numbers of images.

    Returns:
        Array [G] of shares.

    Raises:
        ValueError: If `desired` is none of these.
    """
    if isinstance(desired, Mapping):
        shares = np.array([desired.get(name, 0) for name in names], dtype=np.float64)
        if set(desired) != set(names) or not (shares > 0).all() or abs(shares.sum() - 1) > 1e-6:
            raise ValueError(
                f"desired must give each of the groups {list(names)} a share above 0, and the shares must sum to 1, "
                f"got {dict(desired)}."
            )
        return shares
    if desired == "dataset":
        return sizes / sizes.sum()
    if desired == "uniform":
        return np.full(len(names), 1 / len(names))
    raise ValueError(f'desired must be "dataset", "uniform" or shares by group, got {desired!r}.')


def top_k(k: float, images: int, desired: Desired = "uniform") -> int:
    """Return the number of images for a k.

    Args:
        k: A whole number >= 1, or a share of the images in (0, 1), which is rounded up.
        images: Number of images.
        desired: As for `desired_shares`.

    Returns:
        A whole number in 1..`images`.

    Raises:
        ValueError: If k is neither, is greater than the number of images, or is equal to it with the desired share
            "dataset".
    """
    if not (0 < k < 1 or (k >= 1 and float(k).is_integer())):
        raise ValueError(f"k must be a whole number of images >= 1, or a share of them below 1, got {k!r}.")
    number = math.ceil(k * images) if k < 1 else int(k)
    if number > images:
        raise ValueError(f"k is {number}, but there are only {images} images. Give a smaller k.")
    if number == images and isinstance(desired, str) and desired == "dataset":
        raise ValueError(
            f'k is {number}, which is all images. With the desired share "dataset" the skew would be 0 for any model. '
            'Give a smaller k, or the desired share "uniform".'
        )
    return number


def skews(counts: np.ndarray, share: np.ndarray, zero_count: float = 1.0) -> np.ndarray:
    """Compute the logarithm of each group's share of the top k divided by its desired share.

    Args:
        counts: Array [Q, G] of counts of each group in the top k.
        share: Array [G] of desired shares.
        zero_count: Smallest count, >= 0.

    Returns:
        Array [Q, G], in nats; nan for a group whose desired share is 0.

    Raises:
        TypeError: If `zero_count` is not a number.
        ValueError: If `zero_count` is negative or not finite.

    Source: Geyik et al. 2019, arXiv 1905.01989, Sec. 4.1 (skew@k).
    """
    check_number("zero_count", zero_count, NOT_NEGATIVE, "1 is usual.")
    k = counts.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(np.where(share > 0, np.maximum(counts, zero_count) / k / share, np.nan))


def ndkl_per_query(counts: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Compute the KL of the shares among the first i to the desired shares, discounted by log2(i + 1), normalized.

    Args:
        counts: Array [Q, M, G], as from `Rankings.counts`.
        share: Array [G] of desired shares.

    Returns:
        Array [Q], in nats, >= 0.

    Source: Geyik et al. 2019, arXiv 1905.01989, Sec. 4.1 (NDKL, with the natural logarithm).
    """
    rank = np.arange(1, counts.shape[1] + 1)
    found = counts / rank[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(counts > 0, found * np.log(found / share), 0)
    discount = 1 / np.log2(rank + 1)
    return terms.sum(axis=-1) @ discount / discount.sum()


def rate_gaps(counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Compute the difference of the largest and smallest rate counts / sizes over groups that are not empty.

    Args:
        counts: Array [Q, G].
        sizes: Array [G] or [Q, G].

    Returns:
        Array [Q], 0..1; nan where fewer than two groups are not empty.
    """
    sizes = np.broadcast_to(sizes, counts.shape)
    there = sizes > 0
    rates = counts / np.where(there, sizes, 1)
    gaps = np.where(there, rates, -np.inf).max(axis=1) - np.where(there, rates, np.inf).min(axis=1)
    return np.where(there.sum(axis=1) > 1, gaps, np.nan)


def answer_counts(
    answers: np.ndarray, group: np.ndarray, classes: int, groups: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Count how often each class is the answer for images of each group.

    Args:
        answers: Array [N] of class numbers; negative ones are not counted.
        group: Array [N] of group numbers.
        classes: Number C of classes.
        groups: Number G of groups.
        weights: Array [N], how often each image is counted; None for once.

    Returns:
        Array [C, G].
    """
    kept = answers >= 0
    pairs = (answers * groups + group)[kept]
    return np.bincount(pairs, None if weights is None else weights[kept], classes * groups).reshape(classes, groups)


def mean(values: np.ndarray) -> float:
    """Compute the mean of the values that are not nan.

    Args:
        values: Array of floats of any shape.

    Returns:
        The mean; nan if there are no such values.
    """
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else math.nan


def skew_at_k(
    scores: np.ndarray,
    groups: Sequence[Any] | np.ndarray,
    k: float,
    desired: Desired = "dataset",
    zero_count: float = 1.0,
) -> dict[Any, np.ndarray]:
    """Compute the skew of every group in the top k of every query: above 0 if the group is over-represented.

    Args:
        scores: Array [Q, N] of scores of images for each query; or [N] for one query.
        groups: The group of each image, names or numbers.
        k: Number of images, or share of them below 1.
        desired: "dataset", "uniform", or shares by group.
        zero_count: Smallest count of a group, >= 0.

    Returns:
        Arrays [Q] by group, in nats.

    Raises:
        TypeError: As for `skews`.
        ValueError: As for `number_groups`, `rank_images`, `desired_shares`, `top_k` and `skews`.

    Source: Geyik et al. 2019, arXiv 1905.01989, Sec. 4.1.
    """
    names, number = number_groups(groups)
    rankings = rank_images(scores, number, len(names))
    share = desired_shares(desired, names, np.bincount(number))
    counts = rankings.counts()[:, top_k(k, len(number), desired) - 1]
    return dict(zip(names, skews(counts, share, zero_count).T, strict=True))


def max_skew(
    scores: np.ndarray,
    groups: Sequence[Any] | np.ndarray,
    k: float,
    desired: Desired = "dataset",
    zero_count: float = 1.0,
) -> float:
    """Compute MaxSkew@k: the largest skew of a group, averaged over queries.

    Args:
        scores: As for `skew_at_k`.
        groups: As for `skew_at_k`.
        k: As for `skew_at_k`.
        desired: As for `skew_at_k`.
        zero_count: As for `skew_at_k`.

    Returns:
        The mean, in nats, >= 0; 0 is fair.

    Raises:
        ValueError, TypeError: As for `skew_at_k`.

    Source: Geyik et al. 2019, arXiv 1905.01989, Sec. 4.1; on CLIP: Berg et al. 2022, arXiv 2203.11933, Sec. 3.
    """
    return mean(np.max(list(skew_at_k(scores, groups, k, desired, zero_count).values()), axis=0))


def min_skew(
    scores: np.ndarray,
    groups: Sequence[Any] | np.ndarray,
    k: float,
    desired: Desired = "dataset",
    zero_count: float = 1.0,
) -> float:
    """Compute MinSkew@k: the smallest skew of a group, averaged over queries.

    Args:
        scores: As for `skew_at_k`.
        groups: As for `skew_at_k`.
        k: As for `skew_at_k`.
        desired: As for `skew_at_k`.
        zero_count: As for `skew_at_k`.

    Returns:
        The mean, in nats; 0 is fair. It is <= 0 unless `zero_count` raises a count. With `zero_count` = 0 an absent
        group makes it minus infinity.

    Raises:
        ValueError, TypeError: As for `skew_at_k`.

    Source: Geyik et al. 2019, arXiv 1905.01989, Sec. 4.1.
    """
    return mean(np.min(list(skew_at_k(scores, groups, k, desired, zero_count).values()), axis=0))


def ndkl(scores: np.ndarray, groups: Sequence[Any] | np.ndarray, desired: Desired = "dataset") -> float:
    """Compute the NDKL of the whole ranking, averaged over queries.

    Args:
        scores: As for `skew_at_k`.
        groups: As for `skew_at_k`.
        desired: As for `skew_at_k`.

    Returns:
        The mean, in nats, >= 0; 0 is fair.

    Raises:
        ValueError: As for `number_groups`, `rank_images` and `desired_shares`.

    Source: Geyik et al. 2019, arXiv 1905.01989, Sec. 4.1.
    """
    names, number = number_groups(groups)
    share = desired_shares(desired, names, np.bincount(number))
    return mean(ndkl_per_query(rank_images(scores, number, len(names)).counts(), share))


def retrieval_parity_gap(scores: np.ndarray, groups: Sequence[Any] | np.ndarray, k: float) -> float:
    """Compute the demographic parity gap of retrieval: how much P(in the top k | group) differs, 0..1.

    Args:
        scores: Array [Q, N], or [N] for one query.
        groups: The group of each image.
        k: Number of images, or share of them below 1.

    Returns:
        Difference of the largest and smallest probability, averaged over queries; 0 is fair.

    Raises:
        ValueError: As for `skew_at_k`.

    Source: Dwork et al. 2012, arXiv 1104.3913, Sec. 3 (statistical parity), for a top k.
    """
    names, number = number_groups(groups)
    counts = rank_images(scores, number, len(names)).counts()[:, top_k(k, len(number)) - 1]
    return mean(rate_gaps(counts, np.bincount(number)))


def retrieval_opportunity_gap(
    scores: np.ndarray, relevant: np.ndarray, groups: Sequence[Any] | np.ndarray, k: float
) -> float:
    """Compute the equal opportunity gap of retrieval: how much P(in the top k | relevant, group) differs, 0..1.

    Args:
        scores: Array [Q, N], or [N] for one query.
        relevant: Array of truth values of the same shape: whether the image matches the query.
        groups: The group of each image.
        k: Number of images, or share of them below 1.

    Returns:
        Difference of the largest and smallest probability, averaged over queries for which at least two groups have
        relevant images; 0 is fair.

    Raises:
        ValueError: As for `skew_at_k`.

    Source: Hardt et al. 2016, arXiv 1610.02413, Def. 2.2 (equal opportunity), for a top k.
    """
    names, number = number_groups(groups)
    asked = np.where(np.atleast_2d(relevant), number, len(names))
    counts = rank_images(scores, asked, len(names)).counts()
    return mean(rate_gaps(counts[:, top_k(k, len(number)) - 1], counts[:, -1]))


def demographic_parity_gap(predictions: np.ndarray, groups: Sequence[Any] | np.ndarray) -> float:
    """Compute the demographic parity gap of classification: how much P(answer = class | group) differs, 0..1.

    Args:
        predictions: Array [N] of classes, 0..C-1.
        groups: The group of each image.

    Returns:
        Difference of the largest and smallest probability, averaged over the predicted classes; 0 is fair.

    Raises:
        ValueError: As for `number_groups`.

    Source: Dwork et al. 2012, arXiv 1104.3913, Sec. 3 (statistical parity).
    """
    names, number = number_groups(groups)
    counts = answer_counts(np.asarray(predictions), number, int(np.max(predictions)) + 1, len(names))
    return mean(rate_gaps(counts[counts.any(axis=1)], np.bincount(number)))


def equal_opportunity_gap(
    predictions: np.ndarray, references: np.ndarray, groups: Sequence[Any] | np.ndarray
) -> float:
    """Compute the equal opportunity gap of classification: how much P(answer = class | class, group) differs, 0..1.

    Args:
        predictions: Array [N] of classes, 0..C-1.
        references: Array [N] of true classes.
        groups: The group of each image.

    Returns:
        Difference of the largest and smallest probability, averaged over classes for which at least two groups have
        images; 0 is fair.

    Raises:
        ValueError: As for `number_groups`.

    Source: Hardt et al. 2016, arXiv 1610.02413, Def. 2.2.
    """
    names, number = number_groups(groups)
    truth = np.asarray(references)
    classes = int(truth.max()) + 1
    right = np.where(np.asarray(predictions) == truth, truth, -1)
    found, there = (answer_counts(labels, number, classes, len(names)) for labels in (right, truth))
    return mean(rate_gaps(found, there))
