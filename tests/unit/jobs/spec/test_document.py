"""Untrusted YAML: what is read as text, what is refused, and that nothing else happens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cloudtrain.jobs.spec.document import MAX_BYTES, Document, read_document


def read(text: str) -> Document:
    return read_document(text.encode("utf-8", "surrogatepass"))


def only_problem(text: str) -> str:
    (problem,) = read(text).problems
    return str(problem)


@pytest.mark.parametrize(
    "text", ["no", "1:30", "010", "2026-01-01", "1.10", "1e-4", "0x10", "=", "on", ".inf"]
)
def test_a_value_is_the_text_in_the_file(text: str) -> None:
    assert read(f"a: {text}").data == {"a": text}


def test_an_empty_value_is_none_and_quotes_make_it_text() -> None:
    document = read("a:\nb: ~\nc: null\nd: ''\ne: 'null'\nf: [Null]")
    assert document.data == {"a": None, "b": None, "c": None, "d": "", "e": "null", "f": [None]}
    assert document.problems == ()


def test_folded_and_literal_blocks_follow_yaml() -> None:
    assert read("a: >\n  one\n  two \\\n    --x\nb: |\n  one\n  two\n").data == {
        "a": "one two \\\n  --x\n",
        "b": "one\ntwo\n",
    }


def test_everything_has_the_line_of_its_key() -> None:
    document = read("# a comment\na:\n  b: 1\n\n  c:\n    - x\n    - d: 1\n")
    lines = {("a",): 2, ("a", "b"): 3, ("a", "c"): 5, ("a", "c", 0): 6, ("a", "c", 1, "d"): 7}
    assert {path: document.line(path) for path in lines} == lines
    assert document.line(("a", "b", "what", "is not there")) == 3


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("", 1, "empty"),
        ("# nothing\n---\nx", 3, "not a mapping"),
        ("- a\n- b", 1, "not a mapping"),
        ("a: 1\nb: 2\na: 3", 3, "'a' is a duplicate: it is already set in line 1"),
        ("x:\n  a: 1\n  'a': 3", 3, "'x.a' is a duplicate: it is already set in line 2"),
        ("a: 1\n---\nb: 2", 2, "second document"),
        ("a: [1]\nb: !!python/object/apply:os.system [x]", 2, "tags"),
        ("a: !!binary aGk=", 1, "tags"),
        ("a: &x [1]", 1, "anchors"),
        ("a: 1\n? [b]\n: c", 2, "a key must be text"),
        ("a: 1\n~: c", 2, "a key is empty"),
        ("a: " + "[" * 100, 1, "deeper than 8"),
        ("a: " + "{b: " * 100, 1, "deeper than 8"),
        ("a: 1\n  b: 2", 2, "mapping values are not allowed"),
        ("a: 1\nb: [", 2, "invalid YAML"),
        ("a:\n\tb: 1", 2, "Indent with spaces"),
        ("a: 1\nb: \x07", 2, "#x0007"),
        ('a: "\\0"', 1, "an invalid character"),
        ('a: "\\ud800"', 1, "an invalid character"),
        ('a: 1\n"\\ud800": 1', 2, "a key is empty"),
        ('a: 1\nb: "\\UFFFFFFFF"', 2, "escape"),
        ('a: 1\nb: "\\U00110000"', 2, "escape"),
    ],
)  # fmt: skip
def test_what_settings_do_not_need_is_refused_with_its_line(text: str, line: int, part: str) -> None:
    reported = [str(problem) for problem in read(text).problems]
    assert any(one.startswith(f"{line}: ") and part in one for one in reported), reported


def test_everything_refused_is_reported_and_the_rest_is_still_read() -> None:
    document = read("a: &x 1\nb: *x\nc: 2\na: 3\nd: !t 4")
    assert [problem.line for problem in document.problems] == [1, 2, 4, 5]
    assert document.data == {"a": "1", "b": None, "c": "2", "d": "4"}


def test_a_document_that_ends_early_has_no_data() -> None:
    assert read("a: 1\nb: [").data is None


def test_aliases_that_would_grow_to_gigabytes_cost_nothing() -> None:
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
    document = read("\n".join(lines))
    assert len(document.problems) == 30 + 29 * 9
    assert document.data is not None
    assert document.data["a29"] == [None] * 9


def test_a_file_that_is_too_large_or_not_text_is_refused() -> None:
    assert "131072 bytes" in only_problem("a" * (MAX_BYTES + 1))
    assert read("a: " + "b" * (MAX_BYTES - 3)).problems == ()
    assert str(read_document(b"a: 1\nb: \xff").problems[0]).startswith("2: byte 0xff is not UTF-8")
    assert read_document("a: 1".encode("utf-16")).data is None
    assert read_document(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n").data == {"a": "1", "b": "2"}


def test_a_syntax_error_does_not_show_its_line() -> None:
    assert "hunter2" not in only_problem("env:\n  PASSWORD: hunter2: x")


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab:-[]{}&*!?|>#%@\"'\\ \n\t~0u<,"), max_size=40))
def test_no_text_makes_the_reader_raise(text: str) -> None:
    document = read(text)
    assert document.data is not None or document.problems


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40))
def test_no_bytes_make_the_reader_raise(content: bytes) -> None:
    document = read_document(content)
    assert document.data is not None or document.problems
