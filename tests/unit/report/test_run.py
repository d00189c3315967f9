"""`Run` in notebooks and scripts: frames, downloads, comparisons, cards; and one home for all charts."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest

import hf_cloudtrain as ct
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Position
from hf_cloudtrain.checkpoints.run_deletion import RunContents, delete_run
from hf_cloudtrain.errors import (
    ConfigurationError,
    MissingExtraError,
    NoCheckpointError,
    StorageUnavailableError,
)
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.report import page
from hf_cloudtrain.report import run as run_module
from hf_cloudtrain.report.card import card
from hf_cloudtrain.report.charts import charts_of
from hf_cloudtrain.report.live import write_page
from hf_cloudtrain.report.notebook import LiveCard
from hf_cloudtrain.report.page import Report
from hf_cloudtrain.report.run import Run
from hf_cloudtrain.report.still import still
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.history import history_of
from hf_cloudtrain.tracking.mirror import Mirror
from hf_cloudtrain.tracking.status import RunState
from hf_cloudtrain.tracking.tracker import StepTracker
from hf_cloudtrain.ui.places import Places
from hf_cloudtrain.ui.runs import RunSource
from tests.recorded import BEGAN, record_attempt, record_run, write

HOSTILE = "</div><script>alert(1)</script>\"'><img src=x onerror=alert(1)>\x1b[2J"


@pytest.fixture
def run(catalog: Catalog) -> Run:
    record_run(catalog)
    return Run(catalog.storage.url)


def packed_figures(html: bytes) -> Any:
    found = re.search(rb'id="records"[^>]*>(.*?)</script>', html, re.DOTALL)
    assert found
    charts = json.loads(gzip.decompress(base64.b64decode(found[1])))
    return {chart["name"]: chart["figure"] for chart in charts}


class TestOneHome:
    """The same figure everywhere."""

    def test_report_page_beside_the_run_ui_and_notebook_show_the_same_figures(
        self, catalog: Catalog, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(page, "packed_plotly", lambda: b"plotly")
        expected = json.loads(json.dumps({one.name: one.figure for one in charts_of(history_of(catalog))}))
        Report(catalog).write(tmp_path / "report.html")
        write_page(catalog)
        assert len(expected) >= 7
        assert packed_figures((tmp_path / "report.html").read_bytes()) == expected
        assert packed_figures(catalog.storage.read("index.html")) == expected
        assert json.loads(json.dumps(run.figures)) == expected
        source = RunSource(Places([catalog.storage.url]), "0")
        source.turn()
        served = {one["name"]: one["figure"] for one in source.document("")["charts"]}
        assert json.loads(json.dumps(served)) == expected
        assert still(expected["loss"]) in run._repr_html_()


class TestRun:
    """What a person asks of a run."""

    def test_the_history_is_a_frame_without_redone_steps(self, run: Run) -> None:
        frame = run.history
        assert list(frame.columns)[:3] == ["step", "time", "attempt"]
        losses = frame[frame["loss"].notna()]
        assert list(losses["step"]) == list(range(5, 401, 5)), "each step once, though 30 were done twice"
        assert losses["loss"].iloc[-1] == pytest.approx(0.3386, abs=1e-4)
        assert sorted(set(frame["attempt"])) == [1, 2, 3]
        assert str(frame["time"].dtype).endswith("UTC]")

    def test_a_loss_that_is_not_finite_is_a_number_again(self, catalog: Catalog) -> None:
        number = record_attempt(catalog, began=BEGAN, steps=range(1, 3), save_steps=999)
        write(catalog, number, [{"kind": "log", "step": 1, "time": BEGAN, "metrics": {"loss": "nan"}}], 2)
        assert math.isnan(Run(catalog.storage.url).history["loss"].iloc[0])

    def test_checkpoints_are_a_frame_that_says_what_they_are(self, run: Run) -> None:
        frame = run.checkpoints
        assert list(frame["folder"][-2:]) == ["checkpoint-350", "checkpoint-400"]
        assert list(frame[frame["best"]]["step"]) == [200]
        assert list(frame[frame["newest"]]["step"]) == [400]
        best = run.best()
        assert best is not None
        assert (best.step, best.folder) == (200, "checkpoint-200")

    def test_a_run_without_anything(self, catalog: Catalog) -> None:
        empty = Run(catalog.storage.url)
        assert empty.status.state == "waiting"
        assert len(empty.history) == len(empty.checkpoints) == 0
        assert empty.best() is None
        assert "waiting" in empty._repr_html_()
        with pytest.raises(NoCheckpointError, match="has no checkpoint yet"):
            empty.download()

    def test_a_deleted_run_says_so_and_its_card_too(self, catalog: Catalog, run: Run) -> None:
        assert run.status.state == "finished"
        delete_run(catalog, RunContents.of(catalog), {"deleted": "by <ann>"})
        with pytest.raises(NoCheckpointError, match="was deleted"):
            _ = run.status
        assert "was deleted (by &lt;ann&gt;)" in run._repr_html_()

    def test_damaged_records_do_not_hide_the_run(self, catalog: Catalog, run: Run) -> None:
        catalog.storage.write(".cloudtrain/steps/000002-0001.jsonl", b'{"kind": "log", \xff')
        catalog.storage.write(".cloudtrain/progress/000003.json", b"{")
        catalog.storage.write(".cloudtrain/checkpoints/000003-0000000400.json", b"{}")
        assert list(run.checkpoints["damaged"].notna())[-1]
        assert len(run.history) > 50
        assert "<svg" in run._repr_html_()

    def test_plot_is_a_figure_of_plotly(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        assert run.plot("loss").data[0].type == "scatter"
        with pytest.raises(ConfigurationError, match=r"There is no chart 'los'\. The run has: loss, "):
            run.plot("los")
        monkeypatch.setitem(__import__("sys").modules, "plotly", None)
        with pytest.raises(MissingExtraError, match=r"hf_cloudtrain\[report\]"):
            run.plot()

    def test_a_run_of_the_store_has_a_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))
        monkeypatch.chdir(tmp_path)
        record_run(Catalog(Storage(tmp_path / "store" / "runs" / "glue-1")))
        assert Run("glue-1").status.step == 400
        assert Run("glue-2").status.state == "waiting"
        (tmp_path / "glue-1").mkdir()
        assert Run("glue-1").status.state == "waiting", "a folder here comes first"

    def test_the_name_of_a_job_is_the_run_of_the_newest_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))
        monkeypatch.chdir(tmp_path)
        facts = {"engine": "local", "nodes": 1, "nproc_per_node": 1, "max_restarts": 3}
        for number in range(10):
            JobStore().create("glue", run_url=f"{tmp_path}/elsewhere/{number}", **facts)
        record_run(Catalog(Storage(tmp_path / "elsewhere" / "9")))
        assert Run("glue").status.step == Run("glue-10").status.step == 400
        assert Run("glue-9").url.endswith("/elsewhere/8")
        assert Run("glu").status.state == "waiting"

    def test_watch_renews_one_card_until_the_run_is_over(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shown: list[str] = []

        class Handle:
            def update(self, bundle: dict[str, str], **_: Any) -> None:
                shown.append(bundle["text/html"])

        def show(bundle: dict[str, str]) -> Handle:
            shown.append(bundle["text/html"])
            return Handle()

        steps = iter(
            [
                lambda: record_attempt(catalog, began=time.time() - 60, steps=range(1, 101), lag=0.1),
                lambda: catalog.attempts.write_progress(
                    1, {"time": time.time(), "state": "training", "step": 150, "total_steps": 400}
                ),
                lambda: monkeypatch.setattr(Mirror, "fetch", refuse),
                lambda: monkeypatch.setattr(Mirror, "fetch", fetch),
                lambda: catalog.attempts.write_progress(
                    1, {"time": time.time(), "state": "finished", "step": 400, "total_steps": 400}
                ),
            ]
        )
        fetch = Mirror.fetch

        def refuse(self: Mirror, path: str) -> bool:
            raise StorageUnavailableError("The storage does not answer.")

        monkeypatch.setattr(run_module, "kernel", object)
        monkeypatch.setattr(run_module, "show", show)
        monkeypatch.setattr(run_module.time, "sleep", lambda seconds: next(steps, lambda: None)())
        Run(catalog.storage.url).watch()
        words = (
            ">waiting</span>",
            "step 100 of 400",
            "step 150 of 400",
            "Cannot read the run",
            "step 150",
            ">finished",
        )
        for html, word in zip(shown, words, strict=False):
            assert word in html
        assert "step 400 of 400" in shown[-1]

    def test_outside_of_a_notebook_watch_names_the_command(self, run: Run) -> None:
        with pytest.raises(ConfigurationError, match=r"This is not a notebook. Use `cloudtrain run watch "):
            run.watch()


class TestDownload:
    """A checkpoint on this disk."""

    @pytest.fixture
    def saved(self, tmp_path: Path, no_pauses: None) -> Run:
        checkpointer = Checkpointer(str(tmp_path / "run"), tmp_path / "out")
        checkpointer.begin(0)
        for step in (10, 20):
            folder = tmp_path / "out" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            (folder / "model.bin").write_bytes(bytes(step))
            checkpointer.save(folder, Position(global_step=step), best=step == 10)
            checkpointer.wait()
        checkpointer.close()
        return ct.Run(tmp_path / "run")

    @pytest.mark.parametrize(
        ("which", "step"),
        [(None, 20), (10, 10), ("10", 10), ("checkpoint-10", 10), ("000001-0000000010", 10)],
    )
    def test_by_step_folder_or_key(self, saved: Run, tmp_path: Path, which: Any, step: int) -> None:
        folder = saved.download(which, tmp_path / "here")
        assert folder == tmp_path / "here" / f"checkpoint-{step}"
        assert (folder / "model.bin").read_bytes() == bytes(step)
        assert saved.download(which, tmp_path / "here") == folder, "an intact copy is used"

    def test_the_best_one(self, saved: Run, tmp_path: Path) -> None:
        assert saved.download(saved.best(), tmp_path).name == "checkpoint-10"

    def test_a_different_folder_of_its_name_stays(self, saved: Run, tmp_path: Path) -> None:
        (tmp_path / "checkpoint-20").mkdir()
        with pytest.raises(ConfigurationError, match="its files differ from 'checkpoint-20'"):
            saved.download(directory=tmp_path)

    def test_one_that_does_not_exist_is_named_with_those_that_do(self, saved: Run) -> None:
        with pytest.raises(NoCheckpointError, match=r"has no checkpoint 15. The newest are of steps 10, 20."):
            saved.download(15)


class TestCompare:
    """Several runs side by side."""

    def test_metrics_and_arguments_are_frames(self, tmp_path: Path, run: Run) -> None:
        other = Catalog(Storage(f"file://{tmp_path}/other"))
        record_attempt(other, began=BEGAN, steps=range(1, 101), facts={"host": HOSTILE}, state="finished")
        found = run.compare(other.storage.url)
        assert list(found.metrics.columns) == ["run", "other"]
        assert found.metrics.loc["step"].tolist() == ["400", "100"]
        assert "host" in found.arguments.index
        assert len(found.figures["loss"]["data"]) == 2
        assert found.plot("loss").data[1].name == "other"
        html = found._repr_html_()
        assert "<script" not in html
        assert "<img" not in html
        assert "<svg" in html


class TestCard:
    """What the output of a cell shows."""

    def test_texts_from_storage_are_text(self) -> None:
        html = card(RunState(f"file:///{HOSTILE}", HOSTILE, 1, stalled=HOSTILE, step=1, total_steps=2))
        assert "<script" not in html
        assert "<img" not in html
        assert "\x1b" not in html
        assert html.count("<div") == html.count("</div>")

    @pytest.mark.parametrize(
        ("state", "told"), [("training", True), ("preempted", False), ("finished", False)]
    )
    def test_the_time_left_is_told_while_it_trains(self, state: str, told: bool) -> None:
        assert ("5 min left" in card(RunState("run", state, 1, step=1, eta_seconds=300.0))) is told

    def test_a_state_of_10_mb_is_cut(self) -> None:
        assert len(card(RunState("u" * 10**7, "s" * 10**7, stalled="t" * 10**7))) < 5_000

    def test_a_picture_of_100_000_steps_is_small_and_keeps_peaks(self, catalog: Catalog) -> None:
        number = record_attempt(catalog, began=BEGAN, steps=range(1, 2), save_steps=999)
        logs = [
            {"kind": "log", "step": step, "time": BEGAN, "metrics": {"loss": 9.0 if step == 70_010 else 1.0}}
            for step in range(0, 100_000, 10)
        ]
        write(catalog, number, logs, 2)
        svg = still(Run(catalog.storage.url).figures["loss"])
        assert len(svg) < 30_000
        assert ">9</text>" in svg
        assert re.search(r"[\d.]+,6\.0\b", svg), "the peak touches the top"

    def test_a_figure_of_one_point_has_no_picture(self, catalog: Catalog) -> None:
        record_attempt(catalog, began=BEGAN, steps=range(1, 2), log_steps=1, save_steps=999)
        assert still(Run(catalog.storage.url).figures["loss"]) == ""


class TestLiveCard:
    """The card of the cell that trains."""

    def test_it_shows_what_the_training_has_in_memory_and_earlier_attempts(self, catalog: Catalog) -> None:
        record_attempt(catalog, began=time.time() - 900, steps=range(1, 101), state="preempted")
        number = catalog.attempts.begin(time.time(), 100, CheckpointKey(1, 100), {}).number
        tracker = StepTracker(catalog, number, first_step=100, total_steps=400)
        live = LiveCard(catalog, number, tracker)
        live._history = history_of(catalog)
        tracker.on_log = live.note
        tracker.end_step(101)
        tracker.log(101, {"loss": 0.25})
        tracker.end_step(102)
        tracker.log(102, {"loss": math.nan, "text": HOSTILE})
        found = live.bundle()
        assert "step 102 of 400" in found["text/plain"]
        assert "loss not finite" in found["text/plain"]
        assert "<svg" in found["text/html"]
        assert "<script" not in found["text/html"]
        steps = [log["step"] for log in live.history().logs if "loss" in log]
        assert steps == [*range(5, 101, 5), 101, 102]

    def test_a_long_training_keeps_a_bounded_number_of_losses(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("hf_cloudtrain.report.notebook.MOST_LOGS", 100)
        live = LiveCard(catalog, 1, StepTracker(catalog, 1, first_step=0, total_steps=4))
        for step in range(1_000):
            live.note(step, {"loss": 1.0, "grad_norm": 2.0, "text": "x" * 1_000})
        logs = live.history().logs
        assert len(logs) <= 101
        assert (logs[0]["step"], logs[-1]["step"]) == (0, 999)
        assert set(logs[0]) == {"loss", "step", "time", "attempt"}

    def test_without_a_notebook_there_is_none(self, catalog: Catalog) -> None:
        tracker = StepTracker(catalog, 1, first_step=0, total_steps=4)
        assert LiveCard.of(catalog, 1, tracker) is None
        assert tracker.on_log is None
