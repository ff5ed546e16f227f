"""From the judgements of several annotators to rows: by majority, or with their disagreement as a soft label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, Literal

from clip_po.data.feedback.judgements import WORSE, Judged, Scores

Agreement = Literal["majority", "soft"]

Row = dict[str, Any]


def share_of_votes(scores: Sequence[Scores], first: int, second: int) -> float | None:
    """Return the share of annotators that prefer one candidate to another. A tie is half a vote for each.

    Args:
        scores: Scores by annotator.
        first: Position of a candidate.
        second: Position of another.

    Returns:
        The share in [0, 1]; None if nobody compared the two.
    """
    pairs = [(own[first], own[second]) for own in scores]
    known = [(a, b) for a, b in pairs if a is not None and b is not None and not a == b == WORSE]
    return sum((a > b) + (a == b) / 2 for a, b in known) / len(known) if known else None


def rows_of(judged: Judged, agreement: Agreement) -> Iterator[Row]:
    """Return a row for each pair of candidates that was compared; for a single candidate, whether it is right.

    Of a pair, the chosen candidate is the one with more votes. With "majority" the others do not count. With "soft"
    `label_smoothing` is their share, the probability that the preference is the other way round. Where both have as
    many votes, the first is chosen with a `label_smoothing` of 0.5, with which a loss prefers none.

    A single candidate on which annotators disagree becomes two rows, right and wrong, whose `weight` is the share of
    the votes; with "majority" only where both have as many.

    Args:
        judged: The candidates with the judgements.
        agreement: "majority" or "soft".

    Yields:
        Rows with `image`, `chosen` and `rejected`, or `text`, `chosen_image` and `rejected_image`, and
        `label_smoothing`; or rows with `image`, `text`, `label` and `weight`.
    """
    if len(judged.images) == len(judged.texts) == 1:
        yield from _unpaired(judged, agreement)
        return
    of_texts = len(judged.texts) > 1
    candidates = judged.texts if of_texts else judged.images
    for first, second in combinations(range(len(candidates)), 2):
        share = share_of_votes(judged.scores, first, second)
        if share is None:
            continue
        best, other = (first, second) if share >= 0.5 else (second, first)
        doubt = min(share, 1 - share)
        row = {"label_smoothing": doubt if agreement == "soft" or doubt == 0.5 else 0.0}
        if of_texts:
            yield {"image": judged.images[0], "chosen": candidates[best], "rejected": candidates[other], **row}
        else:
            yield {
                "text": judged.texts[0],
                "chosen_image": candidates[best],
                "rejected_image": candidates[other],
                **row,
            }


def _unpaired(judged: Judged, agreement: Agreement) -> Iterator[Row]:
    votes = [score for (score,) in judged.scores if score is not None]
    if not votes:
        return
    right = sum((vote > 0) + (vote == 0) / 2 for vote in votes) / len(votes)
    if agreement == "majority" and right != 0.5:
        right = float(right > 0.5)
    for label, weight in ((True, right), (False, 1 - right)):
        if weight:
            yield {"image": judged.images[0], "text": judged.texts[0], "label": label, "weight": weight}
