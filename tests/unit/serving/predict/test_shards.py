"""A table in shards: what is committed, what is left over, and what a prediction is recognised by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.serving.models.source import Model
from hf_cloudtrain.serving.models.tasks import task_named
from hf_cloudtrain.serving.predict import shards
from hf_cloudtrain.serving.predict.shards import Plan, data_of


class Predictor:
    """Answers each text with its first letter."""

    task = task_named("text-classification")
    labels = {"0": "a", "1": "b"}  # noqa: RUF012 - never changed

    def __init__(self, model: Model | None = None) -> None:
        self.rows: list[str] = []

    def parameters(self, given: object) -> dict[str, Any]:
        return {}

    def answers(self, rows: Sequence[Any], parameters: dict[str, Any]) -> list[Any]:
        self.rows += rows
        return [{"label": row[0], "score": 1.0} for row in rows]


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> Predictor:
    found = Predictor()
    monkeypatch.setattr(shards, "load", lambda model: found)
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for below, letter in (("one", "a"), ("two", "b")):
        (folder / below).mkdir(parents=True)
        (folder / below / "part.csv").write_text("text,label\n" + f"{letter}x,0\n" * 5)
    return folder


def plan_of(data: Path) -> Plan:
    model = data.parent / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    found = Model(model, "x", task_named("text-classification"))
    return Plan(found, data_of(data, None, None), data.parent / "out.parquet", 3, 2)


def run(plan: Plan) -> tuple[list[tuple[int, bool]], dict[str, str]]:
    seen: list[tuple[int, bool]] = []
    return seen, shards.run(plan, 1, lambda rows, is_old: seen.append((rows, is_old)))


def stopped_after(plan: Plan, count: int) -> None:
    def stop(rows: int, is_old: bool) -> None:
        if len(list(plan.parts.glob("[0-9]*.json"))) == count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.run(plan, 1, stop)


def test_a_start_imports_neither_pandas_nor_pydantic(data: Path, tmp_path: Path) -> None:
    """They take as long as many rows, at each start."""
    plan_of(data)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.unit.serving.predict.test_shards import Predictor, plan_of, shards\n"
        "shards.load = Predictor\n"
        f"shards.run(plan_of(Path({str(data)!r})), 1, lambda rows, is_old: None)\n"
        "print({'pandas', 'pydantic', 'torch'} & set(sys.modules))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == "set()\n"


def test_rows_are_counted_before_anything_is_predicted(data: Path, predictor: Predictor) -> None:
    plan = plan_of(data)
    assert (plan.data.rows, plan.count, [plan.rows(n) for n in range(4)]) == (10, 4, [3, 3, 3, 1])
    seen, labels = run(plan)
    assert seen == [(3, False), (3, False), (3, False), (1, False)]
    assert labels == predictor.labels
    assert pq.read_table(plan.out)["predicted_label"].to_pylist() == [*"aaaaabbbbb"]


def test_shards_of_an_earlier_start_are_told_from_new_ones(data: Path, predictor: Predictor) -> None:
    stopped_after(plan_of(data), 2)
    predictor.rows.clear()
    seen, _ = run(plan_of(data))
    assert seen == [(3, True), (3, True), (3, False), (1, False)]
    assert predictor.rows == ["bx"] * 4


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"digest": "x"}'])
def test_a_shard_with_a_damaged_manifest_is_predicted_again(
    data: Path, predictor: Predictor, content: str
) -> None:
    plan = plan_of(data)
    stopped_after(plan, 2)
    plan.manifest(0).write_text(content)
    seen, _ = run(plan)
    assert sorted(seen) == [(1, False), (3, False), (3, False), (3, True)]
    assert pq.read_table(plan.out)["text"].to_pylist() == ["ax"] * 5 + ["bx"] * 5


def test_a_full_disk_and_a_kill_leave_no_file_for_ever(
    data: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(data)
    replace = shards.os.replace

    def full(source: Path, target: Path) -> None:
        if target == plan.part(1):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            run(plan)
    assert sorted(path.name for path in plan.parts.iterdir()) == [
        *("00000.arrow", "00000.json", "lock", "plan.json")
    ]
    left = plan.parts / ".00001.arrow-1-0123abcd"  # of a process that was killed
    left.touch()
    stopped_after(plan, 2)
    assert not left.exists()
    run(plan)
    assert not plan.parts.exists()


def test_files_of_the_same_name_in_different_folders_are_told_apart(data: Path, predictor: Predictor) -> None:
    stopped_after(plan_of(data), 1)
    first = data / "one" / "part.csv"
    first.write_text(first.read_text().replace("ax", "cx"))
    with pytest.raises(ConfigurationError, match=r"a different prediction \(data differ\)"):
        run(plan_of(data))
    recorded = json.loads((plan_of(data).parts / "plan.json").read_text())["data"]
    assert set(recorded) == {"one/part.csv", "two/part.csv"}


def test_a_score_that_is_not_a_number_is_null(
    data: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        predictor,
        "answers",
        lambda rows, _: [{"label": "a", "score": None if row == "bx" else 0.5} for row in rows],
    )
    run(plan_of(data))
    assert pq.read_table(plan_of(data).out)["predicted_score"].to_pylist() == [0.5] * 5 + [None] * 5


def test_shards_without_a_plan_are_of_a_different_prediction(data: Path, predictor: Predictor) -> None:
    plan = plan_of(data)
    stopped_after(plan, 2)
    (plan.parts / "plan.json").unlink()
    predictor.rows.clear()
    run(plan_of(data))
    assert len(predictor.rows) == 10


def test_a_kill_while_the_shards_are_removed_leaves_the_plan(
    data: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(data)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run(plan)
    assert sorted(path.name for path in plan.parts.iterdir()) == ["lock", "plan.json"]
    written = plan.out.read_bytes()
    run(plan)
    assert (plan.out.read_bytes(), plan.parts.exists()) == (written, False)
    plan.parts.mkdir()  # a kill right before its end
    with pytest.raises(ConfigurationError, match=r"out\.parquet' exists"):
        run(plan)


@pytest.mark.parametrize("is_touched", [True, False], ids=["new time", "same time"])
@pytest.mark.parametrize("rows", [4, 6])
def test_a_table_that_changes_while_it_is_predicted_is_named(
    data: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch, rows: int, is_touched: bool
) -> None:
    plan, last = plan_of(data), data / "two" / "part.csv"

    def loaded(model: Model) -> Predictor:
        last.write_text("text,label\n" + "bx,0\n" * rows)
        return predictor

    monkeypatch.setattr(shards, "load", loaded)
    if not is_touched:
        monkeypatch.setattr(shards, "_stamp", lambda path: (0, 0))
        plan = plan_of(data)
    with pytest.raises(ConfigurationError, match="has changed since the command began") as caught:
        run(plan)
    assert repr(str(last if is_touched else data)) in str(caught.value)
    assert not plan.out.exists()


def test_a_table_that_changes_between_the_count_and_the_digest_is_named(
    data: Path, predictor: Predictor
) -> None:
    plan = plan_of(data)
    (data / "two" / "part.csv").write_text("text,label\n" + "bx,0\n" * 20)
    with pytest.raises(ConfigurationError, match="has changed since the command began"):
        run(plan)
    assert not predictor.rows
    run(plan_of(data))
    assert len(predictor.rows) == 25


@pytest.mark.parametrize("content", ["[]", "{", '{"format": 1}'])
def test_shards_of_an_older_format_are_not_continued(data: Path, predictor: Predictor, content: str) -> None:
    plan = plan_of(data)
    stopped_after(plan, 1)
    (plan.parts / "plan.json").write_text(content)
    with pytest.raises(ConfigurationError, match="a different version of hf_cloudtrain wrote it"):
        run(plan)


def test_the_last_shard_has_the_threads_of_the_others(
    data: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process alone would have more, and the last digits of its scores would differ."""
    plan = plan_of(data)
    stopped_after(plan, 3)
    asked = []

    def in_processes(plan: Plan, todo: Sequence[int], processes: int, on_rows: object) -> None:
        asked.append((list(todo), processes))
        shards._predict_shards(plan, todo, lambda index: None)

    monkeypatch.setattr(shards, "_in_processes", in_processes)
    shards.run(plan, 4, lambda rows, is_old: None)
    assert asked == [([3], 4)]


def test_a_table_without_rows_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(ConfigurationError, match=r"a\.csv' has no rows"):
        data_of(tmp_path / "a.csv", None, None)
