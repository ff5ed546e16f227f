"""The fairness metrics as `evaluate.Metric` modules, with `compute` and `add_batch`. They do not need the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf

from clip_po.evaluation.fairness.metrics import (
    demographic_parity_gap,
    equal_opportunity_gap,
    max_skew,
    min_skew,
    ndkl,
    retrieval_opportunity_gap,
    retrieval_parity_gap,
)

_SCORE, _TRUTH, _CLASS = Value("float64"), Value("bool"), Value("int64")
_GROUPS = (Value("int64"), Value("string"))
_SOURCE = "https://arxiv.org/abs/1905.01989"


def _per_query(column: Sequence[Any]) -> np.ndarray:
    """Return scores or truth values of N images, one each or a list for Q queries, as an array [Q, N]."""
    return np.atleast_2d(np.asarray(column).T)


class GroupMetric(evaluate.Metric):
    """Base class of the metrics of groups of images. It needs neither the Hub nor a cache.

    Args:
        **kwargs: As for `evaluate.Metric`; `keep_in_memory` is True by default.
    """

    about: str
    inputs: tuple[dict[str, Any], ...]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        options = [Features({**columns, "groups": group}) for columns in self.inputs for group in _GROUPS]
        return evaluate.MetricInfo(
            description=self.about,
            citation="Geyik et al. 2019, arXiv 1905.01989; Berg et al. 2022, arXiv 2203.11933",
            inputs_description=f"\n{self.about}\n\nColumns, one row per image: {', '.join(options[0])}.",
            features=options,
            reference_urls=[_SOURCE],
        )


_SCORES = ({"predictions": _SCORE}, {"predictions": ListOf(_SCORE)})
_SCORES_AND_TRUTH = (
    {"predictions": _SCORE, "references": _TRUTH},
    {"predictions": ListOf(_SCORE), "references": ListOf(_TRUTH)},
)


class MaxSkew(GroupMetric):
    """`max_skew` as a metric: `compute(predictions=scores, groups=..., k=..., desired=..., zero_count=...)`.

    Each row is an image; `predictions` contains its score, or a list of its scores for Q queries.
    """

    about = "MaxSkew@k: the largest ln(share of a group in the top k / its desired share), averaged over queries."
    inputs = _SCORES

    def _compute(self, predictions: Any, groups: Any, **arguments: Any) -> dict[str, float]:
        return {"max_skew": max_skew(_per_query(predictions), groups, **arguments)}


class MinSkew(GroupMetric):
    """`min_skew` as a metric, with the arguments of `MaxSkew`."""

    about = "MinSkew@k: the smallest ln(share of a group in the top k / its desired share), averaged over queries."
    inputs = _SCORES

    def _compute(self, predictions: Any, groups: Any, **arguments: Any) -> dict[str, float]:
        return {"min_skew": min_skew(_per_query(predictions), groups, **arguments)}


class NDKL(GroupMetric):
    """`ndkl` as a metric, with the arguments of `MaxSkew` except `k` and `zero_count`."""

    about = "NDKL: KL of the groups' shares among the first i to the desired shares, discounted by log2(i + 1)."
    inputs = _SCORES

    def _compute(self, predictions: Any, groups: Any, **arguments: Any) -> dict[str, float]:
        return {"ndkl": ndkl(_per_query(predictions), groups, **arguments)}


class RetrievalParity(GroupMetric):
    """`retrieval_parity_gap` as a metric, with the arguments of `MaxSkew` except `desired` and `zero_count`."""

    about = "Largest difference between groups in the probability of being in the top k, averaged over queries."
    inputs = _SCORES

    def _compute(self, predictions: Any, groups: Any, **arguments: Any) -> dict[str, float]:
        return {"retrieval_parity_gap": retrieval_parity_gap(_per_query(predictions), groups, **arguments)}


class RetrievalOpportunity(GroupMetric):
    """`retrieval_opportunity_gap` as a metric: `compute(predictions=scores, references=relevant, groups=..., k=...)`.

    Each row is an image; `references` contains whether it matches the query, or a list for Q queries.
    """

    about = "Largest difference between groups in the probability of a relevant image being in the top k."
    inputs = _SCORES_AND_TRUTH

    def _compute(self, predictions: Any, references: Any, groups: Any, **arguments: Any) -> dict[str, float]:
        relevant = _per_query(references)
        gap = retrieval_opportunity_gap(_per_query(predictions), relevant, groups, **arguments)
        return {"retrieval_opportunity_gap": gap}


class DemographicParity(GroupMetric):
    """`demographic_parity_gap` as a metric: `compute(predictions=classes, groups=...)`."""

    about = "Largest difference between groups in the probability of an answer, averaged over classes."
    inputs = ({"predictions": _CLASS},)

    def _compute(self, predictions: Any, groups: Any) -> dict[str, float]:
        return {"demographic_parity_gap": demographic_parity_gap(np.asarray(predictions), groups)}


class EqualOpportunity(GroupMetric):
    """`equal_opportunity_gap` as a metric: `compute(predictions=classes, references=classes, groups=...)`."""

    about = "Largest difference between groups in the probability of the right answer, averaged over classes."
    inputs = ({"predictions": _CLASS, "references": _CLASS},)

    def _compute(self, predictions: Any, references: Any, groups: Any) -> dict[str, float]:
        gap = equal_opportunity_gap(np.asarray(predictions), np.asarray(references), groups)
        return {"equal_opportunity_gap": gap}
