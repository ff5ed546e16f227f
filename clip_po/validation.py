"""Every rule about an argument, a row or a file, once: checks that run before any work is done."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from clip_po.losses import SINGLE_REJECTED, WITHOUT_REJECTED
from clip_po.other_kinds import dataset_remedy
from clip_po.worker_errors import raised_message

# ---- Numbers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allowed:
    """A range of numbers that an argument accepts.

    Attributes:
        words: The requirement as messages state it, after "must".
        holds: Return whether a finite number is in the range.
        kind: `Real`, or `Integral` for whole numbers.
    """

    words: str
    holds: Callable[[Any], bool]
    kind: type = Real


FINITE = Allowed("be a finite number", lambda number: True)
POSITIVE = Allowed("be a finite number > 0", lambda number: number > 0)
NOT_NEGATIVE = Allowed("be a finite number >= 0", lambda number: number >= 0)
BELOW_ONE = Allowed("be a number in [0, 1)", lambda number: 0 <= number < 1)
COUNT = Allowed("be a whole number >= 1", lambda number: number >= 1, Integral)
COUNT_OR_NONE = Allowed("be a whole number >= 0", lambda number: number >= 0, Integral)
STEPS = Allowed(
    "be a whole number >= 1, or -1 to count in epochs", lambda number: number == -1 or number >= 1, Integral
)
SEED = Allowed("be a whole number from 0 to 2**32 - 1", lambda number: 0 <= number < 2**32, Integral)


def check_number(name: str, value: Any, allowed: Allowed, remedy: str = "") -> None:
    """Raise if a value is not in the range of numbers that an argument accepts.

    Args:
        name: Name of the argument in messages.
        value: The value to check.
        allowed: The accepted range.
        remedy: A sentence that says what to do, where the range alone does not.

    Raises:
        TypeError: If the value is not a number, or not a whole number where one is required.
        ValueError: If the number is out of range, infinite or nan.
    """
    after = f" {remedy}" if remedy else ""
    if isinstance(value, bool) or not isinstance(value, allowed.kind):
        raise TypeError(f"{name} must {allowed.words}, got {value!r} ({type(value).__name__}).{after}")
    if not math.isfinite(value) or not allowed.holds(value):  # type: ignore[arg-type]
        raise ValueError(f"{name} must {allowed.words}, got {value!r}.{after}")


# ---- Texts -------------------------------------------------------------------------------------------------


def check_text(text: Any, name: str, remedy: str) -> None:
    """Raise if a value is not a string with at least one visible character.

    Args:
        text: The value to check.
        name: Name of the value in messages.
        remedy: A sentence that says what to do.

    Raises:
        ValueError: If the value is not a string, or is empty or blank.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} must be a non-empty string, got {text!r}. {remedy}")


def check_template(template: str, name: str = "template") -> None:
    """Raise if a prompt template does not contain exactly one `{}`.

    Args:
        template: The prompt, with `{}` where the name goes.
        name: Name of the template in messages.

    Raises:
        TypeError: If the template is not a string.
        ValueError: If it has no `{}`, or more than one.
    """
    if not isinstance(template, str):
        raise TypeError(f"{name} must be a string such as 'a photo of a {{}}', got {template!r}.")
    if template.count("{}") != 1:
        raise ValueError(
            f"{name} must contain exactly one '{{}}', as in 'a photo of a {{}}', got {template!r} with "
            f"{template.count('{}')}."
        )


def check_templates(templates: Sequence[str], name: str = "templates") -> None:
    """Raise if prompt templates are not a list of at least one valid template.

    Args:
        templates: The prompts, each as for `check_template`.
        name: Name of the list in messages.

    Raises:
        TypeError: If a template is not a string.
        ValueError: If `templates` is empty or a single string, or a template does not contain exactly one `{}`.
    """
    if isinstance(templates, str) or not templates:
        raise ValueError(
            f"{name} must be a list of at least one prompt, got {templates!r}. Give ['a photo of a {{}}']."
        )
    for position, template in enumerate(templates):
        check_template(template, f"{name}[{position}]")


def check_candidates(texts: Sequence[str] | None, name: str = "candidate_texts") -> None:
    """Raise if candidate texts do not define a policy.

    Args:
        texts: The texts; None, where each row has its own, is accepted.
        name: Name of the texts in messages.

    Raises:
        TypeError: If `texts` is not a list, or an entry is not a string.
        ValueError: If there are fewer than two texts, one is empty, or one occurs twice.
    """
    if texts is None:
        return
    if isinstance(texts, (Set, Mapping)) or not isinstance(texts, Sized):
        raise TypeError(
            f"{name} must be a list of texts, got {type(texts).__name__}. The order of the texts must be the same in "
            "every process and run. Give a list, such as sorted(texts)."
        )
    if isinstance(texts, str) or len(texts) < 2:
        raise ValueError(
            f"{name} must be a list of at least two texts, got {texts!r}. The probability of a single candidate is "
            "always 1. Add the texts it competes with."
        )
    first: dict[str, int] = {}
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{position}] must be a string, got {text!r}. Give every candidate as a text.")
        if not text.strip():
            raise ValueError(f"{name}[{position}] is empty, got {text!r}. Remove it or fill it in.")
        if text in first:
            raise ValueError(
                f"{name}[{position}] is {text!r}, which is already at position {first[text]}. Give each candidate "
                "once; a repeated one would count twice in the softmax."
            )
        first[text] = position


def check_class_names(names: Sequence[str]) -> None:
    """Raise if class names are not a list of non-empty strings. A name may stand for several classes.

    Args:
        names: The names in the order of the labels.

    Raises:
        ValueError: If `names` is not a list or is empty, or if a name is empty or not a string.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"class_names must be a list of at least one name, got {names!r}.")
    for position, name in enumerate(names):
        check_text(name, f"class_names[{position}]", "Name the class.")


# ---- Rows --------------------------------------------------------------------------------------------------


def check_label(label: Any, classes: int, where: str, names: str = "class_names") -> None:
    """Raise if a label is not the number of a class.

    Args:
        label: The value to check.
        classes: Number of classes, C. Labels run from 0 to C - 1.
        where: Row and column in messages, such as "Row 3: column 'label'".
        names: The argument that names the classes.

    Raises:
        ValueError: If the label is not a whole number in 0..C-1.
    """
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < classes:
        raise ValueError(
            f"{where} is {label!r}, expected a class number in 0..{classes - 1}. Fix the label, drop the row (-1 "
            f"often marks an unlabelled one), or give {names} an entry for every class."
        )


def check_row_weight(weight: Any, where: str) -> None:
    """Raise if the weight of a row is not a finite number >= 0.

    Args:
        weight: The value to check.
        where: Row and column in messages, such as "Row 3: column 'weight'".

    Raises:
        ValueError: If the weight is not a number, negative, infinite or nan.
    """
    number = isinstance(weight, (int, float, np.number)) and not isinstance(weight, bool)
    if not number or not 0 <= weight < math.inf:
        raise ValueError(f"{where} must be a finite number >= 0, got {weight!r}. Fix it or drop the row.")


def check_rejected(chosen: Any, rejected: Sequence[Any], columns: tuple[str, str], where: str) -> None:
    """Raise if a preference rejects what it prefers, or rejects something twice.

    Args:
        chosen: The chosen text or class.
        rejected: The rejected texts or classes.
        columns: Names of the two columns in messages.
        where: The row in messages, such as "train_dataset row 3".

    Raises:
        ValueError: If `chosen` is among `rejected`, or an entry of `rejected` is repeated.
    """
    if chosen in rejected:
        raise ValueError(
            f"{where}: columns {columns[0]!r} and {columns[1]!r} are both {chosen!r}, but a preference needs two "
            "different ones. Drop the row or fix it."
        )
    if len(set(rejected)) < len(rejected):
        raise ValueError(f"{where}: column {columns[1]!r} has a repeated entry: {rejected!r}. Give each once.")


def check_rejected_count(most: int, loss_types: Collection[str], where: str, fewest: int | None = None) -> None:
    """Raise if the number of rejected texts does not suit the losses.

    Args:
        most: Largest number of rejected texts of a row.
        loss_types: Names of the losses.
        where: The row or dataset in messages.
        fewest: Smallest number of rejected texts of a row; `most` where it is None.

    Raises:
        ValueError: If a loss needs a rejected text and there is none, or compares with exactly one and there are more.
    """
    names = sorted(loss_types)
    if not (most if fewest is None else fewest) and not set(loss_types) <= WITHOUT_REJECTED:
        raise ValueError(
            f"{where} has no rejected text, but loss_type={names} needs one in every row. Drop the row or fill it in; "
            "only 'sft' and 'distillation' do without."
        )
    single = sorted(SINGLE_REJECTED & set(loss_types))
    if single and most > 1:
        raise ValueError(
            f"{where} has {most} rejected texts, but {single} compare the chosen text with one. Keep one per row, or "
            "use 'sigmoid' (S-DPO)."
        )


def _split_remedy(dataset: Any) -> str:
    remedy = dataset_remedy(dataset, "dataset")
    return remedy[0].lower() + remedy[1:]


def check_column(dataset: Any, column: str, argument: str) -> Any:
    """Raise if a value is not one split of a dataset with a given column.

    Args:
        dataset: The value to check.
        column: Name of the column.
        argument: The argument that names the column.

    Returns:
        The feature of the column.

    Raises:
        TypeError: If `dataset` is not a single split.
        ValueError: If the column is missing.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"Expected one split, a datasets.Dataset, got {type(dataset).__name__}; {_split_remedy(dataset)}"
        )
    if column not in dataset.column_names:
        raise ValueError(f"{argument}={column!r} is not a column of the dataset; it has {dataset.column_names}.")
    return dataset.features[column]


# ---- Images ------------------------------------------------------------------------------------------------


class UnreadableImage(ValueError):
    """An image that can't be read or is refused. The message names row, column and file and says why.

    Args:
        message: The message. The traceback that a `DataLoader` adds to that of a worker process is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(raised_message(type(self), message))


def unreadable_image(
    error: Exception, column: str, where: str, path: str | None = None, drop: str = "dataset.select"
) -> UnreadableImage:
    """Return the exception for an image that can't be read.

    Args:
        error: What the decoder raised.
        column: Name of the image column, quoted: "'image'".
        where: The row in messages, such as "train_dataset row 3".
        path: Path or name of the image's file; None if it is not known.
        drop: The method that drops rows.

    Returns:
        The exception, not raised. Its message names the row, the column and the file and says what to do.
    """
    file = f" ({path})" if path and path not in str(error) else ""
    return UnreadableImage(
        f"{where}: the image in column {column}{file} can't be read ({type(error).__name__}: {error}). Fix the file "
        f"or drop the row, for instance with `{drop}`."
    )


def check_image(value: Any, column: str, where: str) -> None:
    """Raise if an image column holds nothing, or a path or bytes instead of an image.

    Args:
        value: The value to check.
        column: Name of the image column.
        where: The row in messages, such as "train_dataset row 3".

    Raises:
        UnreadableImage: If it does; the message names row and column.
    """
    if value is None:
        raise UnreadableImage(
            f"{where}: column {column!r} holds no image. Drop the row, for instance with `dataset.select`."
        )
    if isinstance(value, (str, bytes, Mapping)):
        raise UnreadableImage(
            f"{where}: column {column!r} holds {type(value).__name__}, expected an image. Convert paths and "
            f"bytes with dataset.cast_column({column!r}, datasets.Image())."
        )


# ---- Models and files --------------------------------------------------------------------------------------


def check_finite(model: nn.Module, name: str = "model") -> None:
    """Raise if any weight of a model is nan or infinite.

    Args:
        model: The model.
        name: Name of the model in messages.

    Raises:
        ValueError: If a weight is nan or infinite; the message names the first such parameter.
    """
    spoiled = [n for n, p in model.named_parameters() if not p.is_meta and not bool(torch.isfinite(p).all())]
    if spoiled:
        raise ValueError(
            f"{len(spoiled)} weights of {name} hold nan or infinity, such as {spoiled[0]!r}: its training diverged, "
            "or the file is damaged. Load an earlier checkpoint."
        )


def check_writable(folder: str | os.PathLike[str], name: str = "output_dir") -> None:
    """Raise if a folder is not writable, before hours of work are lost.

    Args:
        folder: The folder; created where it is missing.
        name: Name of the argument in messages.

    Raises:
        OSError: If the folder can't be created or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise OSError(
            f"{name} {str(folder)!r} can't be written to ({error}). Choose another folder or fix its permissions. "
            "Nothing has been computed yet."
        ) from error
