"""Tables of inputs and of predictions: parquet, CSV and JSON Lines, read in chunks and written from parts.

The columns of the input are kept as they are: those of a CSV stay text.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.runtime.values import finite

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl"}
"""By the end of a name."""
LONGEST_ROW = 64 * 2**20
"""Bytes of a CSV that Arrow reads at once; a row must fit."""


def kind_of(path: Path) -> str:
    """parquet, csv or jsonl. Raises ConfigurationError for other endings."""
    try:
        return KINDS[path.suffix.lower()]
    except KeyError:
        raise ConfigurationError(
            f"{path.name!r} must end in one of: {', '.join(sorted(KINDS))} (of JSON, one object a line)."
        ) from None


def files_of(path: Path) -> list[Path]:
    """The file itself, or all tables in a folder, sorted by name. Raises ConfigurationError: there is none."""
    if path.is_file():
        kind_of(path)
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in KINDS and file.is_file())
    if not found:
        raise ConfigurationError(
            f"{str(path)!r} is neither a table nor a folder with tables ({', '.join(KINDS)})."
        )
    if len({kind_of(file) for file in found}) > 1:
        names = ", ".join(repr(file.name) for file in found[:5])
        raise ConfigurationError(f"{str(path)!r} has tables of several kinds: {names}. Name one file.")
    return found


def look(files: Sequence[Path]) -> tuple[list[str], int]:
    """The names of the columns of the first file, and the rows of all files."""
    import pyarrow.parquet as pq

    found = []
    for path in files:
        with _named_errors(path):
            if kind_of(path) == "parquet":
                found.append((pq.read_schema(path).names, pq.read_metadata(path).num_rows))
            else:
                table = _table(path)
                found.append((table.column_names, table.num_rows))
    return list(found[0][0]), sum(rows for _, rows in found)


def chunks(files: Sequence[Path], size: int) -> Iterator[pa.Table]:
    """All rows in order, in tables of `size` rows; the last one may be shorter."""
    import pyarrow as pa

    waiting: list[pa.Table] = []
    rows = 0
    for table in _pieces(files, size):
        waiting.append(table)
        rows += table.num_rows
        while rows >= size:
            whole = pa.concat_tables(waiting, promote_options="permissive")
            yield whole.slice(0, size).combine_chunks()
            waiting, rows = [whole.slice(size)], rows - size
    if rows:
        yield pa.concat_tables(waiting, promote_options="permissive").combine_chunks()


def texts(values: Sequence[str | None]) -> pa.Array:
    """A column. For a list, `pa.array` would import pandas, which takes time at each start."""
    import pyarrow as pa

    column = pa.lib.StringBuilder()
    column.append_values(values)
    return column.finish()


def _pieces(files: Iterable[Path], size: int) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in files:
        if kind_of(path) != "parquet":
            yield _table(path)
            continue
        with _named_errors(path), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=size):
                yield pa.Table.from_batches([batch])


def _table(path: Path) -> pa.Table:
    import pyarrow as pa

    with _named_errors(path):
        if kind_of(path) == "csv":
            return _csv_table(path)
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
        odd = [number for number, row in enumerate(rows, start=1) if not isinstance(row, dict)]
        if odd:
            raise ValueError(f"row {odd[0]} is not a JSON object")
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def _csv_table(path: Path) -> pa.Table:
    """All values as texts, so that '007' does not become 7."""
    import pyarrow as pa
    from pyarrow import csv as arrow

    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = (row for row in csv.reader(file, strict=True) if row)
        names = next(rows, [])
        deque(rows, 0)  # raises at a quote that is not closed; Arrow reads all rows after it as one value
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    return arrow.read_csv(
        path,
        read_options=arrow.ReadOptions(block_size=LONGEST_ROW),
        parse_options=arrow.ParseOptions(newlines_in_values=True),
        convert_options=arrow.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        ),
    )


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Names the file in an error about its content."""
    import pyarrow as pa

    try:
        yield
    except (ValueError, csv.Error, pa.ArrowException, RecursionError) as error:
        text = " ".join(str(error).split())[:300]
        raise ConfigurationError(f"{str(path)!r} cannot be read: {text}.") from None


def write(parts: Iterable[pa.Table], schema: pa.Schema, path: Path, kind: str) -> None:
    """Write tables into one file; the same tables give the same bytes."""
    import pyarrow.parquet as pq

    if kind == "parquet":
        with pq.ParquetWriter(path, schema) as writer:
            for part in parts:
                writer.write_table(part.cast(schema))
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            table = csv.writer(file, lineterminator="\n")
            table.writerow(schema.names)
            for part in parts:
                table.writerows([[_cell(value) for value in row.values()] for row in part.to_pylist()])
        else:
            for part in parts:
                file.writelines(
                    f"{json.dumps(finite(row), ensure_ascii=False, default=str)}\n"
                    for row in part.to_pylist()
                )


def _cell(value: Any) -> Any:
    return (
        json.dumps(finite(value), ensure_ascii=False, default=str)
        if isinstance(value, (dict, list))
        else value
    )
