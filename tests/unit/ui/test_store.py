"""Jobs, their logs, and datasets, as the records of the store have them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.engines import EngineStatus
from hf_cloudtrain.jobs.records import JobRecord, JobStore, Start
from hf_cloudtrain.runtime.process_tree import this_process
from hf_cloudtrain.ui.places import Places
from hf_cloudtrain.ui.store import DatasetsSource, JobSource, JobsSource


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> JobStore:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))
    return JobStore()


@pytest.fixture
def places(store: JobStore) -> Places:
    return Places([store.below("runs")])


def job(store: JobStore, name: str, **more: Any) -> JobRecord:
    facts = {"engine": "slurm", "nodes": 2, "nproc_per_node": 4, "max_restarts": 3, **more}
    return store.create(name, **facts)


def cells(table: dict[str, Any]) -> list[list[str]]:
    return [[text for text, _ in row] for row in table["rows"]]


def test_jobs_of_all_engines_are_listed_and_their_changes_appear(store: JobStore, places: Places) -> None:
    record = job(store, "mnli", experiment="sweep", state="running")
    job(store, "mrpc", engine="sagemaker", run_url="s3://elsewhere/runs/x", state="finished")
    source = JobsSource(places)
    source.turn()
    (table,) = source.document("")["tables"]
    alone, grouped = table["rows"]
    assert grouped[0] == ("mnli-1", "", "#/job/mnli-1")
    assert [text for text, *_ in grouped[1:6]] == ["sweep", "running", "slurm", "2", "8"]
    assert grouped[-1] == (store.below("runs", "mnli-1"), "", "#/run/0%2Fmnli-1")
    assert [text for text, *_ in alone[1:4]] == ["", "finished", "sagemaker"]
    assert alone[-1] == ("s3://elsewhere/runs/x", "")
    assert source.version == 1
    source.turn()
    assert source.version == 1
    store.write(record, state="failed", reason="It crashed.")
    source.turn()
    assert source.document("")["tables"][0]["rows"][1][2] == ("failed", "")


def test_a_job_shows_its_starts_and_the_log_that_grows(store: JobStore, places: Places) -> None:
    starts = (Start(1, 10.0, 70.0, "failed", "exit code 9", (1, None)), Start(2, 80.0))
    record = job(store, "mnli", state="running", starts=starts)
    here = JobSource(places, "mnli")
    here.turn()
    assert here.document("")["no_log"] == "There is no log yet."
    assert ["nodes", "2, with 4 processes each"] in cells(here.document("")["tables"][0])
    store.write(record, submitted_by={"user": "ann", "host": "login-1"})
    source = JobSource(places, "mnli")
    source.turn()
    found = source.document("")
    assert (
        found["no_log"]
        == "The log is not on this machine. On 'login-1', `cloudtrain job logs -f mnli-1` shows it."
    )
    assert cells(found["tables"][1]) == [
        ["2", "1970-01-01 00:01:20", "", "running", "", ""],
        ["1", "1970-01-01 00:00:10", "1 min", "failed", "1 lost", "exit code 9"],
    ]
    log = store.home(record.id) / "log" / "node-0.log"
    log.parent.mkdir(parents=True)
    log.write_text("--- start 1 ---\nstep 1\n\x1b[2Jstep 2\n")
    source.turn()
    assert source.document("")["logs"] == {"node-0": ["--- start 1 ---", "step 1", "\\x1b[2Jstep 2"]}
    version = source.version
    source.turn()
    assert source.version == version
    with log.open("a") as file:
        file.write("step 3\n")
    source.turn()
    assert source.document("")["logs"]["node-0"][-2:] == ["\\x1b[2Jstep 2", "step 3"]


def test_a_job_whose_supervisor_is_gone_is_lost_on_both_pages(store: JobStore, places: Places) -> None:
    gone = {**this_process(), "pid": 2**22 + 1}
    record = job(store, "mnli", engine="local", state="running", handle=gone)
    jobs, source = JobsSource(places), JobSource(places, record.id)
    jobs.turn()
    source.turn()
    ((row,),) = (table["rows"] for table in jobs.document("")["tables"])
    assert ("lost", "") in row
    assert source.document("")["state"] == "lost"
    assert any(
        "supervisor process has disappeared" in value for _, value in cells(source.document("")["tables"][0])
    )
    assert store.read(record.id).state == "running", "a page writes nothing"


def test_a_job_that_ends_while_it_is_looked_at_is_not_lost(
    store: JobStore, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {**this_process(), "pid": 2**22 + 1}
    record = job(store, "mnli", engine="local", state="running", handle=gone)
    look = lifecycle.glance

    def ends(seen: JobRecord) -> JobRecord:
        found = look(seen)
        if not store.read(record.id).is_over:
            store.write(store.read(record.id), state="finished", reason=None)
        return found

    monkeypatch.setattr(lifecycle, "glance", ends)
    jobs = JobsSource(places)
    jobs.turn()
    ((row,),) = (table["rows"] for table in jobs.document("")["tables"])
    assert ("finished", "") in row


def test_an_engine_that_knows_more_than_the_record_is_asked_every_half_minute(
    store: JobStore, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked = [0.0], []

    class Engine:
        def look(self, record: JobRecord) -> EngineStatus:
            asked.append(now[0])
            if len(asked) == 2:
                raise ConfigurationError("SkyPilot does not answer.")
            return EngineStatus("running", None)

        def lines(self, record: JobRecord, node_rank: int | None, follow: bool) -> Iterator[str]:
            yield "a line"

    monkeypatch.setattr("hf_cloudtrain.jobs.lifecycle.engine", lambda name: Engine())
    monkeypatch.setattr("hf_cloudtrain.ui.store.time.monotonic", lambda: now[0])
    record = job(store, "mnli", engine="skypilot", state="queued", handle={"job": 3})
    source = JobSource(places, record.id)
    source.turn()
    assert source.document("")["state"] == "queued"
    for now[0] in range(2, 75):
        source.turn()
    assert source.document("")["state"] == "running"
    assert len(asked) == 3
    assert min(after - before for before, after in itertools.pairwise(asked)) >= 30
    store.write(record, state="failed", reason="It crashed.")
    for now[0] in range(75, 80):
        source.turn()
    assert source.document("")["state"] == "failed"


def test_the_log_that_an_engine_keeps_is_asked_for_every_half_minute(
    store: JobStore, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked, lines, fails = [0.0], [], ["step 1"], [1]
    monkeypatch.setattr("hf_cloudtrain.ui.store.time.monotonic", lambda: now[0])

    def answer(self: object, record: JobRecord, node: int | None, follow: bool) -> Iterator[str]:
        asked.append((record.id, node, follow))
        if len(asked) in fails:
            raise ConfigurationError("`sky` timed out after 60 s.")
        return iter(lines)

    monkeypatch.setattr("hf_cloudtrain.jobs.engines.skypilot.engine.SkypilotEngine.lines", answer)
    record = job(store, "mnli", engine="skypilot", state="running", handle={"job": 1})
    source = JobSource(places, "mnli-1")
    source.turn()
    assert (source.version, asked) == (1, []), "the page shows the record before an engine is asked"
    for _ in range(5):
        source.turn()
    assert source.document("")["no_log"] == "`sky` timed out after 60 s."
    now[0] = 31.0
    source.turn()
    assert source.document("")["logs"] == {"log": ["step 1"]}
    assert source.document("")["no_log"] is None
    store.write(record, state="finished")
    lines.append("step 2")
    fails.append(3)
    for now[0] in (62.0, 93.0, 124.0, 155.0):
        source.turn()
    assert source.document("")["logs"] == {"log": ["step 1", "step 2"]}
    assert asked == 4 * [("mnli-1", None, False)], "the log of a job that is over is read once more"


def test_no_engine_is_asked_for_the_log_of_a_job_that_it_does_not_have_yet(
    store: JobStore, places: Places
) -> None:
    job(store, "mnli", engine="skypilot")
    source = JobSource(places, "mnli-1")
    for _ in range(2):
        source.turn()
    assert source.document("")["no_log"] == "There is no log yet."


def test_the_home_that_a_record_names_is_not_read(store: JobStore, places: Places, tmp_path: Path) -> None:
    """A record comes from storage; it must not choose files of this machine."""
    secret = tmp_path / "elsewhere" / "log" / "node-0.log"
    secret.parent.mkdir(parents=True)
    secret.write_text("secret\n")
    record = job(store, "mnli")
    store.write(record, home=str(tmp_path / "elsewhere"))
    source = JobSource(places, "mnli-1")
    source.turn()
    assert source.document("")["logs"] == {}


def test_a_log_of_which_only_the_end_is_read_begins_again(store: JobStore, places: Places) -> None:
    record = job(store, "mnli")
    log = store.home(record.id) / "log" / "node-0.log"
    log.parent.mkdir(parents=True)
    source = JobSource(places, "mnli")
    text = [f"line {number}" for number in range(300)]
    log.write_text("\n".join(text) + "\n")
    source.turn()
    log.write_text("\n".join([*text, *(f"more {number}" for number in range(300))]) + "\n")
    source.turn()
    assert source.document("")["logs"]["node-0"] == [*text, *(f"more {number}" for number in range(300))]
    log.write_text("".join(f"other {number}\n" for number in range(5000)))
    source.turn()
    assert source.document("")["logs"]["node-0"] == [f"other {number}" for number in range(4600, 5000)]


def test_datasets_are_listed_with_their_newest_version(store: JobStore, tmp_path: Path) -> None:
    folder = tmp_path / "glue"
    folder.mkdir()
    (folder / "train.csv").write_text("a,b\n")
    DatasetStore().create("glue", str(folder))
    (folder / "test.csv").write_text("a,b\n")
    DatasetStore().create("glue", str(folder))
    source = DatasetsSource()
    source.turn()
    (table,) = source.document("")["tables"]
    assert [row[:5] for row in cells(table)] == [["glue", "2", "2", "2", "8 B"]]
