"""Exports of Label Studio in its JSON format."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from datasets import Dataset

from clip_po.bounded_text import parse_json
from clip_po.data.feedback.agreement import Agreement
from clip_po.data.feedback.columns import candidate_columns, described
from clip_po.data.feedback.feedback_rows import feedback_dataset
from clip_po.data.feedback.judgements import NEGATIVE, POSITIVE, TIES, Judged, Scores, Words, scores_of
from clip_po.data.formats import as_list

SIDES = ("left", "right")
"""What a Pairwise tag calls its two objects."""

_SOURCE = re.compile(r"""\bsrc\s*=\s*['"]?([^'"\s>]+)""")


def read_label_studio(
    file: str | os.PathLike[str],
    control: str | Sequence[str],
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
    """Return the feedback in a JSON export of Label Studio, in one of the row formats.

    Read is the format called JSON of Label Studio 1, a list of tasks with `data` and `annotations`; JSON-MIN and CSV
    leave out who answered. The values of controls are those of label-studio-sdk 2.1.2. Annotations that were cancelled
    do not count, predictions neither. Supported controls:

    - Pairwise: the left or the right of two candidates.
    - Choices: the name of a candidate, a tie, or whether one image and one text belong together (thumbs).
    - Ranker: the order of the items of a List, whose ids are the names of the candidates.
    - Rating: a control for each candidate.

    Args:
        file: The export.
        control: Name of the control (`from_name`), or of a Rating for each candidate, in their order.
        image: Key of the image in `data`. Several keys are candidates for one text; so are the items of a List, each
            with an `image` or with `html` that holds an `<img src=...>`.
        text: Key of the text in `data`. Several keys are candidates for one image; so are the items of a List, each
            with a `text`, `body` or `title`.
        answers: What the answers call the candidates, in their order. None for the ids of a List, or the keys. A
            Pairwise says left and right, which are the first and the second.
        ties: As for `read_argilla`.
        positive: As for `read_argilla`.
        negative: As for `read_argilla`.
        agreement: As for `read_argilla`.
        folder: Folder of the images; None for that of the export. "/data/local-files/?d=PATH" is PATH in this folder,
            "/data/upload/PATH" is upload/PATH, as in Label Studio's media folder.

    Returns:
        As for `read_argilla`. Tasks are named by their id.

    Raises:
        ValueError: If the file is not such an export, `image` and `text` both have several keys, or no task can be
            used.
        OSError: If the file can't be read.
    """
    images, texts = candidate_columns(image, text)
    tasks = _tasks(file)

    def judged() -> Iterator[Judged]:
        for position, task in enumerate(tasks):
            where = f"task {task.get('id', position)}"
            data = task.get("data") or {}
            if missing := [key for key in (*images, *texts) if key not in data]:
                yield Judged(where, [], [], problem=f"its data has no {missing[0]!r}, only {sorted(data)}")
                continue
            pictures, ids = _values(data, images, ("image", "html"))
            read, text_ids = _values(data, texts, ("text", "body", "title"))
            words = Words(answers or (ids if len(pictures) > 1 else text_ids), ties, positive, negative)
            yield described(
                where,
                [_path(picture) for picture in pictures],
                read,
                partial(_scores, task, as_list(control), words),
            )

    return feedback_dataset(judged(), Path(file).parent if folder is None else folder, agreement)


def _tasks(file: str | os.PathLike[str]) -> list[dict[str, Any]]:
    try:
        tasks = parse_json(Path(file).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Export the project in the format JSON.") from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and "annotations" in task for task in tasks):
        raise ValueError(
            f"{file} is not an export of Label Studio in the format JSON: it must be a list of tasks with data and "
            "annotations. JSON-MIN and CSV do not have them."
        )
    return tasks


def _values(data: Mapping[str, Any], keys: Sequence[str], parts: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Return the values of keys with their names. The items of a List are values with ids as names."""
    if len(keys) > 1 or not isinstance(data[keys[0]], list):
        return [data[key] for key in keys], list(keys)
    items = [item if isinstance(item, Mapping) else {"id": item, parts[0]: item} for item in data[keys[0]]]
    values = [next((item[part] for part in parts if item.get(part)), None) for item in items]
    return values, [str(item.get("id", position)) for position, item in enumerate(items)]


def _path(image: Any) -> Any:
    """Return the path of an image in the folder of the images."""
    if not isinstance(image, str):
        return image
    if "<" in image and (source := _SOURCE.search(image)):
        image = source[1]
    parts = urlsplit(image)
    if parts.path.rstrip("/").endswith("/data/local-files"):
        return next(iter(parse_qs(parts.query).get("d", [])), image)
    _, upload, name = parts.path.partition("/data/upload/")
    return f"upload/{unquote(name)}" if upload else image


def _scores(task: Mapping[str, Any], controls: Sequence[str], words: Words) -> list[Scores]:
    """Return the scores of each annotation of a task.

    Args:
        task: The task.
        controls: Names of the controls.
        words: What answers mean.

    Returns:
        Scores by annotation.

    Raises:
        ValueError: If an answer is not understood.
    """
    found: list[Scores] = []
    for annotation in task["annotations"]:
        if annotation.get("was_cancelled"):
            continue
        results = {result.get("from_name"): result for result in annotation.get("result") or []}
        if len(controls) > 1:
            rated = [results.get(name, {}).get("value", {}).get("rating") for name in controls]
            found.append([None if rating is None else float(rating) for rating in rated])
        elif controls[0] in results:
            found.append(scores_of(_answer(results[controls[0]], words.names), words))
    return found


def _answer(result: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the answer in a result of one control.

    Args:
        result: The result.
        names: What answers call the candidates.

    Returns:
        As for `scores_of`.

    Raises:
        ValueError: If the control is of another type.
    """
    value = result.get("value") or {}
    if "selected" in value:
        return names[SIDES.index(value["selected"])] if value["selected"] in SIDES else value["selected"]
    if "ranker" in value:
        ranked = value["ranker"]
        lists = [ids for ids in ranked.values() if ids] if isinstance(ranked, Mapping) else [ranked]
        if len(lists) != 1:
            raise ValueError(f"its items are in the buckets {sorted(ranked)}, which have no order")
        return lists[0]
    if len(value.get("choices") or []) == 1:
        return value["choices"][0]
    if "rating" in value:
        return value["rating"]
    raise ValueError(f"its control of type {result.get('type')!r} has the value {value!r}, which is no preference")
