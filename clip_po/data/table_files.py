"""Tables as datasets: CSV, TSV, JSON and Parquet files that hold images, or their paths relative to the file."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image, List, Value, load_dataset

from clip_po.data.image_folder import find_split, is_hidden, split_name
from clip_po.data.path_safety import check_resolved

READERS = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
}
"""Builder of `datasets` and its arguments by the extension of a file."""

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Names of a table beside images, as `datasets` has them. Its column `file_name` holds the paths."""


def find_tables(folder: Path, split: str) -> list[Path]:
    """Return the tables of a split in a folder.

    Args:
        folder: The dataset folder.
        split: Name of the split. Tables named after splits, such as "train-00000-of-00002.parquet" and "val.csv", are
            those splits; so is a folder with tables or a metadata file. A single kind of table without a split in its
            name is the split "train".

    Returns:
        Files, sorted; empty if the folder has no tables.

    Raises:
        ValueError: If there are tables, but none of the split, or the name of one holds two splits.
    """
    metadata = _metadata(folder)
    if metadata is not None:
        return [metadata] if split_name(split) == "train" else _missing(folder, split, [metadata])
    by_split = _named_tables(folder)
    if not by_split:
        if not any(_metadata(path) for path in folder.iterdir() if path.is_dir()):
            return []
        chosen = _metadata(find_split(folder, split))
        return [chosen] if chosen is not None else []
    if split in by_split:
        return by_split[split]
    if not any(by_split) and split_name(split) == "train":
        return by_split[""]
    found = [name for name in by_split if name and split_name(name) == split_name(split) is not None]
    return (
        by_split[found[0]]
        if len(found) == 1
        else _missing(folder, split, [path for paths in by_split.values() for path in paths])
    )


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _named_tables(folder: Path) -> dict[str, list[Path]]:
    """Return the tables below a folder by the split that their folder or file name says; "" for those without one."""
    tables: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder).parts
        if path.suffix.lower() not in READERS or not path.is_file() or any(map(is_hidden, below)):
            continue
        said = [name for name in below[:-1] if split_name(name)][:1] or _splits_in(path)
        tables.setdefault(said[0] if said else "", []).append(path)
    if any(tables):
        tables.pop("", None)  # such as classes.json beside train.csv
    return tables


def _splits_in(file: Path) -> list[str]:
    """Return the name of a split in the name of a file, at most one.

    Raises:
        ValueError: If there are two.
    """
    words = [word for word in re.split(r"[\W_\d]+", file.stem.lower()) if split_name(word)]
    if len({split_name(word) for word in words}) > 1:
        raise ValueError(
            f"The name of {str(file)!r} holds {' and '.join(map(repr, words))}: it is not clear which split it is. "
            "Rename the file, or give it as the dataset itself."
        )
    return words[:1]


def _missing(folder: Path, split: str, tables: Sequence[Path]) -> list[Path]:
    names = ", ".join(str(path.relative_to(folder)) for path in tables[:5])
    raise ValueError(
        f"The folder {str(folder)!r} has no table for the split {split!r}; its tables are {names}. A table without a "
        "split in its name is the split 'train'. Name another split with --dataset_train_split, "
        "--dataset_validation_split or --dataset_test_split, or give a file as the dataset itself."
    )


def load_tables(files: Sequence[Path]) -> Dataset:
    """Load tables of one split and one kind.

    Args:
        files: At least one file with an extension of `READERS`.

    Returns:
        The rows. A column `file_name`, if there is no column `image`, is called `image`.

    Raises:
        ValueError: If the files are of several kinds.
    """
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1:
        raise ValueError(
            f"The tables of one split in {str(files[0].parent)!r} are of several kinds: "
            f"{sorted(file.name for file in files)}. Give one of them as the dataset itself."
        )
    reader, arguments = READERS[kinds.pop()]
    rows = load_dataset(reader, data_files={"train": list(map(str, files))}, split="train", **arguments)
    if "file_name" in rows.column_names and "image" not in rows.column_names:
        rows = rows.rename_column("file_name", "image")
    return rows


def replace_column(rows: Dataset, column: str, values: Sequence[Any], feature: ClassLabel | Value | List) -> Dataset:
    """Give a column other values.

    Args:
        rows: The rows.
        column: Name of the column.
        values: One value for each row.
        feature: Their feature.

    Returns:
        The rows with the column last.
    """
    # The old column goes last: a dataset without columns has no rows either.
    added = rows.add_column(f"new {column}", list(values), feature=feature)
    return added.remove_columns(column).rename_column(f"new {column}", column)


def decode_images(rows: Dataset, column: str, folder: Path) -> Dataset:
    """Read a column as images if it holds paths or the bytes of files, or lists of them.

    Args:
        rows: Rows of `load_tables`.
        column: Name of the column: paths, bytes, or structs of both, as pandas writes them, or lists of these.
        folder: Folder to which the paths are relative.

    Returns:
        The rows with a column of `datasets.Image` or of lists; unchanged if the column is missing or holds anything
        else.

    Raises:
        ValueError: If a path leads out of the folder, or none of the files exists.
    """
    feature = rows.features.get(column)
    several = isinstance(feature, List)
    kind: Any = List(Image()) if several else Image()
    inner = feature.feature if isinstance(feature, List) else feature
    if isinstance(inner, Value) and inner.dtype in ("string", "large_string"):
        paths = [_below(folder, names) for names in rows.with_format(None)[column]]
        lists = (path if isinstance(path, list) else [path] for path in paths)
        named = [path for path in itertools.chain.from_iterable(lists) if path]
        links = [os.path.realpath(path) for path in named if os.path.islink(path)]
        check_resolved([*named, *links], [folder], f"Column {column!r}")
        if named and not any(map(os.path.exists, named)):
            raise ValueError(
                f"None of the {len(named):,} images that column {column!r} names exists, such as {named[0]!r}. Paths "
                "are relative to the file that names them."
            )
        plain: Any = List(Value("string")) if several else Value("string")
        return replace_column(rows, column, paths, plain).cast_column(column, kind)
    is_file = isinstance(inner, dict) and set(inner) == {"bytes", "path"}
    is_bytes = isinstance(inner, Value) and inner.dtype in ("binary", "large_binary")
    return rows.cast_column(column, kind) if is_file or is_bytes else rows


def _below(folder: Path, names: str | list[str | None] | None) -> Any:
    """Return a name, or each name of a list, as a path in a folder. None and empty names stay."""
    if isinstance(names, list):
        return [_below(folder, name) for name in names]
    return names and os.path.join(folder, names)
