"""The bodies of requests and answers: SageMaker's JSON, JSON Lines and CSV, and the file of an image."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.serving.models.predictor import RowError
from hf_cloudtrain.serving.models.tasks import RequestError, Task

JSON, LINES, CSV = "application/json", "application/jsonlines", "text/csv"
SAME = {
    "application/x-jsonlines": LINES,
    "application/jsonl": LINES,
    "application/x-ndjson": LINES,
    "": JSON,
    "application/x-www-form-urlencoded": JSON,
}
"""Other names of the types. A request without a type is JSON, as SageMaker takes it; so is one of curl, which names that of forms."""
COLUMN = "inputs"
"""The column of a CSV, and the key of a JSON object, with the inputs."""
KEYS = {COLUMN, "parameters"}
MOST_ROWS = 10_000
"""Rows of a request, and those of all requests that wait."""


@dataclass(frozen=True)
class Request:
    """The rows of one request, and its parameters as the client sent them."""

    rows: list[Any]
    parameters: object = None


def media_type(header: str) -> str:
    """The type of a body by its header, without parameters."""
    name, _, rest = header.partition(";")
    charset = rest.partition("charset=")[2].strip().strip('"').lower()
    if charset not in ("", "utf-8", "utf8", "us-ascii"):
        raise RequestError(f"The encoding {charset[:50]!r} is not read. Send UTF-8.", 415)
    name = name.strip().lower()
    return SAME.get(name, name)


def decode(body: bytes, kind: str, task: Task) -> Request:
    """The rows of a body.

    Raises:
        RequestError: its type is not read, it is not of its type, or it has too many rows.
    """
    if task.reads_images and (kind.startswith("image/") or kind == "application/octet-stream"):
        return Request([body])
    if kind not in (JSON, LINES, CSV):
        known = ", ".join((JSON, LINES, CSV, *(("image/*",) if task.reads_images else ())))
        raise RequestError(f"The type {kind[:100]!r} is not read. Send one of: {known}.", 415)
    asked = {CSV: _of_csv, LINES: _of_lines, JSON: _of_json}[kind](decoded(body))
    _limited(asked.rows)
    return asked


def encode(answers: Sequence[Any], accept: str) -> tuple[bytes, str]:
    """The body and the type of an answer. A row that failed is an object with `error`.

    Raises:
        RequestError: the type asked for is not written.
    """
    kind = accepted(accept)
    shown = [{"error": item.text} if isinstance(item, RowError) else item for item in answers]
    if kind == JSON:
        return _dumped(shown).encode(), JSON
    if kind == LINES:
        return "".join(f"{_dumped(item)}\n" for item in shown).encode(), LINES
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow(["label", "score", "error"])
    for item in shown:
        is_flat = isinstance(item, dict) and ("error" in item or set(item) == {"label", "score"})
        if not is_flat:
            raise RequestError(f"These answers are not a table. Ask for {JSON} instead of {CSV}.", 415)
        writer.writerow([item.get("label"), item.get("score"), item.get("error")])
    return held.getvalue().encode(), CSV


def accepted(accept: str) -> str:
    """The type of an answer by the header of a request. Raises RequestError."""
    for part in accept.split(","):
        name = part.partition(";")[0].strip().lower()
        if name in ("", "*/*", "application/*"):
            return JSON
        if SAME.get(name, name) in (JSON, LINES, CSV):
            return SAME.get(name, name)
    text = f"The type {accept[:100]!r} is not written. Ask for one of: {JSON}, {LINES}, {CSV}."
    raise RequestError(text, 415)


def _of_json(text: str) -> Request:
    found = parsed(text)
    return Request(found) if isinstance(found, list) else _of_value(found, "The body")


def _of_value(found: Any, what: str) -> Request:
    if not isinstance(found, dict):
        return Request([found])
    if COLUMN not in found or set(found) - KEYS:
        names = ", ".join(repr(str(name)[:50]) for name in list(found)[:5]) or "nothing"
        raise RequestError(f"{what} must have 'inputs', and may have 'parameters'. It has {names}.")
    inputs = found[COLUMN]
    return Request(inputs if isinstance(inputs, list) else [inputs], found.get("parameters"))


def _of_lines(text: str) -> Request:
    rows: list[Any] = []
    parameters: list[object] = []
    # Not splitlines(): a JSON text may hold other line breaks of Unicode.
    for number, line in enumerate(_limited(io.StringIO(text)), start=1):
        if not line.strip():
            continue
        try:
            one = _of_value(parsed(line, f"Line {number}"), f"Line {number}")
            if len(one.rows) != 1:
                raise RequestError(f"Line {number} must have one input.")
        except RequestError as error:
            rows.append(RowError(str(error), is_input=True))
            continue
        rows += one.rows
        parameters.append(one.parameters)
    if any(other != parameters[0] for other in parameters):
        raise RequestError("All lines of a request must have the same 'parameters'.")
    return Request(rows, parameters[0] if parameters else None)


def _of_csv(text: str) -> Request:
    """The column `inputs`, or the only column of a table without a header."""
    csv.field_size_limit(2**31 - 1)  # the body is limited
    try:
        records = csv.reader(io.StringIO(text, newline=""), strict=True)
        table = [row for row in _limited(records, MOST_ROWS + 1) if row]
    except csv.Error as error:
        raise RequestError(f"The body is not CSV: {error}.") from None
    if table and COLUMN in table[0]:
        column, width = table[0].index(COLUMN), len(table[0])
        ragged = "The row has {} columns, and the header has {}."
        return Request(
            [
                row[column] if len(row) == width else RowError(ragged.format(len(row), width), is_input=True)
                for row in table[1:]
            ]
        )
    if any(len(row) != 1 for row in table):
        raise RequestError(f"A table with several columns must have a header with {COLUMN!r}.")
    return Request([row[0] for row in table])


def _limited(rows: Iterable[Any], most: int = MOST_ROWS) -> list[Any]:
    """The rows; those above the limit are not even read."""
    found = list(itertools.islice(rows, most + 1))
    if len(found) > most:
        raise RequestError(f"The request has more than the {MOST_ROWS:,} rows that are read.", 413)
    return found


def decoded(body: bytes) -> str:
    """A body as text. Raises RequestError."""
    try:
        return body.decode("utf-8-sig")  # Excel writes a mark of the byte order
    except UnicodeDecodeError as error:
        raise RequestError(f"The body is not UTF-8: byte {error.start} cannot be read.") from None


def parsed(text: str | bytes, what: str = "The body") -> Any:
    """What a JSON text holds. Raises RequestError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise RequestError(f"{what} is nested too deeply.") from None
    except ValueError as error:
        raise RequestError(f"{what} is not JSON: {error}.") from None


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
