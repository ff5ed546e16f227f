"""Loaders of photographs with words, in the layouts of their authors.

Every loader returns the columns `image`, `label` (ClassLabel over the fixed candidate set) and `word` (the written
word, "" for none). Underscores are spaces, and labels and words that differ in case or spaces only are one candidate.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, Value

from clip_po.bounded_text import parse_json
from clip_po.data.class_labels import column_texts, readable_name
from clip_po.data.image_folder import find_images
from clip_po.data.loading import load_split
from clip_po.data.path_safety import check_inside, check_links
from clip_po.validation import check_class_names

ANNOTATION_FILES = ("annotations.json", "annotation.json")
CLASSES_FILE = "classes.json"

_NAME = re.compile(r"label=(?P<label>.+?)_text=(?P<word>.+?)(?:_\d+| ?\(\d+\))?")


def load_file_names(folder: Path, class_names: Sequence[str] | None = None) -> Dataset:
    """Load photographs with labels in their file names: `label=dog_text=cat.png` is a dog with the word "cat".

    This is the layout of RTA-100 and of the typographic photographs of PAINT. Images may be in subfolders. Underscores
    in a label or word are spaces; a number at the end (`_2` or `(2)`) distinguishes photographs of the same pair.

    Args:
        folder: The unpacked archive of the authors.
        class_names: The candidate set; None for all labels and words in the folder, sorted.

    Returns:
        One row per image, sorted by path.

    Raises:
        ValueError: If there are no images, a file has another name or is a link out of the folder, or a label is not a
            candidate. The message names the file.

    Source: file names in the archives of Ilharco et al. 2022, arXiv 2208.05592, and Azuma and Matsui 2023, arXiv
    2304.04512.
    """
    check_links(folder)
    files = find_images(folder)
    if not files:
        raise ValueError(
            f"{folder} contains no images. Unpack the archive of the authors there. Its files have names such as "
            "label=dog_text=cat.png."
        )
    rows = []
    for file in files:
        match = _NAME.fullmatch(file.stem)
        if match is None:
            raise ValueError(
                f"The name of {file} has no label and word, expected label=<object>_text=<word>, such as "
                "label=dog_text=cat.png. Rename the file, or remove it from the folder."
            )
        rows.append((str(file), match["label"], match["word"], str(file)))
    return _photographs(rows, class_names)


def load_annotation(folder: Path, class_names: Sequence[str] | None = None) -> Dataset:
    """Load photographs that are annotated in one JSON file.

    This is the layout of Disentangling: `annotations.json` (or `annotation.json`) maps file names to a "true object"
    and a "typographic attack label". The images are in the same folder, or in its subfolder `images`. The keys of
    `classes.json`, if there is one, are the candidate set.

    Args:
        folder: Folder of the authors' files, or one with a subfolder of these files.
        class_names: The candidate set; None for that of `classes.json`, or else all labels and words, sorted.

    Returns:
        One row per image, in the order of the annotation.

    Raises:
        ValueError: If there is no annotation or it is not readable, an image has no "true object" or "typographic
            attack label", its path leaves the folder or does not exist, or a label is not a candidate. The message
            names the file.

    Source: files published by Materzynska et al. 2022, arXiv 2206.07835.
    """
    check_links(folder)
    file = next(
        (f for name in ANNOTATION_FILES for f in (folder / name, *sorted(folder.glob(f"*/{name}"))) if f.is_file()),
        None,
    )
    if file is None:
        raise ValueError(
            f"{folder} contains no {' or '.join(ANNOTATION_FILES)}. Give the folder as published by its authors."
        )
    annotation = _read_json(file)
    if isinstance(annotation, list) and all(isinstance(part, dict) for part in annotation):
        annotation = {name: value for part in annotation for name, value in part.items()}
    if not isinstance(annotation, dict) or not annotation:
        raise ValueError(
            f"{file} must map the names of images to their labels and words, with at least one image. Give the file "
            "as published by its authors."
        )
    rows = []
    for name, found in annotation.items():
        label, word = (
            found.get(key) if isinstance(found, Mapping) else None
            for key in ("true object", "typographic attack label")
        )
        if not isinstance(label, str) or not isinstance(word, str):
            raise ValueError(
                f'{file}: the annotation of {name!r} is {found!r}, expected texts for "true object" and "typographic '
                'attack label". Fix it, or remove the image.'
            )
        check_inside(name, str(file))
        image = next((p for p in (file.parent / "images" / name, file.parent / name) if p.is_file()), None)
        if image is None:
            raise ValueError(
                f"{file} names {name!r}, but there is no such image in its folder or in the subfolder images. Add the "
                "image, or remove the entry."
            )
        rows.append((str(image), label, word, name))
    classes = file.with_name(CLASSES_FILE)
    if class_names is None and classes.is_file():
        class_names = [str(name) for name in _read_json(classes)]
    return _photographs(rows, class_names)


def _read_json(file: Path) -> Any:
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}). Give it as published by its authors.") from error


def load_columns(
    source: str | Path,
    class_names: Sequence[str] | None = None,
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str | int | bool] | None = None,
) -> Dataset:
    """Load photographs with one column for the label and one for the written word.

    This is the layout of SCAM, and of other datasets on the Hub.

    Args:
        source: Hub id, or a local copy of any kind that `load_split` reads.
        class_names: The candidate set; None for all labels and words of the rows, sorted.
        split: Name of the split.
        config: Name of the configuration.
        columns: Names of the columns `image`, `label` and `word`, if they differ.
        where: Keep only rows with these values in these columns, such as {"type": "NoSCAM"}.

    Returns:
        The kept rows, in their order.

    Raises:
        ValueError: If the dataset is not loadable, a column is missing, no row is kept, or a label is not a candidate;
            the message names the row.
    """
    dataset = load_split(str(source), split, config).with_format(None)
    named = {name: (columns or {}).get(name, name) for name in ("image", "label", "word")}
    for column in (*named.values(), *(where or {})):
        if column not in dataset.column_names:
            raise ValueError(f"{source} has no column {column!r}; it has {dataset.column_names}.")
    for column, value in (where or {}).items():
        kinds = column_texts(dataset, column)
        dataset = dataset.select([row for row, kind in enumerate(kinds) if kind == str(value)])
        if not len(dataset):
            raise ValueError(f"{source} has no row with {value!r} in column {column!r}; it has {sorted(set(kinds))}.")
    labels, words = column_texts(dataset, named["label"]), column_texts(dataset, named["word"])
    names = _candidates(labels, words, class_names)
    labels, words = _spelled(labels, names), _spelled(words, names)
    encoded = [_number(label, names, f"row {row} of {source}") for row, label in enumerate(labels)]
    images = dataset.select_columns([named["image"]]).rename_columns({named["image"]: "image"})
    return images.add_column("label", encoded, feature=ClassLabel(names=names)).add_column(
        "word", words, feature=Value("string")
    )


def _photographs(rows: Sequence[tuple[str, str, str, str]], class_names: Sequence[str] | None) -> Dataset:
    """Return a Dataset of rows (path, label, word, name in messages)."""
    paths, labels, words, called = (list(column) for column in zip(*rows, strict=True))
    names = _candidates(labels, words, class_names)
    labels, words = _spelled(labels, names), _spelled(words, names)
    encoded = [_number(label, names, os.path.basename(name)) for label, name in zip(labels, called, strict=True)]
    features = Features({"image": Image(), "label": ClassLabel(names=names), "word": Value("string")})
    return Dataset.from_dict({"image": paths, "label": encoded, "word": words}, features=features)


def _candidates(labels: Sequence[str], words: Sequence[str], class_names: Sequence[str] | None) -> list[str]:
    if class_names is not None:
        check_class_names(class_names)
        if len(set(class_names)) < len(class_names):
            raise ValueError(
                "class_names has a name more than once, but labels and words are texts here, which name one class "
                "each. Give each name once."
            )
        return list(class_names)
    readable = sorted({readable_name(text) for text in (*labels, *words)} - {""}, reverse=True)
    return sorted({_folded(text): text for text in readable}.values())


def _spelled(texts: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return texts in the spelling of the candidates, so that "Light_bulb" is the candidate "light bulb"."""
    spelled = {_folded(name): name for name in reversed(names)} | {name: name for name in names}
    return [spelled.get(text, spelled.get(_folded(text), readable_name(text))) for text in texts]


def _folded(text: str) -> str:
    # CLIP's tokenizer ignores case and repeated spaces: two spellings would be one prompt and count as two classes.
    return " ".join(text.replace("_", " ").lower().split())


def _number(label: str, names: Sequence[str], called: str) -> int:
    if label not in names:
        some = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        raise ValueError(
            f"The label of {called} is {label!r}, which is none of the {len(names)} candidates ({some}). Fix the "
            "class names of the entry."
        )
    return names.index(label)


LAYOUTS: Mapping[str, Callable[..., Dataset]] = {
    "file_names": load_file_names,
    "annotation": load_annotation,
    "columns": load_columns,
}
"""Layouts of photographs with words, by their names in a suite."""
