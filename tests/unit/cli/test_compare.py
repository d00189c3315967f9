"""`run compare`: curves and tables of several runs, and groups of runs by experiment."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.cli import tables
from hf_cloudtrain.cli.curve import overlay
from hf_cloudtrain.report import page
from hf_cloudtrain.report.curves import compared_curves
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.history import History
from tests.recorded import BEGAN, FACTS, record_attempt, record_run, write
from tests.unit.cli.terminal import answer, cloudtrain

HOSTILE = "\x1b[2J<script>alert(1)</script>"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(env.STORE, str(tmp_path / "store"))
    record_run(Catalog(Storage(tmp_path / "store" / "runs" / "glue-1")))
    facts = {**FACTS, "command": "train.py --lr 2e-4", "args": json.dumps({"learning_rate": 2e-4, "seed": 1})}
    other = Catalog(Storage(tmp_path / "store" / "runs" / "glue-2"))
    record_attempt(other, began=BEGAN, steps=range(1, 301), facts=facts, state="finished")
    return tmp_path / "store"


def wide_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(tables, "terminal_width", lambda: columns)
    monkeypatch.setattr("hf_cloudtrain.cli.compare.terminal_width", lambda: columns)
    monkeypatch.setattr("hf_cloudtrain.cli.output.terminal_width", lambda: columns, raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: type("Size", (), {"columns": columns})())


@pytest.mark.parametrize(
    ("one", "other"), [("eval_rouge1", "eval_rouge2"), ("정확도", "재현율"), ("a" * 41, "a" * 40 + "b")]
)
def test_each_metric_has_a_chart_of_its_own(one: str, other: str) -> None:
    """A page finds the figure of a chart by its name."""
    logs = [{"step": step, "attempt": 1, "time": 1.0, one: 0.5, other: 0.6} for step in (1, 2)]
    history = History("run", [], logs, [], {})
    charts = [compared_curves(key, [("run", history)]) for key in (one, other)]
    names = [chart.name for chart in charts if chart is not None]
    assert len(set(names)) == 2
    assert all(re.fullmatch("[a-z][a-z0-9]*", name) for name in names), "they are ids of the page"


class TestCompare:
    def test_runs_by_name_show_curves_last_values_and_what_differs(self, store: Path) -> None:
        result = cloudtrain("run", "compare", "glue-1", "glue-2")
        lines = result.stdout.splitlines()
        assert lines[0][0] in "ab", "without colours, letters tell the curves apart"
        assert "a glue-1  0.3386 at step 400" in lines
        assert "b glue-2  0.4489 at step 300" in lines
        assert any(re.match(r"loss, 0\.\d+ to 2\.\d+, at steps 5 to 400", line) for line in lines)
        assert any(re.match(r"glue-1 +finished +400 +45\.7% +0\.338587", line) for line in lines)
        assert any(re.match(r"command +train.py --lr 1e-4 +train.py --lr 2e-4", line) for line in lines)
        assert any(line.startswith("args.learning_rate") for line in lines)
        assert result.stderr.splitlines()[-1].endswith("others are the same.")

    def test_runs_whose_names_differ_at_the_end_or_not_at_all_stay_apart(
        self, store: Path, tmp_path: Path
    ) -> None:
        long = "a-run-with-a-name-that-is-longer-than-a-legend-has-room"
        places = [store / "runs" / f"{long}-1", store / "runs" / f"{long}-2", tmp_path / f"{long}-2"]
        for place in places:
            record_attempt(Catalog(Storage(place)), began=BEGAN, steps=range(1, 51), state="finished")
        lines = cloudtrain("run", "compare", *map(str, places)).stdout.splitlines()
        legend = [line.split("  ")[0] for line in lines if " at step 50" in line]
        assert legend == [f"a {long}-1", f"b {long}-2 (2)", f"c {long}-2 (3)"]

    def test_json_is_by_run(self, store: Path) -> None:
        found = answer("run", "compare", "glue-1", "glue-2")
        assert [run["name"] for run in found["runs"]] == ["glue-1", "glue-2"]
        assert found["runs"][1]["last"]["step"] == "300"
        assert found["runs"][0]["different"]["command"] == "train.py --lr 1e-4"
        assert found["path"] is None

    @pytest.mark.parametrize("columns", [80, 40])
    def test_no_line_is_wider_than_the_terminal(
        self, store: Path, monkeypatch: pytest.MonkeyPatch, columns: int
    ) -> None:
        wide_terminal(monkeypatch, columns)
        facts = {**FACTS, "command": "train.py " + " ".join(f"--option-{number} 1" for number in range(20))}
        for number in range(3, 9):
            catalog = Catalog(Storage(store / "runs" / f"glue-{number}"))
            record_attempt(catalog, began=BEGAN, steps=range(1, 51), facts=facts)
        names = [f"glue-{number}" for number in range(1, 9)]
        output = cloudtrain("run", "compare", *names).stdout
        assert max(map(len, output.splitlines())) <= columns
        assert all(f"  {name}  " in output for name in names), "no run is left out"

    def test_a_page_with_all_curves(
        self, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(page, "packed_plotly", lambda: b"plotly")
        target = tmp_path / "compare.html"
        result = cloudtrain("run", "compare", "glue-1", "glue-2", "-o", str(target))
        assert result.stdout.splitlines()[-1] == str(target)
        html = target.read_text()
        assert "<h1>glue-1 and glue-2</h1>" in html
        packed = re.search(r'id="records"[^>]*>(.*?)</script>', html, re.DOTALL)
        assert packed
        charts: list[dict[str, Any]] = json.loads(gzip.decompress(base64.b64decode(packed[1])))
        assert [trace["name"] for trace in charts[0]["figure"]["data"]] == ["glue-1", "glue-2"]

    def test_names_and_metrics_of_storage_do_not_move_the_cursor(self, store: Path, tmp_path: Path) -> None:
        catalog = Catalog(Storage(store / "runs" / "bad"))
        number = record_attempt(catalog, began=BEGAN, steps=range(1, 51), facts={"host": HOSTILE})
        write(
            catalog,
            number,
            [{"kind": "log", "step": 5, "time": BEGAN, "metrics": {HOSTILE: 1.0, "x" * 10**6: 2.0}}],
            2,
        )
        output = cloudtrain("run", "compare", "glue-1", "bad").stdout
        assert "\x1b" not in output
        assert len(output) < 20_000

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["glue-1"], "Only 'glue-1' is named. Name two runs or more: cloudtrain run compare A B"),
            (["glue-1", "glue-3"], "There is no run 'glue-3' in the store"),
            (["glue-1", "s3:/b/r"], "s3:/b/r"),
        ],
    )
    def test_a_mistake_is_one_sentence(self, store: Path, words: list[str], message: str) -> None:
        result = cloudtrain("run", "compare", *words, code=1)
        assert message in result.stderr
        assert result.stdout == ""


class TestOverlay:
    def test_two_curves_on_the_same_axes(self) -> None:
        falling, flat = [(0.0, 4.0), (8.0, 0.0)], [(4.0, 0.0), (8.0, 0.0)]
        lines = overlay([falling, flat], 9, 5, marks="ab")
        shown = ["".join(mark for mark, _ in line) for line in lines]
        assert shown[0].rstrip() in ("a", "aa")
        assert shown[-1][4:] == "bbbbb"
        assert {number for line in lines for _, number in line} == {None, 0, 1}

    def test_dots_have_the_size_and_the_owner_of_each_cell(self) -> None:
        lines = overlay([[(0.0, 0.0), (1.0, 1.0)], [(0.0, 1.0), (1.0, float("nan"))]], 10, 3)
        assert [len(line) for line in lines] == [10, 10, 10]
        assert lines[0][0][1] == 1
        assert lines[-1][0][1] == 0

    @pytest.mark.parametrize("curves", [[], [[]], [[(1.0, float("inf"))]]])
    def test_nothing_to_draw(self, curves: Any) -> None:
        assert overlay(curves, 10, 3) == []

    def test_a_single_point(self) -> None:
        (line,) = overlay([[(3.0, 1.0)]], 5, 1, marks="a")
        assert [mark for mark, _ in line].count("a") == 1


class TestExperiments:
    def test_runs_of_one_experiment_are_together(
        self, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "experiment" not in cloudtrain("run", "list").stdout
        monkeypatch.setenv(env.EXPERIMENT, "warmup")
        for name in ("a", "z"):
            checkpointer = Checkpointer(str(store / "runs" / name), tmp_path / "out" / name)
            checkpointer.begin(0)
            checkpointer.close()
        lines = cloudtrain("run", "list").stdout.splitlines()
        assert lines[0].split()[:2] == ["run", "experiment"]
        assert [line.split()[0] for line in lines[1:]] == ["glue-1", "glue-2", "a", "z"]
        found = answer("run", "list", "--experiment", "warmup")["runs"]
        assert [(run["name"], run["experiment"]) for run in found] == [("a", "warmup"), ("z", "warmup")]
        none = cloudtrain("run", "list", "--experiment", "other")
        assert "No runs of the experiment 'other'" in none.stderr
