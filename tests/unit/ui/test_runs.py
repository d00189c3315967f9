"""Runs as the pages show them: few requests, only new records, and what happens in trouble."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.attempts import Attempts
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.paths import ACTIONS
from hf_cloudtrain.errors import NoCheckpointError, StoragePermissionError, StorageUnavailableError
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.report import reader
from hf_cloudtrain.report.charts import charts_of
from hf_cloudtrain.report.page import Report
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.testing import FaultyStorage
from hf_cloudtrain.tracking.history import history_of
from hf_cloudtrain.tracking.mirror import Mirror
from hf_cloudtrain.ui import feeds
from hf_cloudtrain.ui.places import Places
from hf_cloudtrain.ui.runs import CompareSource, RunSource, RunsSource
from tests.recorded import BEGAN, commit, record_attempt, record_run, write
from tests.served import Served, Stream


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1_000.0
        monkeypatch.setattr(reader.time, "monotonic", lambda: self.seconds)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> FaultyStorage:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path))
    return FaultyStorage(str(tmp_path / "runs"))


@pytest.fixture
def catalog(store: FaultyStorage) -> Catalog:
    """The run `mnli` of the store, without faults."""
    return Catalog(Storage(f"{store.url}/mnli"))


@pytest.fixture
def places(store: FaultyStorage) -> Places:
    found = Places([store.url])
    found.roots = [store]
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of the page is a twentieth of one."""
    for name in ("BEAT_SECONDS", "OTHER_SECONDS", "LIST_SECONDS"):
        monkeypatch.setattr(reader, name, getattr(reader, name) / 20)
    monkeypatch.setattr(feeds, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(feeds, "SLOW_SECONDS", 0.2)


@pytest.fixture
def served(store: FaultyStorage, quick: None) -> Iterator[Served]:
    with Served([store.url]) as found:
        found.pages.places.roots = [store]
        yield found


def beat(catalog: Catalog, step: int, **more: Any) -> None:
    record = {
        "attempt": 1,
        "state": "training",
        "time": time.time(),
        "step": step,
        "total_steps": 400,
        **more,
    }
    catalog.attempts.write_progress(1, record)


class TestRequests:
    """A page that is open costs at most one request a second, and one that is closed costs none."""

    def test_a_run_that_trains_and_saves_costs_one_request_a_second(
        self, catalog: Catalog, places: Places, store: FaultyStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(monkeypatch)
        record_attempt(catalog, began=time.time() - 120, steps=range(1, 151))
        source = RunSource(places, "0/mnli")
        source.turn()
        before, began = len(store.calls), clock.seconds
        for second in range(0, 120, 3):
            if second % 15 == 0:  # a heartbeat as of a training, with records and a checkpoint
                step = 151 + second
                lines = [{"kind": "log", "step": step, "time": time.time(), "metrics": {"loss": 0.5}}]
                write(catalog, 1, lines, 2 + second)
                commit(catalog, CheckpointKey(1, step), time.time())
                beat(catalog, step)
            for _ in range(2):
                clock.seconds += source.turn()
        assert clock.seconds - began == 120
        assert len(store.calls) - before <= 120
        history = source.reader.report and source.reader.report.history
        assert history is not None
        assert history.logs[-1]["step"] == 256
        assert len(source.document("")["checkpoints"]) == 11

    def test_a_comparison_costs_one_request_a_second(
        self, catalog: Catalog, places: Places, store: FaultyStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(monkeypatch)
        catalogs = [Catalog(Storage(f"{store.url}/run-{number}")) for number in range(3)]
        for other in catalogs:
            record_attempt(other, began=time.time() - 120, steps=range(1, 151))
        source = CompareSource(places, [f"0/run-{number}" for number in range(3)])
        source.turn()
        before, began = len(store.calls), clock.seconds
        for number in range(75):
            if number % 6 == 0 and number < 60:
                for other in catalogs:
                    lines = [
                        {"kind": "log", "step": 151 + number, "time": time.time(), "metrics": {"loss": 0.5}}
                    ]
                    write(other, 1, lines, 2 + number)
                    beat(other, 151 + number)
            clock.seconds += source.turn()
        assert clock.seconds - began >= 100
        assert len(store.calls) - before <= clock.seconds - began
        rows = {row[0][0]: [text for text, _ in row[1:]] for row in source.document("")["tables"][0]["rows"]}
        assert rows["step"] == ["205", "205", "205"]

    def test_a_row_of_the_list_that_trains_reads_only_what_is_new(
        self, catalog: Catalog, places: Places, store: FaultyStorage
    ) -> None:
        record_attempt(catalog, began=time.time() - 120, steps=range(1, 151))
        beat(catalog, 150, price_per_hour=3.6)
        source = RunsSource(places)
        source.turn()
        source.turn()
        assert source.details("0/mnli")["cost"] == pytest.approx(0.12, rel=0.1)
        before = store.count("read")
        write(catalog, 1, [{"kind": "log", "step": 155, "time": time.time(), "metrics": {"loss": 0.5}}], 2)
        beat(catalog, 155)
        source.turn()
        source.turn()
        first = source.details("0/mnli")["curve"]
        assert store.count("read") - before == 3, "run.json, the heartbeat and the new records"
        assert source.details("0/mnli")["curve"] == first
        assert store.count("list") == 2

    def test_a_record_that_is_known_is_never_read_again(
        self, catalog: Catalog, places: Places, store: FaultyStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(monkeypatch)
        record_run(catalog)
        source = RunSource(places, "0/mnli")
        source.turn()
        assert store.count("read", "*/steps/*") == store.count("read", "*/attempts/*") == 3
        assert store.count("read", "*/checkpoints/*") == 8
        before = store.count("read")
        for _ in range(40):
            clock.seconds += source.turn()
        assert store.count("read") == before, "the run is over: nothing is new"
        assert source.version == 2, "one document, and how the run stands"

    def test_two_browsers_cost_as_much_as_one_and_none_costs_nothing(
        self, catalog: Catalog, served: Served, store: FaultyStorage
    ) -> None:
        record_attempt(catalog, began=time.time() - 120, steps=range(1, 151))
        beat(catalog, 150)
        with Stream(served.port, "run", "0/mnli") as one:
            one.until(lambda document: not document.get("loading"))
            before = store.count("read", "*/checkpoints/*")
            with Stream(served.port, "run", "0/mnli") as other:
                other.until(lambda document: not document.get("loading"))
                beat(catalog, 151)
                for stream in (one, other):
                    stream.until(lambda document: document["live"]["step"] == 151)
                assert one.document == other.document
            assert store.count("read", "*/checkpoints/*") == before
        deadline = time.monotonic() + 20
        while served.pages.feed("run", "0/mnli").is_open:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)  # a turn that was running ends
        after = len(store.calls)
        time.sleep(0.5)
        assert len(store.calls) == after

    def test_the_list_reads_one_heartbeat_a_run_and_later_only_those_that_may_change(
        self, places: Places, store: FaultyStorage
    ) -> None:
        for number in range(20):
            other = Catalog(Storage(f"{store.url}/deep/run-{number}"))
            other.attempts.begin(time.time(), 0, None, {"experiment": "sweep"} if number == 3 else {})
            state = "training" if number == 7 else "finished"
            other.attempts.write_progress(1, {"time": time.time(), "state": state, "step": number})
        source = RunsSource(places)
        assert 0 < source.turn() < 0.1, "time to send the names"
        assert (store.count("list"), store.count("read")) == (1, 0)
        names = source.document("")
        assert names["loading"]
        assert names["runs"]["0/deep/run-7"] == {"id": "0/deep/run-7", "name": "deep/run-7", "experiment": ""}
        source.turn()
        assert (store.count("list"), store.count("read")) == (1, 20)
        assert not source.document("")["loading"]
        source.turn()
        assert (store.count("list"), store.count("read", "*/run.json")) == (1, 20)
        runs = source.document("")["runs"]
        assert runs["0/deep/run-7"]["state"] == "training"
        assert {name: run["experiment"] for name, run in runs.items() if run["experiment"]} == {
            "0/deep/run-3": "sweep"
        }
        source.turn()
        assert (store.count("list"), store.count("read")) == (2, 41)
        assert source.version == 3

    def test_an_experiment_that_the_storage_does_not_tell_is_read_again(
        self, places: Places, store: FaultyStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = Catalog(Storage(f"{store.url}/deep/run-3"))
        run.attempts.begin(time.time(), 0, None, {"experiment": "sweep"})
        source = RunsSource(places)
        source.turn()
        source.turn()

        def fail(attempts: Attempts) -> None:
            raise StorageUnavailableError("The storage does not answer.")

        with monkeypatch.context() as patched:
            patched.setattr(Attempts, "run_facts", fail)
            with pytest.raises(StorageUnavailableError):
                source.turn()
        source.turn()
        assert source.document("")["runs"]["0/deep/run-3"]["experiment"] == "sweep"

    def test_a_heartbeat_sends_its_numbers_and_not_the_curves(self, catalog: Catalog, served: Served) -> None:
        record_attempt(catalog, began=time.time() - 120, steps=range(1, 151))
        beat(catalog, 150)
        with Stream(served.port, "run", "0/mnli") as stream:
            stream.until(lambda document: not document.get("loading"))
            whole = len(json.dumps(stream.document))
            beat(catalog, 160)
            size = 0
            while stream.document["live"]["step"] != 160:
                size += len(stream.next())
        assert size < 2_000
        assert whole > 15_000


class TestContent:
    """A page shows what the report shows, as the run stands now."""

    def test_it_draws_the_same_figures_as_the_report(self, catalog: Catalog, places: Places) -> None:
        record_run(catalog)
        source = RunSource(places, "0/mnli")
        source.turn()
        found = source.document("0.0")
        assert found["charts"] == [chart.record() for chart in charts_of(history_of(catalog))]
        told = Report(catalog).content()
        assert {key: found[key] for key in ("key_figures", "tables", "notes")} == {
            key: told[key] for key in ("key_figures", "tables", "notes")
        }
        smoothed = [chart.record() for chart in charts_of(history_of(catalog), 0.9)]
        assert source.document("0.9")["charts"] == smoothed != found["charts"]

    def test_it_names_the_commands_for_each_checkpoint(self, catalog: Catalog, places: Places) -> None:
        record_run(catalog)
        source = RunSource(places, "0/mnli")
        source.turn()
        found = source.document("")
        assert found["checkpoints"]["checkpoint-400"] == [
            f"{catalog.storage.url} -c checkpoint-400",
            "000003-0000000400",
            False,
        ]

    def test_host_metrics_of_a_heartbeat_are_shown(self, catalog: Catalog, places: Places) -> None:
        record_attempt(catalog, began=time.time() - 120, steps=range(1, 151))
        beat(
            catalog,
            150,
            host={"cpu_percent": 71.5, "gpu_percent": "97", "memory_percent": 40, "rack": {"x": 1}},
        )
        source = RunSource(places, "0/mnli")
        source.turn()
        assert [fact for fact in source.document("")["facts"] if "%" in fact] == ["CPU 72 %", "memory 40 %"]

    def test_it_shows_the_last_lines_of_its_job(self, catalog: Catalog, places: Places) -> None:
        record_run(catalog)
        facts = {"engine": "local", "nodes": 1, "nproc_per_node": 1, "max_restarts": 3}
        job = JobStore().create("mnli", run_url=catalog.storage.url, **facts)
        source = RunSource(places, "0/mnli")
        source.turn()
        assert (source.document("")["job"], source.document("")["logs"]) == ("mnli-1", {})
        log = JobStore().home(job.id) / "log" / "node-0.log"
        log.parent.mkdir(parents=True)
        log.write_text("".join(f"step {number}\n" for number in range(99)))
        version = source.version
        source.turn()
        (lines,) = source.document("")["logs"].values()
        assert (len(lines), lines[-1]) == (12, "step 98")
        assert source.version > version

    def test_a_new_attempt_and_its_checkpoint_appear(
        self, catalog: Catalog, places: Places, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(monkeypatch)
        record_attempt(catalog, began=BEGAN, steps=range(1, 61), state="failed")
        source = RunSource(places, "0/mnli")
        source.turn()
        record_attempt(catalog, began=BEGAN + 600, steps=range(51, 121), resumed_from=CheckpointKey(1, 50))
        for _ in range(30):
            clock.seconds += source.turn()
        found = source.document("")
        assert found["live"]["attempt"] == 2
        assert "checkpoint-100" in found["checkpoints"]

    def test_details_of_the_list_come_from_the_step_records(self, catalog: Catalog, places: Places) -> None:
        record_run(catalog)
        source = RunsSource(places)
        with pytest.raises(NoCheckpointError, match="no run '0/mnli' on this page"):
            source.details("0/mnli")
        source.turn()
        with pytest.raises(NoCheckpointError, match="no run '0/mnli' on this page"):
            source.details("0/mnli")  # only its name is known
        source.turn()
        found = source.details("0/mnli")
        assert found["curve"].startswith("M0.0,1.0 ")
        assert found["goodput"] == pytest.approx(history_of(catalog).goodput)
        assert found["safe_time"] == catalog.read(CheckpointKey(3, 400)).created


class TestTrouble:
    """What a page says, and that it recovers."""

    def test_a_run_that_is_deleted_while_it_is_shown(
        self, catalog: Catalog, served: Served, tmp_path: Path
    ) -> None:
        record_run(catalog)
        with Stream(served.port, "run", "0/mnli") as stream:
            stream.until(lambda document: "charts" in document)
            for path in sorted((tmp_path / "runs" / "mnli").rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            stream.until(lambda document: document.get("gone"))
            assert "There is no run at" in stream.document["gone"]
            record_run(catalog)
            stream.until(lambda document: "charts" in document and not document.get("gone"))

    def test_damaged_records_are_named_and_the_rest_is_shown(self, catalog: Catalog, places: Places) -> None:
        record_run(catalog)
        for path in ("attempts/000002.json", "checkpoints/000003-0000000400.json", "progress/000003.json"):
            catalog.storage.write(f".cloudtrain/{path}", b"{oops")
        catalog.storage.write(".cloudtrain/steps/000003-0001.jsonl", b'\xff{"kind": 3}\n[]\n{}\n')
        catalog.storage.write(f"{ACTIONS}/x.json", b"nothing")
        source, everything = RunSource(places, "0/mnli"), RunsSource(places)
        source.turn()
        found = source.document("")
        assert any("1 manifest damaged" in note for note in found["notes"])
        assert found["logs"] == {"Actions from this page": ["damaged record"]}
        assert "timeline" in [chart["name"] for chart in found["charts"]]
        everything.turn()
        everything.turn()
        assert everything.document("")["runs"]["0/mnli"]["attempts"] == 3
        assert everything.details("0/mnli")["safe_time"] is None, "its manifest is damaged"

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (ConnectionResetError("the cable"), "the cable"),
            (PermissionError("ExpiredToken: the token is expired"), "expired"),
        ],
    )
    def test_storage_that_goes_away_and_comes_back(
        self, catalog: Catalog, served: Served, store: FaultyStorage, error: Exception, words: str
    ) -> None:
        record_attempt(catalog, began=time.time() - 120, steps=range(1, 151))
        beat(catalog, 150)
        with Stream(served.port, "run", "0/mnli") as stream:
            stream.until(lambda document: "charts" in document)
            store.fail("any", error, times=10_000)
            stream.until(lambda document: document["trouble"])
            assert words in stream.document["trouble"]
            assert stream.document["live"]["step"] == 150, "what is known stays"
            store.heal()
            beat(catalog, 151)
            stream.until(lambda document: document["trouble"] is None and document["live"]["step"] == 151)

    def test_storage_that_does_not_answer_is_named_while_the_page_waits(
        self, catalog: Catalog, served: Served, store: FaultyStorage
    ) -> None:
        record_attempt(catalog, began=time.time() - 120, steps=range(1, 151))
        beat(catalog, 150)
        with Stream(served.port, "run", "0/mnli") as stream:
            stream.until(lambda document: "charts" in document)
            store.hang("read")
            stream.until(lambda document: document["trouble"])
            assert "has not answered for" in stream.document["trouble"]
            store.heal()
            stream.until(lambda document: document["trouble"] is None)

    @pytest.mark.parametrize("behind", [600.0, -600.0])
    def test_a_clock_that_differs_is_named_and_kills_no_run(
        self, catalog: Catalog, places: Places, monkeypatch: pytest.MonkeyPatch, behind: float
    ) -> None:
        clock = Clock(monkeypatch)
        record_attempt(catalog, began=time.time() - behind - 200, steps=range(1, 151))
        beat(catalog, 150, time=time.time() - behind)
        source = RunSource(places, "0/mnli")
        source.turn()
        assert source.document("")["state"] == ("killed" if behind > 0 else "training")
        beat(catalog, 151, time=time.time() - behind)
        for _ in range(3):
            clock.seconds += source.turn()
        found = source.document("")
        assert found["state"] == "training"
        assert abs(found["live"]["last_seen"] - time.time()) < 5
        words = "600 s behind" if behind > 0 else "600 s ahead of"
        assert any(
            f"The clock of the training machine is {words} this one." in note for note in found["notes"]
        )
        assert not any("stalled" in note for note in found["notes"])

    def test_a_heartbeat_that_is_seen_late_does_not_count_as_a_different_clock(
        self, catalog: Catalog, places: Places, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(monkeypatch)
        record_attempt(catalog, began=time.time() - 4_000, steps=range(1, 151))
        beat(catalog, 150, time=time.time() - 3_600)
        source = RunSource(places, "0/mnli")
        source.turn()
        clock.seconds += 3_600  # the tab was hidden
        beat(catalog, 400, time=time.time() - 1_800, state="finished")
        source.turn()
        found = source.document("")
        assert source.reader.skew == 0
        assert abs(found["live"]["last_seen"] - (time.time() - 1_800)) < 5
        assert not any("clock" in note for note in found["notes"])

    def test_a_page_that_was_hidden_makes_up_for_what_it_did_not_read(
        self, catalog: Catalog, places: Places, store: FaultyStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(monkeypatch)
        record_attempt(catalog, began=time.time() - 120, steps=range(1, 151))
        source = RunSource(places, "0/mnli")
        source.turn()
        for step in range(200, 240):
            commit(catalog, CheckpointKey(1, step), time.time())
        beat(catalog, 240)
        clock.seconds += 600
        for _ in range(4):
            clock.seconds += source.turn()
        assert "checkpoint-239" in source.document("")["checkpoints"]

    @pytest.mark.parametrize("behind", [600.0, -600.0])
    def test_a_clock_that_differs_kills_no_run_in_the_list(
        self, catalog: Catalog, places: Places, behind: float
    ) -> None:
        record_attempt(catalog, began=time.time() - behind - 200, steps=range(1, 151))
        source, began = RunsSource(places), float(int(time.time()))
        for step in (150, 151, 152):
            beat(catalog, step, time=began - behind + step - 152)  # of one size, whatever the time
            source.turn()
        source.turn()
        source.turn()
        record = source.document("")["runs"]["0/mnli"]
        assert record["state"] == "training"
        assert abs(record["last_seen"] - time.time()) < 10

    def test_a_dead_run_stays_dead_after_its_details_were_read(
        self, catalog: Catalog, places: Places
    ) -> None:
        """Its heartbeat is read again then, and is as old as before: the clocks do not differ."""
        record_attempt(catalog, began=BEGAN, steps=range(1, 151))
        source = RunsSource(places)
        source.turn()
        source.turn()
        assert source.details("0/mnli")["goodput"]
        catalog.storage.write(f"{ACTIONS}/0.json", b"{}")
        for _ in range(3):
            source.turn()
        record = source.document("")["runs"]["0/mnli"]
        assert record["state"] == "killed"
        assert record["last_seen"] < BEGAN + 400

    def test_an_outage_does_not_look_like_a_clock_that_differs(
        self, catalog: Catalog, places: Places, store: FaultyStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(monkeypatch)
        record_attempt(catalog, began=time.time() - 400, steps=range(1, 151))
        beat(catalog, 150, time=time.time() - 300)
        source = RunSource(places, "0/mnli")
        source.turn()
        store.fail("read", StoragePermissionError("403 Forbidden"), path="mnli/*", times=1_000)
        for _ in range(40):
            clock.seconds += 5
            with pytest.raises(StoragePermissionError):
                source.turn()
        store.heal()
        beat(catalog, 151, time=time.time() - 190)
        clock.seconds += 5
        source.turn()
        assert source.reader.skew == 0

    def test_experiments_are_read_although_the_first_reading_failed(
        self, places: Places, store: FaultyStorage
    ) -> None:
        run = Catalog(Storage(f"{store.url}/deep/run-3"))
        run.attempts.begin(time.time(), 0, None, {"experiment": "sweep"})
        run.attempts.write_progress(1, {"time": time.time(), "state": "finished", "step": 7})
        source = RunsSource(places)
        source.turn()
        store.fail("read", StorageUnavailableError("no answer"), path="*/progress/*", times=1_000)
        with pytest.raises(StorageUnavailableError):
            source.turn()
        store.heal()
        for _ in range(3):
            source.turn()
        record = source.document("")["runs"]["0/deep/run-3"]
        assert (record["state"], record["experiment"]) == ("finished", "sweep")

    def test_a_run_that_may_not_be_read_is_named_and_the_others_are_shown(
        self, catalog: Catalog, places: Places, store: FaultyStorage
    ) -> None:
        other = Catalog(Storage(f"{store.url}/other"))
        for run in (catalog, other):
            run.attempts.begin(time.time(), 0, None, {"experiment": "sweep"})
            run.attempts.write_progress(1, {"time": time.time(), "state": "finished", "step": 7})
        store.fail("read", StoragePermissionError("403 Forbidden"), path="mnli/*", times=100)
        source = RunsSource(places)
        for _ in range(3):
            source.turn()
        runs = source.document("")["runs"]
        assert runs["0/other"]["state"] == "finished"
        assert runs["0/mnli"]["state"] == "damaged"
        assert "403 Forbidden" in runs["0/mnli"]["damaged"]
        store.heal()
        source.turn()
        record = source.document("")["runs"]["0/mnli"]
        assert record["state"] == "finished"

    def test_a_run_that_is_deleted_while_it_is_compared_is_named(
        self, catalog: Catalog, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(monkeypatch)
        record_run(catalog)
        record_run(Catalog(Storage(str(tmp_path / "runs" / "other"))))
        source = CompareSource(places, ["0/mnli", "0/other"])
        source.turn()
        assert source.document("")["notes"] == []
        shutil.rmtree(tmp_path / "runs" / "other")
        for _ in range(40):
            clock.seconds += source.turn()
        (note,) = source.document("")["notes"]
        assert "other: There is no run at" in note

    @pytest.mark.parametrize("alive", [{4}, {1, 4}, set(), set(range(6))])
    def test_of_compared_runs_those_that_train_are_read_often_and_all_are_read(
        self, places: Places, store: FaultyStorage, monkeypatch: pytest.MonkeyPatch, alive: set[int]
    ) -> None:
        clock = Clock(monkeypatch)
        for number in range(6):
            run = Catalog(Storage(f"{store.url}/run-{number}"))
            record_attempt(run, began=time.time() - 120, steps=range(1, 151), state="finished")
            if number in alive:
                beat(run, 150)
        source, turns = CompareSource(places, [f"0/run-{number}" for number in range(6)]), 96
        source.turn()
        before, began = list(store.calls), clock.seconds
        for _ in range(turns):
            clock.seconds += source.turn()
        read = [
            sum(f"run-{number}/" in call.path for call in store.calls[len(before) :]) for number in range(6)
        ]
        assert min(read) >= 2, "a run that was over may go on"
        assert all(read[number] >= turns * 7 / 8 / len(alive) for number in alive), read
        assert sum(read) <= clock.seconds - began

    def test_a_run_that_has_not_begun_costs_no_more_than_one_that_trains(
        self, places: Places, store: FaultyStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(monkeypatch)
        jobs, facts = JobStore(), {"engine": "slurm", "nodes": 1, "nproc_per_node": 1, "max_restarts": 3}
        for number in range(20):
            jobs.create("mnli", run_url=f"{store.url}/run-{number}", state="queued", **facts)
        counted = FaultyStorage(jobs.below("jobs"))
        monkeypatch.setattr(
            "hf_cloudtrain.jobs.records.Mirror", lambda parent, **more: Mirror(counted, **more)
        )
        source = RunSource(places, "0/run-3")
        source.turn()
        assert "There is no run" in source.document("")["gone"]
        before, began = len(store.calls) + len(counted.calls), clock.seconds
        for _ in range(40):
            clock.seconds += source.turn()
        assert len(store.calls) + len(counted.calls) - before <= clock.seconds - began
        Catalog(Storage(f"{store.url}/run-3")).attempts.begin(time.time(), 0, None, {})
        clock.seconds += source.turn()
        assert source.document("")["job"] == "mnli-4"

    @pytest.mark.parametrize(
        "run_id", ["", "0", "1/x", "-1/x", "0/../secret", "0/.cloudtrain", "x/y", "0//etc", "٣/x", "9" * 99]
    )
    def test_only_runs_below_the_folders_of_the_page_have_a_name(self, places: Places, run_id: str) -> None:
        if run_id != "0":
            with pytest.raises(NoCheckpointError, match="on this page"):
                places.find(run_id)
        else:
            assert places.find(run_id) == (places.roots[0], "")

    def test_a_page_that_does_not_exist_says_so(self, served: Served) -> None:
        assert "There is no run '7/x' on this page" in served.first("run", "7/x")["gone"]
        assert "There is no page 'nothing'" in served.first("nothing")["gone"]
        assert "There is no run at" in served.first("run", "0/absent")["gone"]
        assert "No job 'absent'" in served.first("job", "absent")["gone"]


class TestDistrust:
    """Records may hold anything of any size."""

    LONG = "x\x1b[2J<script>" * 800_000  # 10 MB

    def test_values_of_10_mb_are_cut(self, catalog: Catalog, places: Places) -> None:
        number = catalog.attempts.begin(BEGAN, 0, None, {"host": self.LONG, self.LONG: "x"}).number
        metrics = {f"eval_{self.LONG}": 0.5, "loss": 1.0, "note": self.LONG}
        write(catalog, number, [{"kind": "log", "step": 3, "time": BEGAN, "metrics": metrics}])
        beat(catalog, 3, state=self.LONG, host={self.LONG: 1.0, "cpu_percent": self.LONG})
        everything, source = RunsSource(places), RunSource(places, "0/mnli")
        everything.turn()
        for found in (everything, source):
            found.turn()
            text = json.dumps(found.document(""))
            assert len(text) < 50_000
            assert "\\u001b" not in text
        json.dumps(everything.details("0/mnli"))

    def test_a_secret_in_a_record_is_not_shown(self, catalog: Catalog, places: Places) -> None:
        command = "train.py --hub_token=hf_abcdefghijklmnopqrstuvwx"
        catalog.attempts.begin(BEGAN, 0, None, {"command": command})
        source = RunSource(places, "0/mnli")
        source.turn()
        text = json.dumps(source.document(""))
        assert "train.py" in text
        assert "hf_abcdefghijklmnopqrstuvwx" not in text


def test_a_mirror_reads_an_object_again_only_if_a_listing_shows_a_new_size(store: FaultyStorage) -> None:
    store.write("mnli/.cloudtrain/a.json", b"one")
    mirror = Mirror(store, "mnli")
    assert mirror.refresh()
    assert mirror.read(".cloudtrain/a.json") == mirror.read(".cloudtrain/a.json") == b"one"
    assert not mirror.refresh()
    store.write("mnli/.cloudtrain/a.json", b"three")
    assert mirror.read(".cloudtrain/a.json") == b"one"
    assert mirror.refresh()
    assert mirror.read(".cloudtrain/a.json") == b"three"
    assert store.count("read", "mnli/*") == 2
