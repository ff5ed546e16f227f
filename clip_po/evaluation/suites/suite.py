"""Evaluation suites: the field's datasets by name, and how each entry is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset

from clip_po.bounded_text import parse_yaml
from clip_po.data.class_labels import encode_labels, read_labels, readable_name
from clip_po.data.loading import load_split
from clip_po.evaluation.class_doubles import spaced_apart
from clip_po.evaluation.retrieval import read_captions
from clip_po.evaluation.suites.layouts import LAYOUTS
from clip_po.evaluation.suites.photographs import CANDIDATES, VARIANTS
from clip_po.evaluation.suites.vl_bias import load_vl_bias
from clip_po.validation import check_templates

MEASURES: Mapping[str, frozenset[str]] = {
    "typographic": frozenset({*LAYOUTS, "labelled"}),
    "retention": frozenset({"labelled"}),
    "retrieval": frozenset({"captioned"}),
    "fairness": frozenset({"attributes", "vl_bias"}),
}
"""What a suite can measure, with the layouts accepted for it."""

_FOLDERS = ("file_names", "annotation", "vl_bias")
"""Layouts that only a local folder has."""

_TABLE = frozenset({"split", "config", "columns"})
_WORDS = frozenset({"candidates", "variant"})
_READ: Mapping[str, frozenset[str]] = {
    "file_names": _WORDS,
    "annotation": _WORDS,
    "columns": _WORDS | _TABLE | {"where"},
    "labelled": _TABLE | {"name_until", "without"},
    "captioned": _TABLE,
    "attributes": _TABLE,
    "vl_bias": frozenset({"config", "columns"}),
}
"""Optional keys that only some layouts read, by layout."""

_REQUIRED = ("name", "path", "layout", "templates", "class_names", "source", "license")
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Entry:
    """One dataset of a suite.

    Attributes:
        name: Name in tables; letters, digits, "-", "_" and ".".
        path: Hub id or folder; None if the dataset is not on the Hub.
        layout: One of the layouts in `MEASURES`.
        templates: Prompts with one `{}` each.
        class_names: The candidate set: a list of all names in the order of the labels, a mapping from names in the
            dataset to better ones, or None for the names of the dataset. In the last two, underscores become spaces.
            A mapping is for the layout "labelled" only.
        source: Citation.
        license: License, as far as known.
        config: Name of the configuration; for the layout "vl_bias" the part, "activities" or "occupations".
        split: Name of the split.
        columns: Names of the columns `image`, `label`, `word`, `caption`, `attribute`, `cluster`, if they differ.
        where: For the layout "columns": keep only rows with these values in these columns.
        candidates: For photographs with words: some of `CANDIDATES`, one result each.
        variant: For photographs: one of `VARIANTS`.
        name_until: Names in the dataset are cut before this text, such as "," if synonyms follow.
        without: For the layout "labelled": classes of the dataset whose rows are dropped.
        folder: Name of its folder in a suite folder, or a list of names, of which the first one found is used; None
            for the entry's name.
        rows: Published number of rows; tables note a copy with a different number.
        verified: Whether id, split and columns were checked against the documentation of the dataset.
        note: A remark for readers.

    Raises:
        TypeError: If a template is not a string.
        ValueError: If a value is not valid; the message names the entry.
    """

    name: str
    path: str | None
    layout: str
    templates: Sequence[str]
    class_names: Sequence[str] | Mapping[str, str] | None
    source: str
    license: str | None
    config: str | None = None
    split: str = "test"
    columns: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, str | int | bool] = field(default_factory=dict)
    candidates: Sequence[str] = ("all",)
    variant: str = "typographic"
    name_until: str | None = None
    without: Sequence[str] = ()
    folder: str | Sequence[str] | None = None
    rows: int | None = None
    verified: bool = False
    note: str | None = None

    def __post_init__(self) -> None:
        """Raise if the entry is not valid, before anything is loaded."""
        for named in (self.name, *self.folders):
            if not _NAME.fullmatch(named):
                raise ValueError(
                    f"Entry {self.name!r}: {named!r} is not a valid name. Use letters, digits, '-', '_' and '.'."
                )
        check_templates(self.templates, f"Entry {self.name!r}: templates")
        if isinstance(self.class_names, str):
            raise ValueError(
                f"Entry {self.name!r}: class_names must be a list or a mapping, got {self.class_names!r}."
            )
        unknown = set(self.candidates) - set(CANDIDATES)
        if isinstance(self.candidates, str) or unknown or not self.candidates:
            raise ValueError(
                f"Entry {self.name!r}: candidates must be a list of some of {CANDIDATES}, got {self.candidates!r}."
            )
        if self.variant not in VARIANTS:
            raise ValueError(f"Entry {self.name!r}: variant must be one of {VARIANTS}, got {self.variant!r}.")
        self._check_read()

    def _check_read(self) -> None:
        """Raise if a key is set that the layout does not read."""
        if self.layout in LAYOUTS and isinstance(self.class_names, Mapping):
            raise ValueError(
                f"Entry {self.name!r}: class_names must be a list or null with layout {self.layout!r}, whose labels "
                f"and words are texts, got {self.class_names!r}."
            )
        optional = frozenset().union(*_READ.values())
        for member in fields(self):
            default = member.default_factory() if callable(member.default_factory) else member.default
            ignored = member.name in optional - _READ.get(self.layout, optional)
            if ignored and getattr(self, member.name) != default:
                raise ValueError(
                    f"Entry {self.name!r}: layout {self.layout!r} does not read {member.name}, got "
                    f"{getattr(self, member.name)!r}. Remove it, or use a layout that does (docs/suites.md)."
                )

    @property
    def folders(self) -> list[str]:
        """Names that its folder in a suite folder may have, in the order in which they are looked for."""
        return [self.folder] if isinstance(self.folder, str) else list(self.folder or [self.name])


@dataclass(frozen=True)
class Suite:
    """Datasets that are measured together.

    Attributes:
        name: Name of the suite.
        measures: One of `MEASURES`.
        entries: Its datasets.

    Raises:
        ValueError: If `measures` is unknown, names repeat, or the suite cannot measure the layout of an entry.
    """

    name: str
    measures: str
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        """Raise if the suite cannot measure its entries."""
        if self.measures not in MEASURES:
            raise ValueError(f"Suite {self.name!r}: measures must be one of {list(MEASURES)}, got {self.measures!r}.")
        names = [entry.name for entry in self.entries]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"Suite {self.name!r} must have entries of different names, got {names}.")
        for entry in self.entries:
            if entry.layout not in MEASURES[self.measures]:
                raise ValueError(
                    f"Entry {entry.name!r} of suite {self.name!r}: layout {entry.layout!r} is none of "
                    f"{sorted(MEASURES[self.measures])}, the layouts of a suite that measures {self.measures!r}."
                )


def suite_names() -> list[str]:
    """Return the names of the suites in the package.

    Returns:
        Names for `load_suite`, sorted.
    """
    return sorted(Path(file.name).stem for file in files("clip_po").joinpath("assets", "suites").iterdir())


def load_suite(name: str, within: Sequence[str] = ()) -> Suite:
    """Load a suite of the package, or one of your own.

    Args:
        name: One of `suite_names()`, or a YAML file with `measures`, `entries` (as `Entry`), and optionally `include`,
            a list of suites of the package whose entries are appended.
        within: Suites that include this one, which it may not include.

    Returns:
        The suite.

    Raises:
        ValueError: If there is no such suite, or an entry is not valid; the message names it.
    """
    if name in suite_names():
        text = files("clip_po").joinpath("assets", "suites", f"{name}.yaml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"There is no suite {name!r}: it is not a file, and the suites of the package are {suite_names()}. Give "
            "one of them, or a YAML file."
        )
    try:
        found = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{name} is not valid YAML ({error}). Fix it.") from error
    if not isinstance(found, dict) or not {"measures", "entries"} <= set(found) <= {"measures", "entries", "include"}:
        raise ValueError(f"{name} must have the keys measures and entries, and may have include. See docs/suites.md.")
    entries = [_entry(name, row) for row in found["entries"] or []]
    for other in found.get("include", []):
        if other in (name, *within):
            raise ValueError(f"{name} includes {other}, which includes it. Remove one of the two includes.")
        entries += load_suite(other, (name, *within)).entries
    return Suite(Path(name).stem, found["measures"], tuple(entries))


def _entry(suite: str, row: Any) -> Entry:
    known = {member.name for member in fields(Entry)}
    if not isinstance(row, dict) or not set(_REQUIRED) <= set(row) <= known:
        named = row.get("name", row) if isinstance(row, dict) else row
        keys = set(row) if isinstance(row, dict) else set()
        raise ValueError(
            f"Entry {named!r} of {suite} lacks {sorted(set(_REQUIRED) - keys)} and has the unknown keys "
            f"{sorted(keys - known)}. See docs/suites.md."
        )
    return Entry(**row)


def load_entry(entry: Entry, suite_folder: str | Path | None = None) -> Dataset:
    """Load an entry with labels, words or captions: a local copy if there is one, else from the Hub.

    Args:
        entry: The entry, with any layout but "attributes" and "vl_bias".
        suite_folder: Folder of local copies, each under one of `entry.folders`.

    Returns:
        Columns `image` and, by layout, `label` (ClassLabel over the candidate set), `word` and `caption`.

    Raises:
        ValueError: If the dataset is not found, or does not match the entry.
    """
    source = entry_source(entry, suite_folder)
    if entry.layout in LAYOUTS:
        pinned = list(entry.class_names) if isinstance(entry.class_names, Sequence) else None
        if entry.layout == "columns":
            where = {"split": entry.split, "config": entry.config, "columns": entry.columns, "where": entry.where}
            return LAYOUTS[entry.layout](source, pinned, **where)
        return LAYOUTS[entry.layout](Path(source), pinned)
    rows = load_split(source, entry.split, entry.config).with_format(None)  # one may be saved with a dataset
    image, other = (
        entry.columns.get(name, name) for name in ("image", "caption" if entry.layout == "captioned" else "label")
    )
    for column in (image, other):
        if column not in rows.column_names:
            raise ValueError(f"{source} has no column {column!r}; it has {rows.column_names}.")
    images = rows.select_columns([image]).rename_columns({image: "image"})
    if entry.layout == "captioned":
        read_captions(rows, other)
        return images.add_column("caption", rows[other], feature=rows.features[other])
    rows = encode_labels(rows, other)
    names, label = read_labels(rows, other, _class_names(entry, rows.features[other]))
    labelled = images.add_column("label", label.tolist(), feature=ClassLabel(names=spaced_apart(names)))
    return _without(labelled, entry, rows.features[other]) if entry.without else labelled


def load_faces(entry: Entry, suite_folder: str | Path | None = None) -> Dataset:
    """Load an entry with an attribute: a local copy if there is one, else from the Hub.

    Args:
        entry: The entry, with the layout "attributes" or "vl_bias".
        suite_folder: As for `load_entry`.

    Returns:
        The split with all its columns; of VL-Bias the images with a known gender.

    Raises:
        ValueError: If the dataset is not found, or as for `load_split` and `load_vl_bias`.
    """
    source = entry_source(entry, suite_folder)
    if entry.layout == "attributes":
        return load_split(source, entry.split, entry.config).with_format(None)
    people = load_vl_bias(source, str(entry.config))
    return people.select([row for row, gender in enumerate(people["gender"]) if gender is not None])


def entry_source(entry: Entry, suite_folder: str | Path | None) -> str:
    """Return where an entry is loaded from: a folder or a Hub id.

    Args:
        entry: The entry.
        suite_folder: As for `load_entry`.

    Returns:
        The local copy if there is one, else `path` of the entry.

    Raises:
        ValueError: If there is no local copy, and the dataset is not on the Hub in this layout.
    """
    copies = [Path(suite_folder, name) for name in entry.folders] if suite_folder is not None else []
    for copy in copies:
        if copy.is_dir():
            return str(copy)
    if entry.path is None or (entry.layout in _FOLDERS and not Path(entry.path).is_dir()):
        there = f"there is no folder {' or '.join(map(str, copies))}" if copies else "no --suite_folder was given"
        raise ValueError(
            f"Its authors publish it outside the Hub, and {there}. Download {entry.name} ({entry.source}), unpack it "
            f"to DIR/{entry.folders[0]} and give --suite_folder DIR."
        )
    return entry.path


def _class_names(entry: Entry, feature: Any) -> list[str] | None:
    if isinstance(entry.class_names, Sequence):
        return list(entry.class_names)
    if not isinstance(feature, ClassLabel):
        return None
    better = {name.casefold(): called for name, called in (entry.class_names or {}).items()}
    _check_known(entry, feature, better)
    return [better.get(name.casefold(), readable_name(name, entry.name_until)) for name in feature.names]


def _check_known(entry: Entry, feature: ClassLabel, named: Iterable[str]) -> None:
    unknown = {name.casefold() for name in named} - {name.casefold() for name in feature.names}
    if unknown:
        raise ValueError(
            f"{entry.name} names the classes {sorted(unknown)}, but the dataset has {feature.names}. Fix the entry."
        )


def _without(dataset: Dataset, entry: Entry, feature: Any) -> Dataset:
    """Return the dataset without some classes, with the remaining ones renumbered."""
    if not isinstance(feature, ClassLabel):
        raise ValueError(f"{entry.name}: `without` needs a column with class names, got {feature}.")
    _check_known(entry, feature, entry.without)
    out = {name.casefold() for name in entry.without}
    kept = [number for number, name in enumerate(feature.names) if name.casefold() not in out]
    place = {number: position for position, number in enumerate(kept)}
    label = list(dataset["label"])
    rows = dataset.select([row for row, number in enumerate(label) if number in place])
    names = [dataset.features["label"].names[number] for number in kept]
    numbers = [place[number] for number in label if number in place]
    return rows.remove_columns("label").add_column("label", numbers, feature=ClassLabel(names=names))
