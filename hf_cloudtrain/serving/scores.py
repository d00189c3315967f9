"""How good the predictions of a table are, where it has labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.serving import tables
from hf_cloudtrain.serving.source import Model

LABELS = ("label", "labels")
LABEL, ERROR = "predicted_label", "predicted_error"
"""Columns that a prediction adds."""


@dataclass(frozen=True)
class Scores:
    """How good the predictions are, for data with labels."""

    rows: int
    failed: int
    labelled: int
    accuracy: float | None
    f1: float | None
    """The mean over the labels."""


def scores(out: Path, model: Model, label: str | None) -> Scores:
    """Count the rows of an output, and compare its predictions with its labels.

    Args:
        label: the column of the labels, as names or numbers; None: `label` or `labels`, if there is one.

    Raises:
        ConfigurationError: the column does not exist.
    """
    names = tables.columns_of([out])
    column = label or next((name for name in LABELS if name in names), None)
    if column is not None and column not in names:
        raise ConfigurationError(f"The data has no column {column!r}. Its columns are: {', '.join(names)}.")
    labels = _labels(model)
    pairs: Counter[tuple[str, str | None]] = Counter()
    rows = failed = 0
    for table in tables.chunks([out], 10_000):
        rows += table.num_rows
        failed += sum(error not in (None, "") for error in table[ERROR].to_pylist())
        if column is not None and LABEL in table.column_names:
            truth = [labels.get(str(value), str(value)) for value in table[column].to_pylist()]
            pairs.update(zip(truth, table[LABEL].to_pylist(), strict=True))
    right = sum(count for (truth, found), count in pairs.items() if truth == found)
    total = sum(pairs.values())
    if not total:
        return Scores(rows, failed, 0, None, None)
    return Scores(rows, failed, total, right / total, _f1(pairs))


def label_column(names: Sequence[str], label: str | None) -> str | None:
    """The column of the labels, if there is one. Raises ConfigurationError: the one named is not there."""
    column = label or next((name for name in LABELS if name in names), None)
    if column is not None and column not in names:
        raise ConfigurationError(f"The data has no column {column!r}. Its columns are: {', '.join(names)}.")
    return column


def _f1(pairs: Counter[tuple[str, str | None]]) -> float:
    found = []
    for label in {truth for truth, _ in pairs}:
        right = pairs[label, label]
        said = sum(count for (_, other), count in pairs.items() if other == label)
        there = sum(count for (truth, _), count in pairs.items() if truth == label)
        found.append(2 * right / (said + there))
    return sum(found) / len(found)


def _labels(model: Model) -> dict[str, str]:
    """The names of the labels by their number, as the model's configuration has them."""
    try:
        record = json.loads((model.folder / "config.json").read_bytes())
        return {str(number): str(name) for number, name in record["id2label"].items()}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}
