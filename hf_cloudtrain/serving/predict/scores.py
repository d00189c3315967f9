"""How good the predictions of a table are, where it has labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.serving.predict import tables

LABELS = ("label", "labels")
LABEL, ERROR = "predicted_label", "predicted_error"
"""Columns that a prediction adds."""
UNLABELLED = ("", "nan", "-1")
"""Labels of rows without one, in tables and in GLUE, unless the model knows a label of this name."""


@dataclass(frozen=True)
class Scores:
    """How good the predictions are, for data with labels."""

    rows: int
    failed: int
    labelled: int = 0
    unlabelled: int = 0
    """Rows whose label is missing (null, or GLUE's -1), if the data has labels."""
    accuracy: float | None = None
    f1: float | None = None
    """The mean over the labels."""


def scores(out: Path, names: Mapping[str, str], label: str | None) -> Scores:
    """Count the rows of an output, and compare its predictions with its labels.

    Args:
        names: of the model's labels, by their number.
        label: the column of the labels, as names or numbers; None: `label` or `labels`, if there is one.

    Raises:
        ConfigurationError: the column does not exist.
    """
    column = label_column(tables.look([out])[0], label)
    raw: Counter[tuple[str | None, str]] = Counter()
    rows = failed = 0
    is_text = False
    for table in tables.chunks([out], 10_000):
        rows += table.num_rows
        failed += sum(error not in (None, "") for error in table[ERROR].to_pylist())
        if column is not None and LABEL in table.column_names:
            values = table[column].to_pylist()
            is_text = is_text or any(isinstance(value, str) for value in values)
            raw.update(zip(map(_text, values), table[LABEL].to_pylist(), strict=True))
    truths = _truths({text for text, _ in raw if text is not None}, names, is_text)
    pairs: Counter[tuple[str, str]] = Counter()
    for (text, found), count in raw.items():
        if text in truths:
            pairs[truths[text], found] += count
    unlabelled = raw.total() - pairs.total()
    if not pairs:
        return Scores(rows, failed, 0, unlabelled)
    there, predicted = (Counter[str]() for _ in range(2))
    for (right, found), count in pairs.items():
        there[right] += count
        predicted[found] += count
    hits = {one: pairs[one, one] for one in there}
    f1 = mean(2 * hits[one] / (there[one] + predicted[one]) for one in there)
    return Scores(rows, failed, there.total(), unlabelled, sum(hits.values()) / there.total(), f1)


def label_column(names: Sequence[str], label: str | None) -> str | None:
    """The column of the labels, if there is one. Raises ConfigurationError: the one named is not there."""
    column = label or next((name for name in LABELS if name in names), None)
    if column is not None and column not in names:
        raise ConfigurationError(f"The data has no column {column!r}. Its columns are: {', '.join(names)}.")
    return column


def _text(value: object) -> str | None:
    return None if value is None else str(int(value) if isinstance(value, bool) else value)


def _truths(texts: set[str], names: Mapping[str, str], is_text: bool) -> dict[str, str]:
    """The name of the label by the values of a column, without those that stand for none.

    Either all values are names or all are numbers: whichever reading knows more of them; if both do, texts are names.
    """
    known = frozenset(names.values())
    short = {text: re.sub(r"^(-?\d+)\.0+$", r"\1", text) for text in texts}  # a column with nulls has floats
    by_name = {text: name for text in texts for name in (short[text], text) if name in known}
    by_number = {text: names[short[text]] for text in texts if short[text] in names}
    found = max((by_name, by_number) if is_text else (by_number, by_name), key=len)
    # A label that the model does not know is quoted: it must not equal one that it knows.
    unknown = {text: repr(text) for text in texts if short[text] not in UNLABELLED or short[text] in known}
    return unknown | found
