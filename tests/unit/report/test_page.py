"""`cloudtrain run report`: a page for every run, which shows texts from storage as text and hides secrets."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.cli import app
from hf_cloudtrain.report import curves
from hf_cloudtrain.report.charts import charts_of
from hf_cloudtrain.report.curves import MOST_POINTS
from hf_cloudtrain.report.figure import Chart
from hf_cloudtrain.report.page import MOST_CHECKPOINTS, Report
from hf_cloudtrain.report.timeline import time_spent
from hf_cloudtrain.tracking.history import history_of
from tests.recorded import BEGAN, commit, record_attempt, record_run, write


@pytest.fixture(autouse=True)
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 5 MB of plotly are tested in a browser (tests/integration/test_report.py)."""
    monkeypatch.setattr("hf_cloudtrain.report.page.packed_plotly", lambda: b"plotly")


def report(catalog: Catalog, output: Path, *words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["run", "report", catalog.storage.url, "-o", str(output), *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def page_of(catalog: Catalog, tmp_path: Path) -> str:
    report(catalog, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def text_of(page: str) -> str:
    """Its text, without tags, scripts and styles; the charts are told in words where no script runs."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body))


def figures_of(page: str) -> dict[str, Any]:
    found = re.search(r'id="records"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert found
    charts = json.loads(gzip.decompress(base64.b64decode(found[1])))
    return {chart["name"]: chart["figure"] for chart in charts}


def charts(catalog: Catalog) -> dict[str, Chart]:
    return {chart.name: chart for chart in charts_of(history_of(catalog))}


def points(chart: Chart, name: str) -> list[tuple[float, float]]:
    """Of the curve with that name."""
    (trace,) = (trace for trace in chart.figure["data"] if trace.get("name") == name)
    return [point for point in zip(trace["x"], trace["y"], strict=True) if point[0] is not None]


class TestPage:
    """One file with everything about the run."""

    def test_it_shows_key_figures_charts_attempts_checkpoints_and_facts(
        self, catalog: Catalog, tmp_path: Path
    ) -> None:
        record_run(catalog)
        page = page_of(catalog, tmp_path)
        text = text_of(page)
        for part in (
            *(
                "finished",
                "400 / 400",
                "10 min 33 s",
                "45.7%",
                "at least 30 15.2 s of work lost",
                "on 2 hosts",
            ),
            *("Loss: 0.3386 at step 400", "At least 30 steps were redone", "3 attempts in 10 min 33 s"),
            *("Upload lag: median 8 s", "Slowest 1 min 30 s, step 220", "Evaluations: accuracy 0.8647"),
            *("killed", "failed", "gpu-12", "checkpoint-200", "best", "440.0 MB"),
            *("world size 4", "per device train batch size 16", "exact yes", "train.py --lr 1e-4", "2.13.0"),
        ):
            assert part in text, part
        assert re.findall(r"\b\d{6}-\d{10}\b", text) == [], "a checkpoint is called by its folder"
        assert set(figures_of(page)) == {
            *("loss", "timeline", "goodput", "rate", "steptime", "commits", "metrics")
        }

    def test_it_links_to_the_page_of_a_tracker_and_to_nothing_else(
        self, catalog: Catalog, tmp_path: Path
    ) -> None:
        record_run(catalog)
        last = catalog.attempts.numbers()[-1]
        pages = {"wandb": "https://u:hush-hush@wandb.ai/r/4bc1", "mlflow": "4bc", "x": 'javascript:"<b>'}
        beat = {**(catalog.attempts.read_progress(last) or {}), "trackers": pages}
        catalog.attempts.write_progress(last, beat)
        page = page_of(catalog, tmp_path)
        assert re.findall(r'href="(?!data:)([^"]*)"', page) == ["https://***@wandb.ai/r/4bc1"]
        assert "mlflow: 4bc" in text_of(page)
        assert "hush" not in page
        assert "<b>" not in page

    def test_it_makes_no_request(self, catalog: Catalog, tmp_path: Path) -> None:
        record_run(catalog)
        page = page_of(catalog, tmp_path)
        assert re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:)[^"'\s>]+""", page) == []
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
        assert policy
        assert policy[1].startswith("default-src 'none'; script-src 'nonce-")
        assert "http" not in policy[1]

    def test_json_names_the_file(self, catalog: Catalog, tmp_path: Path) -> None:
        record_run(catalog)
        found = json.loads(report(catalog, tmp_path / "x.html", "--json").stdout)
        size = (tmp_path / "x.html").stat().st_size
        assert found == {"run_url": catalog.storage.url, "path": str(tmp_path / "x.html"), "size": size}

    def test_a_page_is_replaced_whole_or_not_at_all(
        self, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record_run(catalog)
        (tmp_path / "report.html").write_text("before")
        nowhere = tmp_path / "nowhere" / "report.html"
        assert f"The folder '{nowhere.parent}' does not exist" in report(catalog, nowhere, code=1).stderr
        with monkeypatch.context() as patched:
            patched.setattr(
                os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left", "x"))
            )
            assert "No space left" in report(catalog, tmp_path / "report.html", code=1).stderr
        assert (tmp_path / "report.html").read_text() == "before"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]
        assert "<!doctype html>" in page_of(catalog, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]

    def test_a_missing_package_is_named_with_the_command_that_installs_it(
        self, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record_run(catalog)
        monkeypatch.setitem(sys.modules, "plotly", None)
        stderr = report(catalog, tmp_path / "report.html", code=1).stderr
        assert "pip install 'hf_cloudtrain[report]'" in stderr
        assert stderr.count("\n") == 1

    def test_without_a_run_no_page_is_written(self, catalog: Catalog, tmp_path: Path) -> None:
        assert f"run at {catalog.storage.url!r}" in report(catalog, tmp_path / "report.html", code=1).stderr
        assert not (tmp_path / "report.html").exists()


class TestAnyRun:
    """Short, long, damaged or forged: every run has a page."""

    def test_a_run_without_a_step(self, catalog: Catalog, tmp_path: Path) -> None:
        catalog.attempts.begin(time.time(), 0, None, {})
        text = text_of(page_of(catalog, tmp_path))
        assert "started" in text
        assert "None is committed" in text
        assert "The run was not over when this page was written" in text

    def test_a_run_of_one_step(self, catalog: Catalog, tmp_path: Path) -> None:
        record_attempt(catalog, began=BEGAN, steps=range(1, 2), log_steps=1, save_steps=1, state="finished")
        page = page_of(catalog, tmp_path)
        assert "Loss: " in text_of(page)
        (trace,) = figures_of(page)["loss"]["data"][:1]
        assert trace["mode"] == "lines+markers"  # a line of one point is nothing

    def test_a_run_without_loss_or_checkpoints(self, catalog: Catalog, tmp_path: Path) -> None:
        record_attempt(catalog, began=BEGAN, steps=range(1, 20), log_steps=999, save_steps=999)
        assert set(figures_of(page_of(catalog, tmp_path))) == {"timeline", "goodput", "steptime"}

    def test_a_run_of_100_000_steps(self, catalog: Catalog, tmp_path: Path) -> None:
        """The one slow step among them stays visible."""
        seconds = [0.1] * 100_000
        seconds[70_012] = 7.0
        catalog.attempts.begin(BEGAN, 0, None, {})
        logs = [
            {"kind": "log", "step": step, "time": BEGAN + step / 10, "loss": 1 + (step == 50_030)}
            for step in range(0, 100_000, 10)
        ]
        write(catalog, 1, [{"kind": "steps", "first": 1, "seconds": seconds}, *logs])
        catalog.attempts.write_progress(1, {"time": BEGAN + 10_000, "step": 100_000, "state": "finished"})
        assert len(page_of(catalog, tmp_path)) < 1_000_000
        found = charts(catalog)
        drawn = points(found["steptime"], "attempt 1")
        assert len(drawn) <= MOST_POINTS
        assert (70_013, 7.0) in drawn
        assert (50_030, 2.0) in points(found["loss"], "attempt 1")
        assert drawn == sorted(drawn)

    def test_a_run_of_hundreds_of_attempts(self, catalog: Catalog, tmp_path: Path) -> None:
        for number in range(300):
            catalog.attempts.begin(BEGAN + 10 * number, 0, None, {})
            write(catalog, number + 1, [{"kind": "steps", "first": 1, "seconds": [1.0] * 5}])
        page = page_of(catalog, tmp_path)
        assert "It shows the newest 60 of 300 attempts" in text_of(page)
        assert "The newest 200; 100 older ones are not shown" in text_of(page)
        assert len(page) < 500_000

    def test_a_run_of_hundreds_of_checkpoints_shows_the_newest_and_the_best(
        self, catalog: Catalog, tmp_path: Path
    ) -> None:
        catalog.attempts.begin(BEGAN, 0, None, {})
        for step in range(1, MOST_CHECKPOINTS + 20):
            commit(catalog, CheckpointKey(1, step), BEGAN)
        catalog.point("best", CheckpointKey(1, 3))
        text = text_of(page_of(catalog, tmp_path))
        assert "18 older ones are not shown" in text
        assert "checkpoint-3 best 3 " in text
        assert "checkpoint-4 " not in text

    def test_attempts_that_overlap(self, catalog: Catalog, tmp_path: Path) -> None:
        for began in (BEGAN, BEGAN + 10):
            record_attempt(catalog, began=began, steps=range(1, 101), save_steps=999, start_seconds=5.0)
        history = history_of(catalog)
        assert sum(time_spent(history).values()) == pytest.approx(history.wall_seconds)
        page_of(catalog, tmp_path)

    @pytest.mark.parametrize(
        "where", ["steps/000002-0001.jsonl", "progress/000002.json", "attempts/000002.json"]
    )
    def test_damaged_records(self, catalog: Catalog, tmp_path: Path, where: str) -> None:
        record_run(catalog)
        catalog.storage.write(f".cloudtrain/{where}", b'{"kind": "log", "step": 1, \xff')
        assert "finished" in text_of(page_of(catalog, tmp_path))

    def test_a_damaged_manifest_is_named(self, catalog: Catalog, tmp_path: Path) -> None:
        record_run(catalog)
        catalog.storage.write(".cloudtrain/checkpoints/000003-0000000400.json", b"{}")
        text = text_of(page_of(catalog, tmp_path))
        assert "damaged manifest" in text
        assert "1 manifest damaged" in text
        assert "How checkpoint-350 was saved" in text

    @pytest.mark.parametrize("value", [1e300, -1e300, float("nan"), float("inf"), "x", None, 10**400])
    def test_impossible_numbers(self, catalog: Catalog, tmp_path: Path, value: Any) -> None:
        record = {"number": 1, "nonce": "n", "started": value, "global_step": 0, "facts": {}}
        log = {
            "kind": "log",
            "step": 5,
            "time": value,
            "loss": value,
            "learning_rate": value,
            "eval_f1": value,
        }
        told = {
            "kind": "commit",
            "checkpoint": "000001-0000000005",
            "saved": value,
            "time": value,
            "size": value,
        }
        pause = {"kind": "pause", "step": 5, "why": "save", "time": value, "seconds": value}
        catalog.attempts.begin(BEGAN, 0, None, {})
        catalog.storage.write(
            ".cloudtrain/attempts/000002.json", json.dumps({**record, "number": 2}).encode()
        )
        for number in (1, 2):
            steps = {"kind": "steps", "first": 1, "seconds": [value, 1.0]}
            write(catalog, number, [log, {**log, "time": BEGAN, "loss": 1.0}, told, pause, steps])
            beat = {"time": value, "state": "training", "step": value, "total_steps": value, "loss": value}
            catalog.storage.write(f".cloudtrain/progress/00000{number}.json", json.dumps(beat).encode())
        page = page_of(catalog, tmp_path)
        assert "NaN" not in json.dumps(figures_of(page))


class TestDistrust:
    """Records on storage can add text to the page, never markup."""

    HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>\x1b[2J"

    def test_names_and_reasons_are_text(self, catalog: Catalog, tmp_path: Path) -> None:
        facts = {"host": self.HOSTILE, self.HOSTILE: self.HOSTILE}
        number = record_attempt(
            catalog, began=BEGAN, steps=range(1, 61), save_steps=999, state=self.HOSTILE, facts=facts
        )
        log = {"kind": "log", "step": 30, "time": BEGAN, f"eval_{self.HOSTILE}": 0.5, "loss": 1.0}
        write(catalog, number, [log], 2)
        commit(
            catalog,
            CheckpointKey(number, 50),
            BEGAN,
            exact=False,
            inexact_reason=self.HOSTILE,
            metrics={self.HOSTILE: 1.0},
            origin={self.HOSTILE: self.HOSTILE},
        )
        page = page_of(catalog, tmp_path)
        assert page.count("<script") == page.count("</script>") == 4
        assert "<img" not in page
        assert "\x1b" not in page
        assert page.count("&lt;/script&gt;&lt;script&gt;alert(1)") >= 5
        assert "<" not in json.dumps(figures_of(page)).replace("<br>", "").replace("<extra></extra>", "")

    def test_secrets_are_not_shown(self, catalog: Catalog, tmp_path: Path) -> None:
        token = "hf_" + "a" * 34
        facts = {
            "command": f"train.py --hub_token={token}",
            "host": "https://user:pass-word@host/x?sig=abcdef",
        }
        record_attempt(catalog, began=BEGAN, steps=range(1, 11), facts=facts)
        page = page_of(catalog, tmp_path)
        for secret in (token, "pass-word", "abcdef"):
            assert secret not in page
        assert "--hub_token=***" in page

    def test_long_texts_are_cut(self, catalog: Catalog, tmp_path: Path) -> None:
        facts = {"host": "x" * 1_000_000, **{f"fact-{number}": "y" for number in range(5_000)}}
        record_attempt(catalog, began=BEGAN, steps=range(1, 11), facts=facts, state="z" * 1_000_000)
        assert len(page_of(catalog, tmp_path)) < 200_000


class TestCharts:
    """The charts show what the records say."""

    def test_attempts_have_their_colour_and_lost_steps_are_dotted(self, catalog: Catalog) -> None:
        record_run(catalog)
        chart = charts(catalog)["loss"]
        assert [entry[0::2] for entry in chart.legend] == [
            ("line", "attempt 1"),
            ("line", "attempt 2"),
            ("line", "attempt 3"),
            ("dotted", "redone"),
            ("diamond", "evaluation"),
        ]
        assert len({entry[1] for entry in chart.legend[:3]}) == 3
        assert [step for step, _ in points(chart, "attempt 2")] == list(range(155, 255, 5))
        bands = [
            (shape["x0"], shape["x1"])
            for shape in chart.figure["layout"]["shapes"]
            if shape["type"] == "rect"
        ]
        assert bands == [(150, 170), (250, 260)]

    def test_the_timeline_shows_lost_work_stalls_pauses_and_uploads(self, catalog: Catalog) -> None:
        record_run(catalog)
        traces = {trace["name"]: trace for trace in charts(catalog)["timeline"].figure["data"]}
        assert traces["stall: a step far slower than usual"]["x"] == [90_000]
        lost = traces["redone (lost steps)"]
        assert (
            len(lost["x"]) == 2
        )  # 20 steps of the first attempt, and 10 of the second with an evaluation before
        assert lost["x"][0] == pytest.approx(10_000, rel=0.01)
        assert len(traces["evaluation"]["x"]) == 8
        assert set(traces["upload"]["x"]) == {8_000.0}
        assert "killed" in traces["failed, killed or overtaken"]["text"][0]

    @pytest.mark.parametrize(
        ("state", "end", "symbol"),
        [
            ("finished", "finished", "circle"),
            ("preempted", "preempted or stopped", "square"),
            ("stopped", "preempted or stopped", "square"),
            ("failed", "failed, killed or overtaken", "x"),
            ("overtaken", "failed, killed or overtaken", "x"),
            ("training", "failed, killed or overtaken", "x"),  # long ago, so it was killed
            ("<b>?", "failed, killed or overtaken", "x"),
        ],
    )
    def test_a_graceful_end_has_a_mark_of_its_own_and_a_crash_has_a_cross(
        self, catalog: Catalog, state: str, end: str, symbol: str
    ) -> None:
        record_attempt(catalog, began=BEGAN, steps=range(1, 51), state=state)
        chart = charts(catalog)["timeline"]
        (trace,) = (trace for trace in chart.figure["data"] if trace["name"] == end)
        assert trace["marker"]["symbol"] == symbol
        assert (symbol, end) in [entry[0::2] for entry in chart.legend]
        assert ("triangle-up", "save") in [entry[0::2] for entry in chart.legend]

    def test_the_time_is_all_accounted_for(self, catalog: Catalog) -> None:
        record_run(catalog)
        history = history_of(catalog)
        spent = time_spent(history)
        assert sum(spent.values()) == pytest.approx(history.wall_seconds)
        assert spent["stall"] == 90.0
        assert spent["start"] == pytest.approx(36.0)
        assert spent["evaluation"] == pytest.approx(48.0)
        assert (spent["steps"] + spent["stall"]) / history.wall_seconds == pytest.approx(history.goodput)

    def test_a_step_time_that_varies_much_is_logarithmic(self, catalog: Catalog) -> None:
        record_attempt(catalog, began=BEGAN, steps=range(1, 51))
        assert charts(catalog)["steptime"].figure["layout"]["yaxis"].get("type") is None
        record_attempt(catalog, began=BEGAN, steps=range(1, 51), stall_at=30)
        assert charts(catalog)["steptime"].figure["layout"]["yaxis"]["type"] == "log"

    def test_thinning_keeps_order_ends_and_peaks(self) -> None:
        curve = [(float(step), float(step % 97), 1) for step in range(10_000)]
        thin = curves._thin(curve, 100)
        assert len(thin) <= 100
        assert thin == sorted(thin)
        assert {point[1] for point in thin} >= {0.0, 96.0}
        assert curves._thin(curve[:100], 100) == curve[:100]


def test_what_a_run_has_cost_is_told_where_prices_are_known(catalog: Catalog) -> None:
    record_run(catalog)
    assert "Cost" not in [name for name, *_ in Report(catalog).content()["key_figures"]]
    beat = catalog.attempts.read_progress(3) or {}
    catalog.attempts.write_progress(3, {**beat, "price_per_hour": 3600.0})
    seconds = beat["time"] - BEGAN - 520
    (cost,) = (value for name, value, _ in Report(catalog).content()["key_figures"] if name == "Cost")
    assert cost.startswith("at least "), "the first two attempts have no price"
    assert float(cost.removeprefix("at least ").replace(",", "")) == pytest.approx(seconds, abs=10)
    for number in (1, 2):
        catalog.attempts.write_progress(number, {"time": BEGAN, "state": "failed", "price_per_hour": 1.0})
    (cost,) = (value for name, value, _ in Report(catalog).content()["key_figures"] if name == "Cost")
    assert not cost.startswith("at least")


class TestLivePages:
    """What pages that change ask of the charts."""

    def test_a_smoothed_curve_lies_over_its_values(self, catalog: Catalog) -> None:
        record_run(catalog)
        raw, smooth = (
            {chart.name: chart for chart in charts_of(history_of(catalog), smoothing)}
            for smoothing in (0.0, 0.9)
        )
        values = [trace for trace in smooth["loss"].figure["data"] if trace.get("opacity") == 0.25]
        assert [trace["y"] for trace in values] == [trace["y"] for trace in raw["loss"].figure["data"][:3]]
        means = smooth["loss"].figure["data"][3]["y"]
        assert means[0] == values[0]["y"][0]
        assert max(means[10:30]) - min(means[10:30]) < max(values[0]["y"][10:30]) - min(values[0]["y"][10:30])
        assert raw["loss"].legend == smooth["loss"].legend

    def test_gradient_norm_and_throughput_are_shown_where_they_were_recorded(self, catalog: Catalog) -> None:
        catalog.attempts.begin(BEGAN, 0, None, {})
        log = {"kind": "log", "step": 2, "time": BEGAN + 9, "metrics": {"grad_norm": 0.7}}
        write(catalog, 1, [{"kind": "steps", "first": 1, "seconds": [0.5, 0.5], "samples": 16}, log])
        found = charts(catalog)
        assert points(found["throughput"], "attempt 1") == [(1, 32.0), (2, 32.0)]
        assert found["gradnorm"].title == "Gradient norm: 0.7 at step 2"

    def test_old_points_of_a_long_curve_stay_while_it_grows(self) -> None:
        curve = [(float(step), float(step % 97), 1) for step in range(1_000)]
        before, after = curves._thin(curve[:900], 100), curves._thin(curve, 100)
        assert len(after) <= 100
        assert after[: len(before) - 2] == before[:-2]

    def test_a_clock_that_differs_does_not_make_a_run_look_killed(self, catalog: Catalog) -> None:
        record_attempt(catalog, began=BEGAN, steps=range(1, 51))
        now = history_of(catalog).attempts[-1].last_seen + 5
        assert "killed" in charts(catalog)["timeline"].figure["data"][-1]["text"][0]
        assert "training" in charts_of(history_of(catalog, now))[1].figure["data"][-1]["text"][0]
