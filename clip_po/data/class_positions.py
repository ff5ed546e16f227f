"""Class names and the positions that labels refer to: names that stay apart, texts in the order of the classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, List

from clip_po.data.attacks.words import spelling


def check_different_names(names: Sequence[str]) -> None:
    """Raise if two classes have one name, however it is spelled: training can't prefer one of them to the other.

    Args:
        names: The class names.

    Raises:
        ValueError: If two names are spellings of one word; the message names them.
    """
    classes: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        classes.setdefault(spelling(name), []).append(number)
    doubles = [numbers for numbers in classes.values() if len(numbers) > 1]
    if doubles:
        first = doubles[0]
        raise ValueError(
            f"class_names has one name more than once, {[names[number] for number in first]} for the classes {first}, "
            f"so no prompt or written word can tell them apart ({len(doubles)} such names in all). Rename these "
            "classes, or join them. An evaluation accepts such names."
        )


def misplaced_text(names: Sequence[str], texts: Sequence[str]) -> tuple[int, int] | None:
    """Return the first text that does not name the class at its position but another class, which its own does not.

    Texts in other words, which name no class, are accepted.

    Args:
        names: Names of C classes.
        texts: C prompts or other names, in the order of the classes.

    Returns:
        The position of the text, and the class that it names; None if the texts may be in the order of the classes.
    """
    numbers = {_words(name): number for number, name in enumerate(names)}
    named = [_class_named(text, numbers, position) for position, text in enumerate(texts)]
    for position, number in enumerate(named):
        if number not in (None, position) and named[number] != number:
            return position, number
    return None


def _class_named(text: str, numbers: Mapping[tuple[str, ...], int], own: int) -> int | None:
    """Return the class whose name is the longest one in a text: its own one if several are; None if there is none."""
    words = _words(text)
    for length in range(len(words), 0, -1):
        runs = (words[start : start + length] for start in range(len(words) - length + 1))
        found = [numbers[run] for run in runs if run in numbers]
        if found:
            return own if own in found else found[0]
    return None


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\s.,;:!?()'\"]+", spelling(text)))


def check_candidate_positions(features: Mapping[str, Any] | None, candidate_texts: Sequence[str], name: str) -> None:
    """Raise if candidate texts are not those of the classes of a class-preference, in the order of the labels.

    Args:
        features: Features of the dataset; columns without class names are not checked.
        candidate_texts: The candidate texts of every row.
        name: Name of the dataset in messages.

    Raises:
        ValueError: If there is another number of texts than classes, a text names another class than the one at its
            position, or the two columns have different class names.
    """
    named: dict[str, list[str]] = {}
    for column in ("label", "rejected_label"):
        feature = (features or {}).get(column)
        feature = feature.feature if isinstance(feature, List) else feature
        if isinstance(feature, ClassLabel):
            named[column] = feature.names
    for column, names in named.items():
        if len(names) != len(candidate_texts):
            raise ValueError(
                f"{name} column {column!r} has {len(names)} classes, but there are {len(candidate_texts)} "
                f"candidate_texts. Give one text for each of {shortened(names)}, in this order. For more candidates "
                f"than classes, cast the column first: dataset.cast_column({column!r}, datasets.Value('int64'))."
            )
        if (wrong := misplaced_text(names, candidate_texts)) is not None:
            position, other = wrong
            raise ValueError(
                f"candidate_texts[{position}] is {candidate_texts[position]!r}, but class {position} of {name} column "
                f"{column!r} is {names[position]!r}; the text names class {other}. Labels are positions in "
                f"candidate_texts. Give the texts in the order of the labels: {shortened(names)}."
            )
    if len(named) == 2 and named["label"] != named["rejected_label"]:
        raise ValueError(
            f"{name} columns 'label' and 'rejected_label' have different class names, {shortened(named['label'])} and "
            f"{shortened(named['rejected_label'])}. Cast both to the same datasets.ClassLabel."
        )


def shortened(names: Sequence[str]) -> str:
    """Return names as a list for messages.

    Args:
        names: Any number of names.

    Returns:
        The first ten, with "..." if there are more.
    """
    return f"{list(names[:10])}{'...' if len(names) > 10 else ''}"
