"""Tables of answers: one line for each answer of an annotator."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from datasets import Dataset

from clip_po.data.feedback.agreement import Agreement
from clip_po.data.feedback.columns import candidate_columns, check_columns, described
from clip_po.data.feedback.feedback_rows import feedback_dataset
from clip_po.data.feedback.judgements import NEGATIVE, POSITIVE, TIES, Scores, Words, scores_of
from clip_po.data.formats import as_list
from clip_po.data.row_files import parse_list, read_rows


def read_answers(
    file: str | os.PathLike[str],
    *,
    image: str | Sequence[str] = "image",
    text: str | Sequence[str] = "text",
    answer: str | Sequence[str] = "answer",
    answers: Sequence[str] | None = None,
    ties: Collection[Any] = TIES,
    positive: Collection[Any] = POSITIVE,
    negative: Collection[Any] = NEGATIVE,
    agreement: Agreement = "majority",
) -> Dataset:
    """Return the feedback in a CSV, TSV, JSON lines or Parquet file, in one of the row formats.

    A line is the answer of one annotator. Lines with the same images and texts are answers to the same question.

    Args:
        file: The table. Paths of images are relative to it.
        image: Column of the image. Several columns are candidates for one text.
        text: Column of the text. Several columns are candidates for one image.
        answer: Column of the answer: the name of the better candidate; a ranking, as a list of names in JSON with the
            best first; or, for one image with one text, whether they belong together. Several columns are ratings of
            the candidates, in their order.
        answers: What the answers call the candidates, in their order; None for the names of their columns.
        ties: As for `read_argilla`.
        positive: As for `read_argilla`.
        negative: As for `read_argilla`.
        agreement: As for `read_argilla`.

    Returns:
        As for `read_argilla`.

    Raises:
        ValueError: If a column is missing, `image` and `text` both have several columns, no row can be used, or as for
            `clip_po.data.row_files.read_rows`.
        OSError: If the file can't be read.
    """
    images, texts = candidate_columns(image, text)
    words = Words(answers or (images if len(images) > 1 else texts), ties, positive, negative)
    columns = as_list(answer)
    questions: dict[bytes, tuple[dict[str, Any], list[int], list[list[Any]]]] = {}
    for number, row in enumerate(read_rows(Path(file))):
        if number == 0:
            check_columns(row, [*images, *texts, *columns], os.fspath(file))
        question = repr([row.get(column) for column in (*images, *texts)]).encode()
        _, numbers, given = questions.setdefault(blake2b(question).digest(), (row, [], []))
        numbers.append(number)
        given.append([parse_list(row.get(column)) for column in columns])
    items = (
        described(
            f"row {', '.join(map(str, numbers))}",
            [row[column] for column in images],
            [row[column] for column in texts],
            partial(_scores, given, words),
        )
        for row, numbers, given in questions.values()
    )
    return feedback_dataset(items, Path(file).parent, agreement)


def _scores(given: Sequence[Sequence[Any]], words: Words) -> list[Scores]:
    """Return the scores of each line: of its answer, or of a rating for each candidate."""
    if given and len(given[0]) > 1:
        return [[None if rating is None else float(rating) for rating in ratings] for ratings in given]
    return [scores_of(value, words) for (value,) in given if value is not None]
