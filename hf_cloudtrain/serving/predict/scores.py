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
    pairs: Counter[tuple[str, str]] = Counter()
    known = frozenset(names.values())
    rows = failed = unlabelled = 0
    for table in tables.chunks([out], 10_000):
        rows += table.num_rows
        failed += sum(error not in (None, "") for error in table[ERROR].to_pylist())
        if column is not None and LABEL in table.column_names:
            both = zip(table[column].to_pylist(), table[LABEL].to_pylist(), strict=True)
            counted = [
                (truth, said) for value, said in both if (truth := _truth(value, names, known)) is not None
            ]
            unlabelled += table.num_rows - len(counted)
            pairs.update(counted)
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


def _truth(value: object, names: Mapping[str, str], known: frozenset[str]) -> str | None:
    """The name of the label that the data has for a row; None if it has none."""
    text = str(int(value) if isinstance(value, bool) else value)
    text = re.sub(r"^(-?\d+)\.0+$", r"\1", text)  # a column with nulls has floats
    if text in known:
        return text
    return None if value is None or text in UNLABELLED else names.get(text, text)
