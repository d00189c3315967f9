"""Jobs, their logs, and datasets, as the records of the store have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.jobs.records import JobRecord, JobStore, Start
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
    newest, oldest = source.document("")["jobs"]
    assert (oldest["id"], oldest["state"], oldest["processes"], oldest["experiment"]) == (
        "mnli-1",
        "running",
        8,
        "sweep",
    )
    assert oldest["run"] == "0/mnli-1"
    assert (newest["engine"], newest["run"], newest["is_over"]) == ("sagemaker", None, True)
    assert source.version == 1
    source.turn()
    assert source.version == 1
    store.write(record, state="failed", reason="It crashed.")
    source.turn()
    assert source.document("")["jobs"][1]["state"] == "failed"


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
