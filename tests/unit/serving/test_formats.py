"""Bodies of requests and answers, as SageMaker's containers read and write them."""

from __future__ import annotations

import json

import pytest

from hf_cloudtrain.serving.formats import (
    CSV,
    JSON,
    LINES,
    MOST_ROWS,
    Request,
    accepted,
    decode,
    encode,
    media_type,
)
from hf_cloudtrain.serving.models.predictor import RowError
from hf_cloudtrain.serving.models.tasks import RequestError, task_named

TEXT, IMAGE = task_named("text-classification"), task_named("image-classification")


@pytest.mark.parametrize(
    ("kind", "body", "rows"),
    [
        (JSON, '{"inputs": "a"}', ["a"]),
        (JSON, '{"inputs": ["a", "b"], "parameters": null}', ["a", "b"]),
        (JSON, '["a", {"text": "b", "text_pair": "c"}]', ["a", {"text": "b", "text_pair": "c"}]),
        (JSON, '"a"', ["a"]),
        (LINES, '{"inputs": "a"}\n\n"b"\n{"inputs": ["c"]}', ["a", "b", "c"]),
        (CSV, 'a\n"b, ""c"""\n\n', ["a", 'b, "c"']),
        (CSV, "id,inputs\r\n1,a\r\n2,b\r\n", ["a", "b"]),
        (CSV, "", []),
        (LINES, '{"inputs": "a\u2028b"}\r\n"c"\r\n', ["a\u2028b", "c"]),
    ],
)
def test_a_body_has_rows(kind: str, body: str, rows: list[object]) -> None:
    assert decode(body.encode(), kind, TEXT).rows == rows


def test_the_parameters_of_a_body() -> None:
    assert decode(b'{"inputs": "a", "parameters": {"top_k": 2}}', JSON, TEXT) == Request(["a"], {"top_k": 2})
    same = b'{"inputs": "a", "parameters": {"top_k": 2}}\n{"inputs": "b", "parameters": {"top_k": 2}}'
    assert decode(same, LINES, TEXT).parameters == {"top_k": 2}


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (JSON, b"{", "The body is not JSON"),
        (JSON, b"[" * 100_000, "nested too deeply"),
        (JSON, b'{"input": "a"}', "must have 'inputs', and may have 'parameters'. It has 'input'"),
        (JSON, b'{"inputs": "a", "options": 1}', "It has 'inputs', 'options'"),
        (JSON, "{'inputs': '\uac00'}".encode("cp949"), "not UTF-8: byte"),
        (CSV, b"a,b\n1,2\n", "must have a header with 'inputs'"),
        (CSV, b'"a', "not CSV"),
        (LINES, b'{"inputs": "a", "parameters": {}}\n{"inputs": "b"}', "the same 'parameters'"),
    ],
)
def test_a_body_that_is_wrong_as_a_whole_is_refused(kind: str, body: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        decode(body, kind, TEXT)


def test_a_line_that_is_wrong_fails_alone() -> None:
    rows = decode(b'"a"\n{"inputs": \n{"inputs": ["b", "c"]}\n"d"', LINES, TEXT).rows
    assert [rows[0], rows[3]] == ["a", "d"]
    assert rows[1].text.startswith("Line 2 is not JSON")
    assert rows[2].text == "Line 3 must have one input."


def test_a_row_of_a_table_with_too_few_columns_fails_alone() -> None:
    rows = decode(b"id,inputs\n1,a\n2\n3,b", CSV, TEXT).rows
    assert [rows[0], rows[2]] == ["a", "b"]
    assert rows[1] == RowError("The row has 1 columns, and the header has 2.", is_input=True)


@pytest.mark.parametrize(
    ("kind", "body"),
    [(CSV, b"inputs,id\na,1"), (JSON, b'["a"]'), (LINES, b'"a"')],
    ids=["csv", "json", "lines"],
)
def test_a_mark_of_the_byte_order_is_not_part_of_the_text(kind: str, body: bytes) -> None:
    """Excel writes one; with it, the name of the first column would not be found."""
    assert decode(b"\xef\xbb\xbf" + body, kind, TEXT).rows == ["a"]


def test_a_field_of_a_table_may_be_as_long_as_the_body() -> None:
    assert decode(b"inputs\n" + b"a" * 200_000, CSV, TEXT).rows == ["a" * 200_000]


def test_the_file_of_an_image_is_one_row_for_models_of_images_only() -> None:
    assert decode(b"\x89PNG", "image/png", IMAGE).rows == [b"\x89PNG"]
    with pytest.raises(RequestError, match=r"'image/png' is not read\. Send one of: application/json"):
        decode(b"\x89PNG", "image/png", TEXT)


def test_the_type_of_a_body() -> None:
    assert media_type("Application/JSON; charset=UTF-8") == JSON
    assert media_type("application/x-ndjson") == LINES
    assert media_type("") == JSON
    with pytest.raises(RequestError, match=r"'cp949' is not read\. Send UTF-8"):
        media_type("text/csv; charset=cp949")


def test_the_type_of_an_answer() -> None:
    assert [accepted(name) for name in ("", "*/*", "text/html, text/csv;q=0.9", "application/jsonl")] == [
        *(JSON, JSON, CSV, LINES)
    ]
    with pytest.raises(RequestError, match="'text/html' is not written"):
        accepted("text/html")


def test_answers_in_each_type() -> None:
    answers = [{"label": "\uac00,", "score": 0.5}, RowError("no", is_input=True)]
    body, kind = encode(answers, "")
    assert (json.loads(body), kind) == ([{"label": "\uac00,", "score": 0.5}, {"error": "no"}], JSON)
    assert [json.loads(line) for line in encode(answers, LINES)[0].splitlines()] == json.loads(body)
    assert encode(answers, CSV) == ('label,score,error\n"\uac00,",0.5,\n,,no\n'.encode(), CSV)
    with pytest.raises(RequestError, match="not a table"):
        encode([[{"label": "a", "score": 1.0}]], CSV)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (JSON, json.dumps([1] * (MOST_ROWS + 1))),
        (JSON, json.dumps({"inputs": ["a"] * (MOST_ROWS + 1)})),
        (LINES, '"a"\n' * (MOST_ROWS + 1)),
        (LINES, "\n" * (MOST_ROWS + 1)),
        (CSV, "a\n" * (MOST_ROWS + 1)),
        (CSV, "inputs\n" + "a\n" * (MOST_ROWS + 1)),
        (CSV, "inputs\n" + "\n" * (MOST_ROWS + 1)),
    ],
)
def test_a_request_has_a_limit_of_rows(kind: str, body: str) -> None:
    with pytest.raises(RequestError, match=r"more than the 10,000 rows that are read") as caught:
        decode(body.encode(), kind, TEXT)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (JSON, json.dumps(["a"] * MOST_ROWS)),
        (LINES, '"a"\n' * MOST_ROWS),
        (CSV, "inputs\n" + "a\n" * MOST_ROWS),
    ],
)
def test_as_many_rows_as_the_limit_are_read(kind: str, body: str) -> None:
    assert len(decode(body.encode(), kind, TEXT).rows) == MOST_ROWS
