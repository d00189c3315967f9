"""The bodies of requests and answers: SageMaker's JSON, JSON Lines and CSV, and the file of an image."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.serving.predictor import RowError
from hf_cloudtrain.serving.tasks import InputError, Task

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


class UnknownTypeError(InputError):
    """The type of a body, or the type asked for, is not spoken here."""


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
        raise UnknownTypeError(f"The encoding {charset[:50]!r} is not read. Send UTF-8.")
    name = name.strip().lower()
    return SAME.get(name, name)


def decode(body: bytes, kind: str, task: Task) -> Request:
    """The rows of a body.

    Raises:
        UnknownTypeError: its type is not read. InputError: it is not of its type.
    """
    if task.reads_images and (kind.startswith("image/") or kind == "application/octet-stream"):
        return Request([body])
    if kind not in (JSON, LINES, CSV):
        known = ", ".join((JSON, LINES, CSV, *(("image/*",) if task.reads_images else ())))
        raise UnknownTypeError(f"The type {kind[:100]!r} is not read. Send one of: {known}.")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"The body is not UTF-8: byte {error.start} cannot be read.") from None
    if kind == CSV:
        return Request(_csv_rows(text))
    if kind == LINES:
        return _of_lines(text)
    found = _parsed(text, "The body")
    if isinstance(found, dict):
        return _of_object(found, "The body")
    return Request(found if isinstance(found, list) else [found])


def encode(answers: Sequence[Any], accept: str) -> tuple[bytes, str]:
    """The body and the type of an answer. A row that failed is an object with `error`.

    Raises:
        UnknownTypeError: the type asked for is not written.
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
            raise UnknownTypeError(f"These answers are not a table. Ask for {JSON} instead of {CSV}.")
        writer.writerow([item.get("label"), item.get("score"), item.get("error")])
    return held.getvalue().encode(), CSV


def accepted(accept: str) -> str:
    """The type of an answer by the header of a request. Raises UnknownTypeError."""
    for part in accept.split(","):
        name = part.partition(";")[0].strip().lower()
        if name in ("", "*/*", "application/*"):
            return JSON
        if SAME.get(name, name) in (JSON, LINES, CSV):
            return SAME.get(name, name)
    raise UnknownTypeError(
        f"The type {accept[:100]!r} is not written. Ask for one of: {JSON}, {LINES}, {CSV}."
    )


def _of_object(found: dict[str, Any], what: str) -> Request:
    if COLUMN not in found or set(found) - KEYS:
        names = ", ".join(repr(str(name)[:50]) for name in list(found)[:5]) or "nothing"
        raise InputError(f"{what} must have 'inputs', and may have 'parameters'. It has {names}.")
    inputs = found[COLUMN]
    return Request(inputs if isinstance(inputs, list) else [inputs], found.get("parameters"))


def _of_lines(text: str) -> Request:
    rows: list[Any] = []
    parameters: list[object] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = _parsed(line, f"Line {number}")
            one = _of_object(found, f"Line {number}") if isinstance(found, dict) else Request([found])
            if len(one.rows) != 1:
                raise InputError(f"Line {number} must have one input.")
        except InputError as error:
            rows.append(RowError(str(error), is_input=True))
            continue
        rows += one.rows
        parameters.append(one.parameters)
    if any(other != parameters[0] for other in parameters):
        raise InputError("All lines of a request must have the same 'parameters'.")
    return Request(rows, parameters[0] if parameters else None)


def _csv_rows(text: str) -> list[Any]:
    """The column `inputs`, or the only column of a table without a header."""
    try:
        table = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error as error:
        raise InputError(f"The body is not CSV: {error}.") from None
    if table and COLUMN in table[0]:
        column, width = table[0].index(COLUMN), len(table[0])
        return [
            row[column] if len(row) == width else RowError(_ragged(row, width), is_input=True)
            for row in table[1:]
        ]
    if any(len(row) != 1 for row in table):
        raise InputError(f"A table with several columns must have a header with {COLUMN!r}.")
    return [row[0] for row in table]


def _ragged(row: Iterable[str], width: int) -> str:
    return f"The row has {len(list(row))} columns, and the header has {width}."


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{what} is nested too deeply.") from None
    except ValueError as error:
        raise InputError(f"{what} is not JSON: {error}.") from None


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
