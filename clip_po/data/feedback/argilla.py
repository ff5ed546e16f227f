"""Datasets exported from Argilla."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, Image

from clip_po.data.feedback.agreement import Agreement
from clip_po.data.feedback.columns import candidate_columns, check_columns, described
from clip_po.data.feedback.feedback_rows import feedback_dataset
from clip_po.data.feedback.judgements import NEGATIVE, POSITIVE, TIES, Judged, Scores, Words, scores_of
from clip_po.data.formats import as_list
from clip_po.validation import check_column


def read_argilla(
    records: Dataset,
    question: str | Sequence[str],
    *,
    image: str | Sequence[str] = "image",
    text: str | Sequence[str] = "text",
    answers: Sequence[str] | None = None,
    ties: Collection[Any] = TIES,
    positive: Collection[Any] = POSITIVE,
    negative: Collection[Any] = NEGATIVE,
    agreement: Agreement = "majority",
    folder: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Return the feedback in a dataset exported from Argilla, in one of the row formats.

    Read are exports of Argilla 2 (`dataset.records.to_datasets()`, `dataset.to_hub`), where the answers to a question
    are the columns `<question>.responses`, `.responses.users` and `.responses.status`, and those of `FeedbackDataset`
    in Argilla 1, where they are one column of `user_id`, `value` and `status`. Only submitted answers count. The
    first layout was checked with the exporter of Argilla 2.8.0.

    Args:
        records: The export, as `datasets.load_dataset` or `datasets.load_from_disk` reads it.
        question: A question with one answer: a label or a ranking of the candidates, or, for one image with one text,
            whether they belong together. Or a rating question for each candidate, in their order.
        image: Field of the image. Several fields are candidates for one text.
        text: Field of the text. Several fields are candidates for one image.
        answers: What the answers call the candidates, in their order; None for the names of the fields.
        ties: Answers that prefer no candidate.
        positive: Answers that call a text right for its image. For a rating, numbers such as (4, 5).
        negative: Answers that call it wrong. Other answers leave the row out.
        agreement: How answers of several annotators are joined: "majority", or "soft", where the minority becomes
            `label_smoothing` or, for one image with one text, a row of its own with a `weight`.
        folder: Folder of the images, if the export has their paths.

    Returns:
        Rows with image, chosen and rejected; text, chosen_image and rejected_image; or image, text and label. Of three
        or more candidates, each pair that was compared is a row. A warning names the rows that were left out.

    Raises:
        ValueError: If a column is missing, `image` and `text` both have several fields, or no row can be used.
        TypeError: If `records` is not a single split.
    """
    images, texts = candidate_columns(image, text)
    questions = as_list(question)
    words = Words(answers or (images if len(images) > 1 else texts), ties, positive, negative)
    for argument, columns in (("image", images), ("text", texts)):
        for column in columns:
            check_column(records, column, argument)
    check_columns(records.column_names, [_column(records, name) for name in questions], "records")
    stored = records.with_format(None)
    for column, feature in records.features.items():
        if isinstance(feature, Image):
            stored = stored.cast_column(column, Image(decode=False))

    def judged() -> Iterator[Judged]:
        for number, row in enumerate(stored):
            yield described(
                f"row {number}",
                [row[column] for column in images],
                [row[column] for column in texts],
                partial(_scores, row, questions, words),
            )

    return feedback_dataset(judged(), folder, agreement)


def _column(records: Dataset, question: str) -> str:
    """Return the column of the answers to a question."""
    return question if question in records.column_names else f"{question}.responses"


def _scores(row: Mapping[str, Any], questions: Sequence[str], words: Words) -> list[Scores]:
    return scores_by_user([responses(row, name) for name in questions], words)


def responses(row: Mapping[str, Any], question: str) -> dict[str, Any]:
    """Return the submitted answers to a question.

    Args:
        row: A record.
        question: Name of the question.

    Returns:
        Answers by user; users without an id have their position.
    """
    if f"{question}.responses" in row:
        values = as_list(row[f"{question}.responses"])
        users = as_list(row.get(f"{question}.responses.users")) or [None] * len(values)
        statuses = as_list(row.get(f"{question}.responses.status")) or [None] * len(values)
    else:
        given = row[question] or []
        if isinstance(given, Mapping):  # a sequence of structs, as datasets stores it
            values, users, statuses = (as_list(given.get(name)) for name in ("value", "user_id", "status"))
        else:
            values, users, statuses = ([one.get(name) for one in given] for name in ("value", "user_id", "status"))
    return {
        str(user or position): value
        for position, (value, user, status) in enumerate(zip(values, users, statuses, strict=True))
        if value is not None and status in (None, "submitted")
    }


def scores_by_user(answers: Sequence[Mapping[str, Any]], words: Words) -> list[Scores]:
    """Return the scores of each user.

    Args:
        answers: Answers by user, for one question or for a rating of each candidate.
        words: What answers mean.

    Returns:
        Scores by user.

    Raises:
        ValueError: If an answer is not understood.
    """
    if len(answers) == 1:
        return [scores_of(answer, words) for answer in answers[0].values()]
    users = dict.fromkeys(user for of_question in answers for user in of_question)
    return [[None if user not in rated else float(rated[user]) for rated in answers] for user in users]
