"""Accuracy and F1 of a table with predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_cloudtrain.serving.predict.scores import Scores, scores

NAMES = {"0": "LABEL_0", "1": "LABEL_1"}


def scored(tmp_path: Path, labels: Any, names: dict[str, str] = NAMES) -> Scores:
    predicted = [names[number] for number in "0110"]
    table = {"label": labels, "predicted_label": predicted, "predicted_error": pa.nulls(4, pa.string())}
    pq.write_table(pa.table(table), tmp_path / "out.parquet")
    return scores(tmp_path / "out.parquet", names, None)


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 1, 1],
        [0.0, 1.0, 1.0, 1.0],
        [False, True, True, True],
        ["0", "1", "1", "1"],
        ["0.0", "1.0", "1.0", "1.0"],
        ["LABEL_0", "LABEL_1", "LABEL_1", "LABEL_1"],
    ],
    ids=["numbers", "floats", "booleans", "texts", "texts of floats", "names"],
)
def test_labels_are_numbers_or_names(tmp_path: Path, labels: list[object]) -> None:
    found = scored(tmp_path, labels)
    assert (found.labelled, found.unlabelled, found.accuracy) == (4, 0, 0.75)


@pytest.mark.parametrize(
    "labels",
    [[0, -1, 1, None], [0.0, float("nan"), 1.0, -1.0], ["0", "", "1", "-1"]],
    ids=["numbers", "floats", "texts"],
)
def test_rows_without_a_label_are_not_scored(tmp_path: Path, labels: list[object]) -> None:
    found = scored(tmp_path, labels)
    assert (found.rows, found.labelled, found.unlabelled, found.accuracy) == (4, 2, 2, 1.0)


@pytest.mark.parametrize(
    ("labels", "names", "right"),
    [
        ([0, 1, 2, 1], ["1", "2", "3"], 4),
        ([0, 1, 2, None], ["1", "2", "3"], 3),
        (["1", "2", "3", "2"], ["1", "2", "3"], 4),
        (["0", "1", "2", "1"], ["1", "2", "3"], 4),
        ([1, 2, 3, 2], ["1", "2", "3"], 4),
        ([0, 1, 9, 3], ["1", "2", "3"], 2),
        (["1.0", "2.0", "3.0", "2.0"], ["1.0", "2.0", "3.0"], 4),
        ([1.0, 2.0, 3.0, 2.0], ["1.0", "2.0", "3.0"], 4),
        ([0.0, 1.0, 2.0, None], ["1.0", "2.0", "3.0"], 3),
        ([-1, 0, 1, 0], ["-1", "0", "1"], 4),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_of_labels_whose_names_are_digits_all_are_numbers_or_all_are_names(
    tmp_path: Path, labels: list[object], names: list[str], right: int
) -> None:
    predicted = {"predicted_label": [names[number] for number in (0, 1, 2, 1)]}
    table = {"label": labels, **predicted, "predicted_error": pa.nulls(4, pa.string())}
    pq.write_table(pa.table(table), tmp_path / "out.parquet")
    found = scores(tmp_path / "out.parquet", {str(number): name for number, name in enumerate(names)}, None)
    assert found.labelled == 4 - labels.count(None)
    assert found.accuracy == right / found.labelled


def test_a_table_in_which_no_row_has_a_label_has_no_scores(tmp_path: Path) -> None:
    assert scored(tmp_path, [-1] * 4) == Scores(rows=4, failed=0, unlabelled=4)


def test_a_label_that_the_model_knows_as_minus_one_is_scored(tmp_path: Path) -> None:
    found = scored(tmp_path, ["-1", "1", "-1", "-1"], {"0": "-1", "1": "1"})
    assert (found.labelled, found.unlabelled, found.accuracy) == (4, 0, 0.75)
