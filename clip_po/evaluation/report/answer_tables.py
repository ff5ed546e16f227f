"""Tables beside a report, to audit its numbers: the answer to each image, and the accuracy of each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import Dataset

from clip_po.evaluation.robustness import Answers


def answer_table(answers: Answers) -> Dataset:
    """Return the answers of all models, one row per item.

    Args:
        answers: Answers about N items.

    Returns:
        N rows with the number of the image among those measured (`image`, shared by its renderings), its true class
        (`label`), the written word (`word`), and the answer of each model to each variant, such as `base/typographic`.
    """
    names = np.array(answers.class_names, dtype=object)
    columns = {"image": answers.cluster, "label": names[answers.label], "word": answers.written.astype(object)}
    for model, by_variant in answers.predicted.items():
        columns |= {f"{model}/{variant}": names[predicted] for variant, predicted in by_variant.items()}
    return Dataset.from_dict({name: column.tolist() for name, column in columns.items()})


def class_table(answers: Answers) -> Dataset:
    """Return the accuracy of all models on each class.

    Args:
        answers: Answers about N items.

    Returns:
        A row for each class that an item has, with its name (`label`), the number of its items (`items`), and the
        accuracy of each model on each variant, 0..1, such as `base/typographic`.
    """
    present = np.unique(answers.label)
    columns = {
        "label": [answers.class_names[label] for label in present],
        "items": [int(np.sum(answers.label == label)) for label in present],
    }
    for model, by_variant in answers.predicted.items():
        for variant, predicted in by_variant.items():
            right = predicted == answers.label
            columns[f"{model}/{variant}"] = [float(right[answers.label == label].mean()) for label in present]
    return Dataset.from_dict(columns)


def write_answers(folder: Path, answers: Answers, prefix: str = "") -> None:
    """Write `answers.parquet` and `classes.csv`.

    Args:
        folder: The folder.
        answers: The answers.
        prefix: Beginning of the names of the files.
    """
    answer_table(answers).to_parquet(folder / f"{prefix}answers.parquet")
    class_table(answers).to_csv(folder / f"{prefix}classes.csv")
