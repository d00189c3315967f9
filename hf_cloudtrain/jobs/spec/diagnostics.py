"""All problems of a document at once, as sentences: the line, the key, the value, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from hf_cloudtrain.errors import JobFileError
from hf_cloudtrain.jobs.spec.document import Document, KeyPath, Problem, dotted, read_document
from hf_cloudtrain.runtime.redaction import redact, visible

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_PROBLEMS = 50
"""Problems that are shown of one document; a file with more is not of this kind."""
MAX_QUOTED = 100
"""Characters of a key or a value that are quoted."""

_MUST_BE = {
    "string_type": "one text",
    **dict.fromkeys(("dict_type", "mapping_type"), "a mapping: `NAME: value`, one on each line"),
    "list_type": "a list: `- item`, one on each line",
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
}
_LIMITS = {"greater_than_equal": "at least", "less_than_equal": "at most"}

Model = TypeVar("Model", bound=BaseModel)
Relations = Callable[[dict[str, Any]], Iterator[tuple[KeyPath, str]]]
"""Checks the data for values that are valid alone and wrong together: yields the key and a sentence for each."""


class DocumentFormat(Generic[Model]):
    """What a kind of document must look like.

    Args:
        model: the keys and their values.
        relations: further checks. They run on the data as it was written, so that all problems are reported at once.
        hints: what to do about certain unknown keys, by their path, such as "checkpoint.input".
        secret: keys of the top level below which no value is quoted.
    """

    def __init__(
        self,
        model: type[Model],
        relations: Relations,
        *,
        hints: Mapping[str, str] | None = None,
        secret: frozenset[str] = frozenset(),
    ) -> None:
        self._model = model
        self._relations = relations
        self._hints = hints or {}
        self._secret = secret

    def parse(self, content: bytes, source: str) -> Model:
        """The content of a file as a model.

        Args:
            source: name of the file, for the error.

        Raises:
            JobFileError: with all problems, each with its line.
        """
        document = read_document(content)
        problems = list(document.problems)
        parsed = None
        if document.data is not None:
            try:
                parsed = self._model.model_validate(document.data)
            except ValidationError as error:
                problems += self._explain(error, document)
            for path, text in self._relations(document.data):
                problems.append(Problem(document.line(path), text, path))
        if parsed is None or problems:
            problems.sort(key=lambda problem: problem.line)
            shown = [str(problem) for problem in problems[:MAX_PROBLEMS]]
            if len(problems) > MAX_PROBLEMS:
                shown.append(f"{problems[MAX_PROBLEMS].line}: … and {len(problems) - MAX_PROBLEMS} more.")
            raise JobFileError("\n".join(visible(f"{source}:{line}") for line in shown))
        return parsed

    def _explain(self, error: ValidationError, document: Document) -> Iterator[Problem]:
        """A problem for each error, in the order of the lines. Those after the first `MAX_PROBLEMS` are only counted."""
        refused = {problem.path for problem in document.problems if problem.path}
        details = [(_written_path(detail, document), detail) for detail in error.errors(include_url=False)]
        details.sort(key=lambda item: document.line(item[0]))
        count = 0
        for path, detail in details:
            # The parser has removed what it refused from the data: do not report it as missing too.
            if any(path[:end] in refused for end in range(1, len(path) + 1)):
                continue
            count += 1
            # Finding the nearest of all keys takes a millisecond, and a file may have 30,000 unknown ones.
            text = self._text(path, detail) if count <= MAX_PROBLEMS else "one more."
            yield Problem(document.line(path), text, path)

    def _text(self, path: KeyPath, detail: ErrorDetails) -> str:
        if detail["type"] == "extra_forbidden":
            return self._unknown(path)
        if detail["type"] == "missing":
            return f"{dotted((*path, detail['loc'][-1]))} is missing."
        if detail["input"] is None:
            return f"{dotted(path)} is empty."
        return f"{dotted(path)} {self._verdict(detail, path)}"

    def _verdict(self, detail: ErrorDetails, path: KeyPath) -> str:
        kind, context = detail["type"], detail.get("ctx", {})
        if kind == "value_error":
            return str(context["error"])
        if kind in ("model_type", "model_attributes_type"):
            return f"must be a mapping with these keys: {', '.join(known_keys(self._model, path))}."
        value = "" if path[:1] and path[0] in self._secret else f", not {quoted(detail['input'])}"
        if kind in _MUST_BE:
            return f"must be {_MUST_BE[kind]}{value}."
        if kind == "literal_error":
            return f"must be {context['expected']}{value}."
        if kind in _LIMITS:
            return f"must be {_LIMITS[kind]} {next(iter(context.values()))}{value}."
        return f"has an invalid value ({kind})."

    def _unknown(self, path: KeyPath) -> str:
        hint = self._hints.get(".".join(map(str, path)))
        if hint:
            return f"{dotted(path)} is not supported: {hint}"
        return f"unknown key {dotted(path)}. {self._nearest(path)}"

    def _nearest(self, path: KeyPath) -> str:
        key = str(path[-1])[:MAX_QUOTED]
        siblings = known_keys(self._model, path[:-1])
        parents: dict[str, list[str]] = {}
        for known in every_key(self._model):
            parents.setdefault(known[-1], []).append(".".join(known[:-1]))
        if key in parents:  # in most cases the indentation is wrong
            where = " and ".join(_below(parent) for parent in parents[key])
            return f"It is known {where}: check the indentation."
        if near := difflib.get_close_matches(key, siblings, n=1):
            return f"The nearest known key is {near[0]!r}."
        if far := difflib.get_close_matches(key, list(parents), n=1):
            return f"The nearest known key is {far[0]!r}, {_below(parents[far[0]][0])}."
        return f"Known here: {', '.join(siblings)}."


def quoted(value: Any) -> str:
    """A value in quotes for messages: short, and without what looks like a secret."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = redact(str(value))
    return repr(text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "…")


def known_keys(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys that may be written below a path; empty where any key may."""
    for key in path:
        if isinstance(key, int):  # an index: the items of a list have the model that was found for the list
            continue
        field = model.model_fields.get(key)
        inner = None if field is None else _model_in(field.annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def every_key(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all keys of a model."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from every_key(inner, (*above, name))


def _below(parent: str) -> str:
    return f"below {parent!r}" if parent else "at the top level"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in `Model`, `Model | None`, `list[Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _written_path(detail: ErrorDetails, document: Document) -> KeyPath:
    """The part of an error's path that is in the document: a missing key is not, and pydantic adds parts such as '[key]'."""
    path: KeyPath = ()
    for part in detail["loc"]:
        if (*path, part) not in document.lines:
            break
        path = (*path, part)
    return path
