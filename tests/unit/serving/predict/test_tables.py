"""Tables of three kinds: read in chunks, and written again with all columns as they were."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.serving.predict import tables


def rows_of(path: Path, size: int = 2) -> list[dict[str, object]]:
    return [row for table in tables.chunks(tables.files_of(path), size) for row in table.to_pylist()]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_chunks_cross_the_borders_of_files_and_row_groups(tmp_path: Path, size: int) -> None:
    pq.write_table(pa.table({"n": range(5)}), tmp_path / "b.parquet", row_group_size=2)
    pq.write_table(pa.table({"n": [-1]}), tmp_path / "a.parquet")
    found = list(tables.chunks(tables.files_of(tmp_path), size))
    assert [table["n"].to_pylist() for table in found] == [
        [-1, 0, 1, 2, 3, 4][start : start + size] for start in range(0, 6, size)
    ]


def test_a_csv_keeps_its_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    text = 'id,text\n007,"a, ""b""\n\uac00"\n1e5,\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert rows_of(path) == [{"id": "007", "text": 'a, "b"\n\uac00'}, {"id": "1e5", "text": ""}]
    (table,) = tables.chunks([path], 9)
    tables.write([table], table.schema, tmp_path / "b.csv", "csv")
    assert (tmp_path / "b.csv").read_text() == text


def test_a_blank_line_before_the_header_keeps_the_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n\nid\n007\n")
    assert rows_of(tmp_path / "a.csv") == [{"id": "007"}]


def test_a_long_text_in_a_csv_is_read(tmp_path: Path) -> None:
    long = "x" * 3_000_000
    (tmp_path / "a.csv").write_text(f"text,id\na,1\n{long},2\nb,3\n")
    assert rows_of(tmp_path / "a.csv")[1] == {"text": long, "id": "2"}


def test_json_lines_keep_their_values(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "2020-01-01", "n": {"x": [1]}}\n\n{"text": "b", "n": null, "more": 1}\n')
    (table,) = tables.chunks([path], 9)
    tables.write([table], table.schema, tmp_path / "b.jsonl", "jsonl")
    assert (tmp_path / "b.jsonl").read_text().splitlines() == [
        '{"text": "2020-01-01", "n": {"x": [1]}, "more": null}',
        '{"text": "b", "n": null, "more": 1}',
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n1\n", "CSV parse error: Expected 2 columns, got 1: 1"),
        ("a.csv", b"a,a\n1,2\n", "two columns have the same name"),
        ("a.csv", b'text,label\na,1\nb,"2\nc,3\nd,4', "unexpected end of data"),
        ("a.csv", b"a\n\xff\n", "codec can't decode"),
        ("a.jsonl", b"[1]\n", "row 1 is not a JSON object"),
        ("a.jsonl", b"{\n", "cannot be read: Expecting property name"),
        ("a.parquet", b"nonsense", "cannot be read: Parquet"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        rows_of(tmp_path / name)


def test_what_is_not_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigurationError, match=r"'a\.txt' must end in one of: \.csv"):
        tables.files_of(tmp_path / "a.txt")
    with pytest.raises(ConfigurationError, match="neither a table nor a folder with tables"):
        tables.files_of(tmp_path)
    (tmp_path / "a.csv").touch()
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ConfigurationError, match=r"several kinds: 'a\.csv', 'a\.jsonl'"):
        tables.files_of(tmp_path)
