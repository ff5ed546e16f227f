"""Tables read and written row by row, in constant memory: JSON lines, CSV, TSV and Parquet."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from clip_po.atomic_write import atomic_write
from clip_po.bounded_text import parse_json

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (*JSON_LINES, *DELIMITERS, ".parquet")
"""Extensions of the files that can be read and written."""

_ROWS_AT_ONCE = 1024  # rows of a Parquet file in memory together

Row = Mapping[str, Any]
Write = Callable[[Iterable[Row]], None]


def check_suffix(file: str | Path, name: str) -> None:
    """Raise if the extension of a file names no format.

    Args:
        file: The file, which need not exist.
        name: Name of the argument in messages.

    Raises:
        ValueError: If the extension is not one of `SUFFIXES`.
    """
    if Path(file).suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{name} {str(file)!r} has the extension {Path(file).suffix!r}, which names no format. Give a file with "
            f"one of the extensions {', '.join(SUFFIXES)}."
        )


def read_rows(file: str | Path) -> Iterator[dict[str, Any]]:
    """Read a table row by row.

    Args:
        file: JSON lines, CSV, TSV or Parquet, by its extension. CSV and TSV have a line with the names of the columns.

    Yields:
        The values of a row by column. Those of CSV and TSV are texts; an empty cell is None.

    Raises:
        ValueError: If the extension is unknown, or a line is no JSON object or has more cells than there are columns;
            the message names the line.
        OSError: If the file can't be read.
    """
    check_suffix(file, "The table")
    suffix = Path(file).suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(file)
        return
    with open(file, encoding="utf-8-sig", newline="") as stream:
        try:
            yield from _json_lines(stream, file) if suffix in JSON_LINES else _cells(stream, file, DELIMITERS[suffix])
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error}). Save it in this encoding.") from error


def _parquet_rows(file: str | Path) -> Iterator[dict[str, Any]]:
    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a Parquet file ({error}). Write it again.") from error
    with table:
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _json_lines(stream: TextIO, file: str | Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is not JSON ({error}). Fix or remove the line.") from error
        if not isinstance(row, dict):
            raise ValueError(f'{file}, line {number} is {row!r}, expected an object such as {{"image": "1.png"}}.')
        yield row


def _cells(stream: TextIO, file: str | Path, delimiter: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(stream, delimiter=delimiter, restkey="")
    for row in reader:
        if "" in row:
            raise ValueError(
                f"{file}, line {reader.line_num} has more cells than the {len(row) - 1} columns. Quote cells that "
                f"contain {delimiter!r}."
            )
        yield {column: cell or None for column, cell in row.items()}


@contextlib.contextmanager
def row_writer(file: str | Path | None, schema: pa.Schema) -> Iterator[Write]:
    """Write a table row by row. The file appears when the block ends, complete, or not at all.

    Args:
        file: JSON lines, CSV, TSV or Parquet, by its extension; None for JSON lines on standard output.
        schema: Names and types of the columns. A column that a row does not have is null.

    Yields:
        A function that writes rows.

    Raises:
        ValueError: If the extension is unknown.
        OSError: If the file can't be written.
    """
    if file is None:
        yield _json_writer(sys.stdout, schema)
        return
    check_suffix(file, "The table")
    suffix = Path(file).suffix.lower()
    with atomic_write(file) as partial:
        if suffix == ".parquet":
            with _parquet_writer(partial, schema) as write:
                yield write
            return
        with partial.open("w", encoding="utf-8", newline="") as stream:
            write_json = suffix in JSON_LINES
            yield _json_writer(stream, schema) if write_json else _cell_writer(stream, schema, DELIMITERS[suffix])


def _json_writer(stream: TextIO, schema: pa.Schema) -> Write:
    def write(rows: Iterable[Row]) -> None:
        for row in rows:
            stream.write(json.dumps({name: row.get(name) for name in schema.names}, ensure_ascii=False) + "\n")

    return write


def _cell_writer(stream: TextIO, schema: pa.Schema, delimiter: str) -> Write:
    writer = csv.DictWriter(stream, schema.names, delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    return writer.writerows


@contextlib.contextmanager
def _parquet_writer(file: Path, schema: pa.Schema) -> Iterator[Write]:
    waiting: list[Row] = []  # small row groups would be slow to read
    with pq.ParquetWriter(file, schema) as writer:

        def write(rows: Iterable[Row]) -> None:
            waiting.extend(rows)
            if len(waiting) >= _ROWS_AT_ONCE:
                flush()

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(list(waiting), schema))
            waiting.clear()

        yield write
        flush()


def parse_list(cell: Any) -> Any:
    """Return the list that a cell of CSV or TSV holds in JSON.

    Args:
        cell: The value of a cell.

    Returns:
        The list; any other value unchanged.
    """
    if not isinstance(cell, str) or not (cell.startswith("[") and cell.endswith("]")):
        return cell
    try:
        return parse_json(cell)
    except ValueError:
        return cell
