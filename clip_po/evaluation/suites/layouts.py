"""Photographs with words in them, in the layouts in which their authors publish them.

Every loader returns the columns `image`, `label` (ClassLabel over the pinned candidate set) and `word` (what is
written, "" for nothing).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, Value

from clip_po.data.loading import load_split
from clip_po.data.paths import IMAGE_SUFFIXES, check_inside, check_links
from clip_po.validation import check_class_names

ANNOTATION_FILES = ("annotations.json", "annotation.json")
CLASSES_FILE = "classes.json"

_NAME = re.compile(r"label=(?P<label>.+?)_text=(?P<word>.+?)(?:_\d+| ?\(\d+\))?")


def load_file_names(folder: Path, class_names: Sequence[str] | None = None) -> Dataset:
    """Photographs whose names say it all: `label=dog_text=cat.png` is a dog with "cat" written on it.

    The layout of RTA-100 and of the typographic photographs of PAINT. Images may lie in subfolders. Underscores
    within a label or word are spaces; a number at the end (`_2` or `(2)`) tells apart photographs of the same pair.

    Args:
        folder: Where the authors' archive was unpacked.
        class_names: The candidate set; None for all labels and words of the folder, sorted.

    Returns:
        One row an image, sorted by path.

    Raises:
        ValueError: There are no images, or one has another name, or is a link out of the folder; or a label is no
            candidate. The message names the file.

    Source: Ilharco et al. 2022, arXiv 2208.05592; Azuma and Matsui 2023, arXiv 2304.04512: the names of the
    files in what they published.
    """
    check_links(folder)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not _hidden(path))
    if not files:
        raise ValueError(
            f"{folder} holds no images (files that end in {', '.join(IMAGE_SUFFIXES)}). Unpack the authors' archive "
            "there: its files have names such as label=dog_text=cat.png."
        )
    rows = []
    for file in files:
        match = _NAME.fullmatch(file.stem)
        if match is None:
            raise ValueError(
                f"The name of {file} does not say what is on it, expected label=<object>_text=<word>, such as "
                "label=dog_text=cat.png. Rename the file, or take it out of the folder."
            )
        label, word = (match[part].replace("_", " ").strip() for part in ("label", "word"))
        rows.append((str(file), label, word, str(file)))
    return _photographs(rows, class_names)


def _hidden(path: Path) -> bool:
    # What macOS adds to an archive looks like an image by its name alone.
    return path.name.startswith(".") or "__MACOSX" in path.parts


def load_annotation(folder: Path, class_names: Sequence[str] | None = None) -> Dataset:
    """Photographs with one JSON file that says what is on each.

    The layout of Disentangling: `annotations.json` (or `annotation.json`) maps the name of a file to its "true
    object" and "typographic attack label"; the images lie in `images` beside it or beside it themselves; the
    keys of `classes.json`, where there is one, are the candidate set.

    Args:
        folder: Where the authors' files are; they may lie in one subfolder of it.
        class_names: The candidate set; None for that of `classes.json`, or else all labels and words, sorted.

    Returns:
        One row an image, in the order of the annotation.

    Raises:
        ValueError: There is no annotation, or it can't be read; an image has no "true object" or "typographic
            attack label", its path leaves the folder, or it is not there; a label is no candidate. The message
            names the file.

    Source: Materzynska et al. 2022, arXiv 2206.07835: the files that they published.
    """
    check_links(folder)
    file = next(
        (f for name in ANNOTATION_FILES for f in (folder / name, *sorted(folder.glob(f"*/{name}"))) if f.is_file()),
        None,
    )
    if file is None:
        raise ValueError(f"{folder} holds no {' or '.join(ANNOTATION_FILES)}. Give the folder as its authors ship it.")
    annotation = _read_json(file)
    if isinstance(annotation, list) and all(isinstance(part, dict) for part in annotation):
        annotation = {name: value for part in annotation for name, value in part.items()}
    if not isinstance(annotation, dict) or not annotation:
        raise ValueError(f"{file} must map the names of images to what is on them, and name at least one.")
    rows = []
    for name, found in annotation.items():
        label, word = (
            found.get(key) if isinstance(found, Mapping) else None
            for key in ("true object", "typographic attack label")
        )
        if not isinstance(label, str) or not isinstance(word, str):
            raise ValueError(
                f'{file}: the annotation of {name!r} is {found!r}, expected texts for "true object" and "typographic '
                'attack label". Mend it, or take the image out.'
            )
        check_inside(name, str(file))
        image = next((p for p in (file.parent / "images" / name, file.parent / name) if p.is_file()), None)
        if image is None:
            raise ValueError(f"{file} names {name!r}, but there is no such image beside it or in its folder images.")
        rows.append((str(image), label, word, name))
    classes = file.with_name(CLASSES_FILE)
    if class_names is None and classes.is_file():
        class_names = [str(name) for name in _read_json(classes)]
    return _photographs(rows, class_names)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); give it as its authors ship it.") from error


def load_columns(
    source: str | Path,
    class_names: Sequence[str] | None = None,
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
) -> Dataset:
    """Photographs with a column for what they show and one for what is written on them.

    The layout of SCAM, and of whatever else is on the Hub.

    Args:
        source: Hub id, or a local copy of any kind that `load_split` reads.
        class_names: The candidate set; None for all labels and words of the rows, sorted.
        split: Name of the split.
        config: Name of the configuration.
        columns: Names of the columns `image`, `label` and `word`, where they are called otherwise.
        where: Keep the rows that have these values in these columns, such as {"type": "NoSCAM"}.

    Returns:
        The rows that were kept, in their order.

    Raises:
        ValueError: It can't be loaded, a column is missing, no row is kept, or a label is no candidate; the
            message names the row.
    """
    dataset = load_split(str(source), split, config).with_format(None)
    named = {name: (columns or {}).get(name, name) for name in ("image", "label", "word")}
    for column in (*named.values(), *(where or {})):
        if column not in dataset.column_names:
            raise ValueError(f"{source} has no column {column!r}; it has {dataset.column_names}.")
    for column, value in (where or {}).items():
        kinds = column_texts(dataset, column)
        dataset = dataset.select([row for row, kind in enumerate(kinds) if kind == value])
        if not len(dataset):
            raise ValueError(f"{source} has no row with {value!r} in column {column!r}; it has {sorted(set(kinds))}.")
    labels, words = column_texts(dataset, named["label"]), column_texts(dataset, named["word"])
    names = _candidates(labels, words, class_names)
    encoded = [_number(label, names, f"row {row} of {source}") for row, label in enumerate(labels)]
    images = dataset.select_columns([named["image"]]).rename_columns({named["image"]: "image"})
    return images.add_column("label", encoded, feature=ClassLabel(names=names)).add_column(
        "word", words, feature=Value("string")
    )


def column_texts(dataset: Dataset, column: str) -> list[str]:
    """The values of a column as texts: a ClassLabel by its names, None as ""."""
    feature = dataset.features[column]
    values = list(dataset.with_format(None)[column])
    if isinstance(feature, ClassLabel):
        return [feature.names[value] for value in values]
    return ["" if value is None else str(value) for value in values]


def _photographs(rows: Sequence[tuple[str, str, str, str]], class_names: Sequence[str] | None) -> Dataset:
    """A Dataset of (path, label, word, what messages call it)."""
    paths, labels, words, called = (list(column) for column in zip(*rows, strict=True))
    names = _candidates(labels, words, class_names)
    encoded = [_number(label, names, os.path.basename(name)) for label, name in zip(labels, called, strict=True)]
    features = Features({"image": Image(), "label": ClassLabel(names=names), "word": Value("string")})
    return Dataset.from_dict({"image": paths, "label": encoded, "word": words}, features=features)


def _candidates(labels: Sequence[str], words: Sequence[str], class_names: Sequence[str] | None) -> list[str]:
    if class_names is not None:
        check_class_names(class_names)
        return list(class_names)
    return sorted({*labels, *words} - {""})


def _number(label: str, names: Sequence[str], called: str) -> int:
    if label not in names:
        some = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        raise ValueError(
            f"The object of {called} is {label!r}, which is none of the {len(names)} candidates ({some}). Mend the "
            "class names of the entry."
        )
    return names.index(label)


LAYOUTS: Mapping[str, Callable[..., Dataset]] = {
    "file_names": load_file_names,
    "annotation": load_annotation,
    "columns": load_columns,
}
"""What a suite's entry can name as its layout, for photographs with words."""
