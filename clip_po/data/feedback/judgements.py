"""What annotators answer, as scores of the candidates."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WORSE = -math.inf
"""Score of a candidate of which it is only known that another one was chosen."""

TIES = ("tie", "both", "equal", "same", "neither", "none")
POSITIVE = ("yes", "true", "good", "positive", "correct", "right", "like", "up", "thumbs up", "1")
NEGATIVE = ("no", "false", "bad", "negative", "incorrect", "wrong", "dislike", "down", "thumbs down", "0")
"""Answers that readers understand without being told, in any spelling of case, spaces, hyphens and underscores."""

Scores = Sequence[float | None]
"""Scores of the candidates by one annotator, higher is better; None for one that was not judged."""


@dataclass(frozen=True)
class Words:
    """What the answers of annotators mean.

    Attributes:
        names: What answers call the candidates, in their order.
        ties: Answers that prefer none.
        positive: Answers that call a single text right for its image.
        negative: Answers that call it wrong.
    """

    names: Sequence[str]
    ties: Collection[Any] = TIES
    positive: Collection[Any] = POSITIVE
    negative: Collection[Any] = NEGATIVE


@dataclass(frozen=True)
class Judged:
    """Candidates with what the annotators said about them.

    Attributes:
        where: The row or task, for messages.
        images: Images as stored: paths, bytes, or mappings with `bytes` and `path`. One, or the candidates.
        texts: Texts. One, or the candidates. One image with one text is unpaired feedback.
        scores: Scores by annotator.
        problem: Why the row can't be used; "" if nothing is known against it.
    """

    where: str
    images: Sequence[Any]
    texts: Sequence[str]
    scores: Sequence[Scores] = field(default_factory=list)
    problem: str = ""


def plain(answer: Any) -> str:
    """Return an answer in lower case, with single spaces for spaces, hyphens and underscores.

    Args:
        answer: A text, number or truth value.

    Returns:
        The text. Whole numbers have no decimals.
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return " ".join(str(answer).casefold().replace("_", " ").replace("-", " ").split())


def scores_of(answer: Any, words: Words) -> Scores:
    """Return the scores that an answer gives to the candidates.

    Args:
        answer: The name of the best candidate; a ranking, as a list of names with the best first, of mappings with
            `rank` and `value`, or as a mapping of `rank` and `value` to lists; or, for a single candidate, whether it
            is right.
        words: What answers mean.

    Returns:
        Scores by candidate.

    Raises:
        ValueError: If the answer is none of these.
    """
    if len(words.names) == 1:
        return [_truth(answer, words)]
    if isinstance(answer, Mapping) and {"rank", "value"} <= answer.keys():
        return _by_rank(answer["value"], answer["rank"], words)
    if isinstance(answer, (list, tuple)) and answer and all(isinstance(part, Mapping) for part in answer):
        return _by_rank([part.get("value") for part in answer], [part.get("rank") for part in answer], words)
    if isinstance(answer, (list, tuple)):
        return _by_rank(answer, range(len(answer)), words)
    if plain(answer) in map(plain, words.ties):
        return [0.0] * len(words.names)
    chosen = _position(answer, words)
    return [1.0 if position == chosen else WORSE for position in range(len(words.names))]


def _truth(answer: Any, words: Words) -> float:
    for value, meaning in ((1.0, words.positive), (-1.0, words.negative), (0.0, words.ties)):
        if plain(answer) in map(plain, meaning):
            return value
    raise ValueError(f"the answer {answer!r} is neither right nor wrong. Name its meaning with positive and negative")


def _by_rank(names: Sequence[Any], ranks: Sequence[Any], words: Words) -> Scores:
    scores: list[float | None] = [None] * len(words.names)
    for position, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        scores[_position(name, words)] = -float(position if rank is None else rank)
    return scores


def _position(name: Any, words: Words) -> int:
    spelled = [plain(known) for known in words.names]
    if plain(name) not in spelled:
        raise ValueError(f"the answer {name!r} is none of the candidates {list(words.names)}. Name them with answers")
    return spelled.index(plain(name))
