"""How good the predictions of a table are, where it has labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.serving.models.source import Model
from hf_cloudtrain.serving.predict import tables

LABELS = ("label", "labels")
LABEL, ERROR = "predicted_label", "predicted_error"
"""Columns that a prediction adds."""


@dataclass(frozen=True)
class Scores:
    """How good the predictions are, for data with labels."""

    rows: int
    failed: int
    labelled: int = 0
    accuracy: float | None = None
    f1: float | None = None
    """The mean over the labels."""


def scores(out: Path, model: Model, label: str | None) -> Scores:
    """Count the rows of an output, and compare its predictions with its labels.

    Args:
        label: the column of the labels, as names or numbers; None: `label` or `labels`, if there is one.

    Raises:
        ConfigurationError: the column does not exist.
    """
    column, names = label_column(tables.columns_of([out]), label), _names(model)
    pairs: Counter[tuple[str, str]] = Counter()
    rows = failed = 0
    for table in tables.chunks([out], 10_000):
        rows += table.num_rows
        failed += sum(error not in (None, "") for error in table[ERROR].to_pylist())
        if column is not None and LABEL in table.column_names:
            truth = [names.get(str(value), str(value)) for value in table[column].to_pylist()]
            pairs.update(zip(truth, table[LABEL].to_pylist(), strict=True))
    if not pairs:
        return Scores(rows, failed)
    there, said = (Counter[str]() for _ in range(2))
    for (right, found), count in pairs.items():
        there[right] += count
        said[found] += count
    hits = {one: pairs[one, one] for one in there}
    f1 = mean(2 * hits[one] / (there[one] + said[one]) for one in there)
    return Scores(rows, failed, there.total(), sum(hits.values()) / there.total(), f1)


def label_column(names: Sequence[str], label: str | None) -> str | None:
    """The column of the labels, if there is one. Raises ConfigurationError: the one named is not there."""
    column = label or next((name for name in LABELS if name in names), None)
    if column is not None and column not in names:
        raise ConfigurationError(f"The data has no column {column!r}. Its columns are: {', '.join(names)}.")
    return column


def _names(model: Model) -> dict[str, str]:
    """The names of the labels by their number, as the model's configuration has them."""
    try:
        record = json.loads((model.folder / "config.json").read_bytes())
        return {str(number): str(name) for number, name in record["id2label"].items()}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}
