"""Tables row by row: what is written is read, broken files are named, and a failed write leaves nothing."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_po.data.row_files import read_rows, row_writer

SCHEMA = pa.schema([("number", pa.int64()), ("text", pa.string()), ("error", pa.string())])
ROWS = [
    {"number": 1, "text": 'a "cat", and\na dog', "error": None},
    {"number": 2, "text": "Kätzchen, 猫\t\u2028", "error": "broken"},
    {"number": 3, "text": "  ", "error": None},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".JSONL"])
def test_what_is_written_is_read(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    with row_writer(file, SCHEMA) as write:
        write(ROWS[:1])
        write([])
        write(ROWS[1:])
    kinds = {"number": str} if suffix in (".csv", ".tsv") else {}
    assert list(read_rows(file)) == [{k: kinds.get(k, lambda v: v)(v) for k, v in row.items()} for row in ROWS]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def failing_after(rows):
    yield from rows
    raise ValueError("stop")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    file.write_text("old")
    with pytest.raises(ValueError, match="stop"), row_writer(file, SCHEMA) as write:
        write(failing_after(ROWS))
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_large_parquet_file_is_written_and_read_in_parts(tmp_path):
    with row_writer(tmp_path / "rows.parquet", SCHEMA) as write:
        for number in range(3000):
            write([{"number": number}])
    parts = pq.ParquetFile(tmp_path / "rows.parquet").metadata.num_row_groups
    assert 2 <= parts <= 3
    rows = read_rows(tmp_path / "rows.parquet")
    assert [row["number"] for row in rows] == [*range(3000)]


def test_empty_lines_and_a_mark_of_the_encoding_are_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text('\ufeff{"a": 1}\n\n  \n{"a": 2}', encoding="utf-8")
    assert list(read_rows(tmp_path / "rows.jsonl")) == [{"a": 1}, {"a": 2}]
    (tmp_path / "rows.csv").write_text("\ufeffa,b\n1,\n\n2,3\n", encoding="utf-8")
    assert list(read_rows(tmp_path / "rows.csv")) == [{"a": "1", "b": None}, {"a": "2", "b": "3"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", '{"a": 1}\n{"a": \n', "rows.jsonl, line 2 is not JSON"),
        ("rows.jsonl", "[1]\n", r"rows.jsonl, line 1 is \[1\], expected an object"),
        ("rows.jsonl", "[" * 100_000 + "\n", "line 1 is not JSON"),
        ("rows.csv", "a,b\n1,2\n1,2,3\n", "rows.csv, line 3 has more cells than the 2 columns"),
        ("rows.parquet", "no table", "rows.parquet.* is not a Parquet file"),
        ("rows.xlsx", "", "extension '.xlsx', which names no format"),
        ("rows", "", "extension '', which names no format"),
        ("rows.jsonl", b"\xff\xfe\x00", "is not UTF-8"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, said):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said):
        list(read_rows(file))


def test_rows_without_a_file_are_json_lines_on_standard_output(capsys):
    with row_writer(None, SCHEMA) as write:
        write(ROWS)
    assert [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]] == ROWS
