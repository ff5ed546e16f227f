"""The sets of --retention: images of other tasks than the one that is trained, by name, folder or Hub id."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, Image
from transformers.utils import logging

from clip_po.data.class_labels import encode_labels, read_labels
from clip_po.data.images import read_image, read_images
from clip_po.data.loading import load_split
from clip_po.evaluation.retention import RetentionSet
from clip_po.evaluation.robustness import Answers
from clip_po.evaluation.suites.suite import Entry, entry_source, load_entry, load_suite

logger = logging.get_logger(__name__)

SPLITS = ("test", "validation", "train")
"""Splits in the order in which they are looked for, if none is named."""

_WITH_SPLIT = re.compile(r"(?P<source>.+?)(?::(?P<split>[A-Za-z_]\w*(?:\[[^\]]*\])?))?")
_SUITE_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class LoadedSet:
    """The images of a retention set.

    Attributes:
        source: Folder, file or Hub id.
        split: Name of the split.
        dataset: The images.
        image_column: Name of the image column.
        labelled: The images with labels and prompts; None if they have no labels.
    """

    source: str
    split: str
    dataset: Dataset
    image_column: str
    labelled: RetentionSet | None

    def sample(self, count: int, seed: int) -> LoadedSet:
        """Return a random part of the set.

        Args:
            count: Largest number of images, >= 1.
            seed: Seed of the draw.

        Returns:
            The part; the set itself if it is not larger.
        """
        if len(self.dataset) <= count:
            return self
        return self.part(self.dataset.shuffle(seed=seed).select(range(count)))

    def part(self, rows: Dataset) -> LoadedSet:
        """Return the set with other rows.

        Args:
            rows: Some of its rows.

        Returns:
            The part.
        """
        labelled = None if self.labelled is None else replace(self.labelled, dataset=rows)
        return replace(self, dataset=rows, labelled=labelled)

    def answers(self, predicted: Mapping[str, np.ndarray]) -> Answers:
        """Return predictions on the images together with their labels.

        Args:
            predicted: Predicted classes by model, arrays [N].

        Returns:
            The answers, to the variant "clean".

        Raises:
            ValueError: If the images have no labels.
        """
        known = self.labelled
        if known is None:
            raise ValueError(f"The images of {self.source!r} have no labels.")
        names, label = read_labels(known.dataset, known.label_column, known.class_names)
        return Answers.about_clean(names, label, predicted)

    def picture(self, index: int) -> PIL.Image.Image:
        """Return an image.

        Args:
            index: Number of its row.

        Returns:
            The image, RGB.
        """
        return read_image(read_images(self.dataset, self.image_column), self.image_column, index)

    def about(self) -> dict[str, Any]:
        """Return what the set is, for a report.

        Returns:
            Source, split and number of images; with labels also the number of classes and the prompts.
        """
        known = self.labelled
        about: dict[str, Any] = {"source": self.source, "split": self.split, "rows": len(self.dataset)}
        if known is not None:
            names, _ = read_labels(known.dataset, known.label_column, known.class_names)
            about |= {"classes": len(names), "prompt_template": list(known.templates)}
        return about


def load_retention_sets(
    names: Sequence[str] | str, templates: Sequence[str], suite_folder: str | Path | None = None
) -> dict[str, LoadedSet]:
    """Load the sets that --retention names, before anything is measured.

    Args:
        names: Each the suite `retention` or one of its entries, a YAML file of a suite of your own, or a folder, a
            file or a Hub id, each optionally followed by ":" and a split. Without a split it is "test", else
            "validation", else "train". A single name, as a recipe may have it, is a list of one.
        templates: Prompts with one `{}` for the sets that are not of a suite.
        suite_folder: Folder of local copies of a suite's datasets, as for `load_entry`.

    Returns:
        The sets by name: the entry of the suite, or the last part of the path or id.

    Raises:
        ValueError: If a set can't be loaded, has no images or a label out of range, or two sets have one name. The
            message says which set and what to do.
    """
    found: dict[str, LoadedSet] = {}
    for name in [names] if isinstance(names, str) else names:
        for key, loaded in _load(name, templates, suite_folder).items():
            if key in found:
                raise ValueError(
                    f"--retention has two sets of the name {key!r}: {found[key].source!r} ({found[key].split}) and "
                    f"{loaded.source!r} ({loaded.split}). Leave one of them out, or rename its folder."
                )
            found[key] = loaded
    return found


def labelled_sets(sets: Mapping[str, LoadedSet]) -> dict[str, RetentionSet]:
    """Return the sets with labels, for a `RetentionEvaluator`.

    Args:
        sets: From `load_retention_sets`.

    Returns:
        The sets by name; empty if none has labels.
    """
    return {name: loaded.labelled for name, loaded in sets.items() if loaded.labelled is not None}


def _load(name: str, templates: Sequence[str], suite_folder: str | Path | None) -> dict[str, LoadedSet]:
    if entries := [] if Path(name).is_dir() else _entries(name):
        return {entry.name: _load_entry(entry, suite_folder) for entry in entries}
    found = _load_own(name, templates)
    path = Path(found.source).resolve()
    return {path.stem if path.is_file() else path.name: found}


def _entries(name: str) -> list[Entry]:
    """Return the entries of a suite that a name stands for; none if it stands for a dataset."""
    if name.endswith(_SUITE_FILES):
        suite = load_suite(name)
        if suite.measures != "retention":
            raise ValueError(f"--retention {name!r} is a suite that measures {suite.measures!r}, not 'retention'.")
        return list(suite.entries)
    return [entry for entry in load_suite("retention").entries if name in ("retention", entry.name)]


def _load_entry(entry: Entry, suite_folder: str | Path | None) -> LoadedSet:
    try:
        rows = load_entry(entry, suite_folder)
        _check_rows(rows, "label")
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(
            f"--retention: the set {entry.name!r} can't be loaded ({error}). Name other sets, or give a local copy "
            "with --suite_folder or as a folder."
        ) from error
    return LoadedSet(
        entry_source(entry, suite_folder), entry.split, rows, "image", RetentionSet(rows, entry.templates)
    )


def _load_own(name: str, templates: Sequence[str]) -> LoadedSet:
    given = _WITH_SPLIT.fullmatch(name)
    source, split = (name, None) if given is None or Path(name).exists() else (given["source"], given["split"])
    try:
        split, rows = _load_first(source, SPLITS if split is None else (split,))
        image, label = _image_column(rows), _label_column(rows, name)
        if label is not None:
            rows = encode_labels(rows, label)
        _check_rows(rows, label)
    except (ValueError, OSError, RuntimeError) as error:
        entries = ", ".join(entry.name for entry in load_suite("retention").entries)
        raise ValueError(
            f"--retention {name!r} can't be loaded ({error}). Give a folder or file of images, a Hub id, each with a "
            f"split after a colon if it is none of {', '.join(SPLITS)}, or one of {entries}."
        ) from error
    labelled = None if label is None else RetentionSet(rows, templates, None, image, label)
    return LoadedSet(source, split, rows, image, labelled)


def _load_first(source: str, splits: Sequence[str]) -> tuple[str, Dataset]:
    """Return the first split that exists, and its rows."""
    errors = []
    for split in splits:
        try:
            return split, load_split(source, split).with_format(None)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _image_column(rows: Dataset) -> str:
    if "image" in rows.column_names:
        return "image"
    columns = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if len(columns) != 1:
        raise ValueError(f"it has no column 'image', and {len(columns)} columns of images: {rows.column_names}")
    return columns[0]


def _label_column(rows: Dataset, name: str) -> str | None:
    """Return the column with classes that have names; None if there is none, or more than one."""
    columns = [column for column, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    if "label" in columns or getattr(rows.features.get("label"), "dtype", None) in ("string", "large_string"):
        return "label"
    if len(columns) == 1:
        return columns[0]
    given = f"{len(columns)} columns of classes ({', '.join(columns)})" if columns else "no classes with names"
    logger.warning(
        f"--retention {name!r} has {given}, so only drift is measured on it, not accuracy. To measure accuracy, "
        "describe the set in a YAML file (docs/suites.md), with its columns and class names, and give that."
    )
    return None


def _check_rows(rows: Dataset, label: str | None) -> None:
    if not len(rows):
        raise ValueError("it has no images")
    if label is not None:
        read_labels(rows, label, None)
