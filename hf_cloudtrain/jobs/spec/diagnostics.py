"""YAML that nobody vouches for: plain data, and the line on which each part of it stands.

Only YAML's parser runs, none of its constructors, so every value is the text that somebody wrote: `no`, `1:30`, `010`
and `2026-01-01` stay what they are, and whoever knows what a key means decides what its text is. What a list of
settings has no use for is refused: anchors and aliases (a few of them make a document of gigabytes), tags (which name
types to build), a key twice (of which YAML takes the last), several documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from hf_cloudtrain.runtime.redaction import redact, visible

Place = tuple[str | int, ...]
"""Keys and list indices that lead to a value: `("data", "name")`."""

MAX_BYTES = 128 * 1024
"""Largest document. A command that is longer could not be started: Linux takes so much in one argument (MAX_ARG_STRLEN)."""
MAX_DEPTH = 8
"""Deepest nesting. Of a job file it is four."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one place of a document: its line, counted from 1, and a sentence."""

    line: int
    text: str
    place: Place = ()

    def __str__(self) -> str:
        return f"{self.line}: {self.text}"


@dataclass(frozen=True)
class Document:
    """A mapping with text, None, lists and mappings in it, and where they stand."""

    data: dict[str, Any] | None
    """None where it could not be read to its end."""
    lines: dict[Place, int]
    problems: tuple[Problem, ...]
    """What is refused; `data` holds the rest, so that all that is wrong can be told at once."""

    def line(self, place: Place) -> int:
        """The line of a value, or of the nearest thing around it that was written."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)


def read_document(content: bytes) -> Document:
    r"""The document in a file. Never fails: what is wrong is in `problems`.

    Example:
        >>> read_document(b"name: a\nenv:\n  DEBUG: yes\n").line(("env", "DEBUG"))
        3
    """
    if len(content) > MAX_BYTES:
        return _unreadable(1, f"there are more than the {MAX_BYTES} bytes that are accepted.")
    try:
        text = content.decode("utf-8")  # the parser skips a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _unreadable(
            line, f"byte 0x{content[error.start]:02x} is not UTF-8 text. Save the file as UTF-8."
        )
    reader = _Reader(text)
    data: dict[str, Any] | None = None
    try:
        data = reader.document()
    except _StopError as stop:
        reader.problems.append(stop.problem)
    return Document(data, reader.lines, tuple(reader.problems))


def _unreadable(line: int, text: str) -> Document:
    return Document(None, {}, (Problem(line, text),))


def dotted(place: Place) -> str:
    """A place for people, in quotes: "'data.name'". Who writes `{TOKEN=abc}` has made a key of the value."""
    keys = (f"{key.partition('=')[0]}=***" if "=" in key else redact(key) for key in map(str, place))
    return repr(visible(".".join(keys))[:100])


class _StopError(Exception):
    """What follows cannot be understood."""

    def __init__(self, line: int, text: str, place: Place = ()) -> None:
        self.problem = Problem(line, text, place)
        super().__init__(text)


class _Reader:
    def __init__(self, text: str) -> None:
        self.lines: dict[Place, int] = {}
        self.problems: list[Problem] = []
        self._text = text
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)

    def document(self) -> dict[str, Any]:
        """The one mapping that the document is."""
        self._next()  # the stream begins
        event = self._next()
        if isinstance(event, yaml.StreamEndEvent):
            raise _StopError(1, "the document is empty.")
        event = self._next()
        if not isinstance(event, yaml.MappingStartEvent):
            raise _StopError(_line(event), "the document is not a mapping: write `key: value`, one a line.")
        data: dict[str, Any] = self._value(event, ())
        self._next()  # the document ends
        event = self._next()
        if not isinstance(event, yaml.StreamEndEvent):
            self._refuse(
                event, "a second document begins here. Only one is read: put it into a file of its own."
            )
        return data

    def _value(self, event: Any, place: Place) -> Any:
        self.lines.setdefault(place, _line(event))
        if len(place) > MAX_DEPTH:
            raise _StopError(_line(event), f"the nesting is deeper than {MAX_DEPTH}.", place)
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, "aliases (*name) are not accepted. Write the value out.", place)
            return None
        if event.tag not in (None, "!"):  # "!" alone says: text
            self._refuse(event, "tags (!name) are not accepted. Leave it out.", place)
        if event.anchor is not None:
            self._refuse(event, "anchors (&name) are not accepted. Leave it out.", place)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, place)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(place)
        return self._mapping(place)

    def _mapping(self, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _StopError(_line(event), "a key is one word, not a list, a mapping or an alias.", place)
            key = self._scalar(event, place)
            if not key:
                raise _StopError(_line(event), "a key is empty.", place)
            here = (*place, key)
            if key in found:
                self._refuse(
                    event, f"{dotted(here)} is here a second time, after line {self.lines[here]}.", here
                )
            self.lines.setdefault(here, _line(event))
            value = self._value(self._next(), here)
            found.setdefault(key, value)
        return found

    def _list(self, place: Place) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            found.append(self._value(event, (*place, len(found))))
        return found

    def _scalar(self, event: Any, place: Place) -> str | None:
        text: str = event.value
        if event.style is None and text.lower() in ("", "~", "null"):
            return None
        # Both come from escapes in double quotes, and neither can be a name of anything or an argument.
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            self._refuse(event, "a text holds a character that no text can hold (\\0 or half a pair).", place)
            return None
        return text

    def _refuse(self, event: Any, text: str, place: Place = ()) -> None:
        self.problems.append(Problem(_line(event), text, place))

    def _next(self) -> Any:
        try:
            return next(self._events)
        except yaml.reader.ReaderError as error:
            line = self._text.count("\n", 0, error.position) + 1
            raise _StopError(line, f"the character #x{error.character:04x} is not accepted.") from None
        except yaml.MarkedYAMLError as error:
            # Not str(error): it shows the line, which may hold a secret.
            mark = error.problem_mark or error.context_mark
            line = 1 if mark is None else mark.line + 1
            hint = " Indent with spaces." if "'\\t'" in str(error.problem) else ""
            raise _StopError(line, f"this is not YAML: {error.problem or error.context}.{hint}") from None
        except (ValueError, OverflowError):  # chr(): "\UFFFFFFFF"
            last = max(self.lines.values(), default=1)
            raise _StopError(last, "here or below, an escape in double quotes is no character.") from None


def _line(event: Any) -> int:
    line: int = event.start_mark.line
    return line + 1
