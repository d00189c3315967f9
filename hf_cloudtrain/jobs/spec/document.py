"""Untrusted YAML as plain data, with the line of each part.

Only YAML's parser runs, none of its constructors, so every value is the text in the file: `no`, `1:30`, `010` and
`2026-01-01` stay as they are, and the code that knows a key decides what its text means. What settings do not need is
refused: anchors and aliases (a few of them make a document of gigabytes), tags (which name types to build), duplicate
keys (YAML silently takes the last), several documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from hf_cloudtrain.runtime.redaction import redact, visible

KeyPath = tuple[str | int, ...]
"""Keys and list indices that lead to a value: `("data", "name")`."""

MAX_BYTES = 128 * 1024
"""Largest document. A longer command could not be started: this is the limit of Linux for one argument (MAX_ARG_STRLEN)."""
MAX_DEPTH = 8
"""Deepest nesting; a job file has four levels."""


@dataclass(frozen=True)
class Problem:
    """One problem in a document: its line, counted from 1, a sentence, and the key that it is about."""

    line: int
    text: str
    path: KeyPath = ()

    def __str__(self) -> str:
        return f"{self.line}: {self.text}"


@dataclass(frozen=True)
class Document:
    """A mapping of texts, None, lists and mappings, and their lines."""

    data: dict[str, Any] | None
    """None where the document could not be read to its end."""
    lines: dict[KeyPath, int]
    problems: tuple[Problem, ...]
    """What is refused; `data` holds the rest, so that all problems can be reported at once."""

    def line(self, path: KeyPath) -> int:
        """The line of a value, or of the nearest written value around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_document(content: bytes) -> Document:
    r"""The document in a file. Never raises: what is wrong is in `problems`.

    Example:
        >>> read_document(b"name: a\nenv:\n  DEBUG: yes\n").line(("env", "DEBUG"))
        3
    """
    if len(content) > MAX_BYTES:
        return _unreadable(1, f"the file is larger than the limit of {MAX_BYTES} bytes.")
    try:
        text = content.decode("utf-8")  # the parser skips a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _unreadable(line, f"byte 0x{content[error.start]:02x} is not UTF-8. Save the file as UTF-8.")
    reader = _Reader(text)
    data: dict[str, Any] | None = None
    try:
        data = reader.document()
    except _BrokenError as error:
        reader.problems.append(error.problem)
    return Document(data, reader.lines, tuple(reader.problems))


def _unreadable(line: int, text: str) -> Document:
    return Document(None, {}, (Problem(line, text),))


def dotted(path: KeyPath) -> str:
    """A path in quotes for messages: "'data.name'". In `{TOKEN=abc}` the value has become a part of the key: it is hidden."""
    keys = (f"{key.partition('=')[0]}=***" if "=" in key else redact(key) for key in map(str, path))
    return repr(visible(".".join(keys))[:100])


class _BrokenError(Exception):
    """The document cannot be read beyond this point."""

    def __init__(self, line: int, text: str, path: KeyPath = ()) -> None:
        self.problem = Problem(line, text, path)
        super().__init__(text)


class _Reader:
    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self._text = text
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)

    def document(self) -> dict[str, Any]:
        """The one mapping that the document is."""
        self._next()  # start of the stream
        event = self._next()
        if isinstance(event, yaml.StreamEndEvent):
            raise _BrokenError(1, "the document is empty.")
        event = self._next()
        if not isinstance(event, yaml.MappingStartEvent):
            raise _BrokenError(_line(event), "this is not a mapping: write `key: value` on each line.")
        data: dict[str, Any] = self._value(event, ())
        self._next()  # end of the document
        event = self._next()
        if not isinstance(event, yaml.StreamEndEvent):
            self._refuse(event, "a second document begins here. Move it to a separate file.")
        return data

    def _value(self, event: Any, path: KeyPath) -> Any:
        self.lines.setdefault(path, _line(event))
        if len(path) > MAX_DEPTH:
            raise _BrokenError(_line(event), f"the nesting is deeper than {MAX_DEPTH} levels.", path)
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, "aliases (*name) are not supported. Write the value out.", path)
            return None
        if event.tag not in (None, "!"):  # "!" alone means: text
            self._refuse(event, "tags (!name) are not supported. Remove it.", path)
        if event.anchor is not None:
            self._refuse(event, "anchors (&name) are not supported. Remove it.", path)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(path)
        return self._mapping(path)

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _BrokenError(_line(event), "a key must be text, not a list, mapping or alias.", path)
            key = self._scalar(event, path)
            if not key:
                raise _BrokenError(_line(event), "a key is empty.", path)
            inner = (*path, key)
            if key in found:
                first = self.lines[inner]
                self._refuse(
                    event, f"{dotted(inner)} is a duplicate: it is already set in line {first}.", inner
                )
            self.lines.setdefault(inner, _line(event))
            value = self._value(self._next(), inner)
            found.setdefault(key, value)
        return found

    def _list(self, path: KeyPath) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            found.append(self._value(event, (*path, len(found))))
        return found

    def _scalar(self, event: Any, path: KeyPath) -> str | None:
        text: str = event.value
        if event.style is None and text.lower() in ("", "~", "null"):
            return None
        # Both come from escapes in double quotes; neither can be in a name or in an argument.
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            self._refuse(event, "a text holds an invalid character (\\0 or half of a surrogate pair).", path)
            return None
        return text

    def _refuse(self, event: Any, text: str, path: KeyPath = ()) -> None:
        self.problems.append(Problem(_line(event), text, path))

    def _next(self) -> Any:
        try:
            return next(self._events)
        except yaml.reader.ReaderError as error:
            line = self._text.count("\n", 0, error.position) + 1
            raise _BrokenError(line, f"the character #x{error.character:04x} is not allowed.") from None
        except yaml.MarkedYAMLError as error:
            # Not str(error): it shows the line, which may hold a secret.
            mark = error.problem_mark or error.context_mark
            line = 1 if mark is None else mark.line + 1
            hint = " Indent with spaces." if "'\\t'" in str(error.problem) else ""
            raise _BrokenError(line, f"invalid YAML: {error.problem or error.context}.{hint}") from None
        except (ValueError, OverflowError):  # chr(): "\UFFFFFFFF"
            last = max(self.lines.values(), default=1)
            text = "in this line or below, an escape in double quotes is not a character."
            raise _BrokenError(last, text) from None


def _line(event: Any) -> int:
    line: int = event.start_mark.line
    return line + 1
