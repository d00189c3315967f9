"""What pydantic finds wrong with a document, as sentences for whoever wrote it: line, key, value, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from hf_cloudtrain.jobs.spec.diagnostics import Document, Place, Problem, dotted
from hf_cloudtrain.runtime.redaction import redact

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

LONGEST = 100
"""Characters that are quoted of a key or a value."""


class Explainer:
    """Turns validation errors into problems.

    Args:
        model: what the document should be.
        hints: what to do about certain unknown keys, by their place, such as "checkpoint.input".
        secret: keys of the top below which no value is quoted.
        limit: problems of which all is said.
    """

    def __init__(
        self, model: type[BaseModel], hints: Mapping[str, str], secret: frozenset[str], limit: int
    ) -> None:
        self._model = model
        self._hints = hints
        self._secret = secret
        self._limit = limit

    def explain(self, error: ValidationError, document: Document) -> Iterator[Problem]:
        """A problem for each error, in the order of the lines; those after the first `limit` are only counted."""
        refused = {problem.place for problem in document.problems if problem.place}
        placed = [(_place(detail, document), detail) for detail in error.errors(include_url=False)]
        placed.sort(key=lambda item: document.line(item[0]))
        count = 0
        for place, detail in placed:
            # What the parser refused is gone from the data: it is not missing as well.
            if any(place[:end] in refused for end in range(1, len(place) + 1)):
                continue
            count += 1
            # To look for the nearest of all keys takes a millisecond, and a file may have 30,000 that are unknown.
            text = self._text(place, detail) if count <= self._limit else "one more."
            yield Problem(document.line(place), text, place)

    def _text(self, place: Place, detail: ErrorDetails) -> str:
        if detail["type"] == "extra_forbidden":
            return self._unknown(place)
        if detail["type"] == "missing":
            return f"{dotted((*place, detail['loc'][-1]))} is missing."
        if detail["input"] is None:
            return f"{dotted(place)} is empty."
        return f"{dotted(place)} {self._verdict(detail, place)}"

    def _verdict(self, detail: ErrorDetails, place: Place) -> str:
        kind, context = detail["type"], detail.get("ctx", {})
        if kind == "value_error":
            return str(context["error"])
        if kind in ("model_type", "model_attributes_type"):
            return f"takes keys of its own: {', '.join(known_keys(self._model, place))}."
        value = "" if place[:1] and place[0] in self._secret else f", not {quoted(detail['input'])}"
        if kind == "string_type":
            return f"must be one text{value}."
        if kind in ("dict_type", "mapping_type"):
            return f"must be a mapping: `NAME: value`, one a line{value}."
        if kind == "list_type":
            return f"must be a list: `- item`, one a line{value}."
        if kind in ("int_parsing", "int_type", "int_from_float", "int_parsing_size"):
            return f"must be a whole number{value}."
        if kind in ("bool_parsing", "bool_type"):
            return f"must be true or false{value}."
        if kind == "literal_error":
            return f"must be {context['expected']}{value}."
        limits = {"greater_than_equal": "at least", "less_than_equal": "at most"}
        if kind in limits:
            return f"must be {limits[kind]} {next(iter(context.values()))}{value}."
        return f"cannot be that ({kind})."

    def _unknown(self, place: Place) -> str:
        hint = self._hints.get(".".join(map(str, place)))
        if hint:
            return f"{dotted(place)} is not supported: {hint}"
        return f"unknown key {dotted(place)}. {self._nearest(place)}"

    def _nearest(self, place: Place) -> str:
        key = str(place[-1])[:LONGEST]
        beside = known_keys(self._model, place[:-1])
        homes: dict[str, list[str]] = {}
        for path in _every_key(self._model, ()):
            homes.setdefault(path[-1], []).append(".".join(path[:-1]))
        if key in homes:  # most of all a slip of the indentation
            where = " and ".join(f"below {home!r}" if home else "at the top" for home in homes[key])
            return f"It is known {where}: is it indented right?"
        near = difflib.get_close_matches(key, beside, n=1)
        if near:
            return f"The nearest known key is {near[0]!r}."
        far = difflib.get_close_matches(key, list(homes), n=1)
        if far:
            home = homes[far[0]][0]
            return f"The nearest known key is {far[0]!r}, {f'below {home!r}' if home else 'at the top'}."
        return f"Known here: {', '.join(beside)}."


def quoted(value: Any) -> str:
    """A value for people, in quotes: short, and without what looks like a secret."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = redact(str(value))
    return repr(text if len(text) <= LONGEST else text[:LONGEST] + "…")


def known_keys(model: type[BaseModel], place: Place) -> list[str]:
    """The keys that may be written below a place; none where any name may be."""
    for key in place:
        if isinstance(key, int):  # of a list: its items have the model that was found for it
            continue
        field = model.model_fields.get(key)
        inner = None if field is None else _model_in(field.annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _every_key(model: type[BaseModel], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*above, name)
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _every_key(inner, (*above, name))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in `Model`, `Model | None`, `list[Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _place(detail: ErrorDetails, document: Document) -> Place:
    """As much of the error's place as was written: a missing key was not, and pydantic adds words such as '[key]'."""
    place: Place = ()
    for part in detail["loc"]:
        if (*place, part) not in document.lines:
            break
        place = (*place, part)
    return place
