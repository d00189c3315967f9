"""Job records: one for each job, numbered by name, in any store."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.manifest import encode_record
from hf_cloudtrain.errors import ManifestError, NoJobError
from hf_cloudtrain.jobs.records import OVER, JobRecord, JobStore, Start

FACTS = {"engine": "local", "nodes": 2, "nproc_per_node": 4, "max_restarts": 3}


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(str(tmp_path / "store"))


def test_jobs_with_one_name_are_numbered_and_have_separate_runs_and_homes(store: JobStore) -> None:
    first, second, other = (store.create(name, **FACTS) for name in ("mnli", "mnli", "mnli-2x"))
    assert [first.id, second.id, other.id] == ["mnli-1", "mnli-2", "mnli-2x-1"]
    assert first.run_url != second.run_url
    assert first.home != second.home
    assert store.next_id("mnli") == "mnli-3"
    assert store.ids() == ["mnli-1", "mnli-2", "mnli-2x-1"]


def test_jobs_of_two_remote_stores_have_separate_homes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HF_CLOUDTRAIN_STORE", raising=False)
    stores = [JobStore(url) for url in (None, "memory://one", "memory://two", "memory://two/")]
    here, one, two, same = (store.home("mnli-1") for store in stores)
    assert len({here, one, two}) == 3
    assert two == same
    assert all(home.is_relative_to(tmp_path / ".hf_cloudtrain" / "jobs") for home in (here, one, two))


def test_a_relative_store_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", "store")
    assert JobStore().create("mnli", **FACTS).run_url == str(tmp_path / "store" / "runs" / "mnli-1")


def test_two_concurrent_creates_get_two_numbers(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(name: str) -> str:
        monkeypatch.undo()
        store.create(name, **FACTS)
        return "mnli-1"

    monkeypatch.setattr(store, "next_id", too_late)
    assert store.create("mnli", **FACTS).id == "mnli-2"


def test_a_given_run_url_is_kept(store: JobStore) -> None:
    assert store.create("mnli", run_url="s3://bucket/run", **FACTS).run_url == "s3://bucket/run"


def test_what_was_written_is_read(store: JobStore) -> None:
    record = store.create("mnli", **FACTS)
    starts = (Start(1, 5.0, 6.0, "failed", "a crash", (1, None)), Start(2, 7.0))
    written = store.write(record, state="running", starts=starts, restarts=1, handle={"pid": 3})
    assert written.updated > 0
    assert store.read(record.id) == written
    assert store.records() == [written]


def test_a_name_means_its_newest_job_and_an_id_means_one_job(store: JobStore) -> None:
    ids = [store.create("mnli", **FACTS).id for _ in range(11)]
    assert store.read("mnli").id == "mnli-11"
    assert store.read("mnli-2").id == ids[1]


def test_an_unknown_job_is_an_error_that_names_the_nearest(store: JobStore) -> None:
    store.create("mnli", **FACTS)
    with pytest.raises(NoJobError, match=r"No job 'mnly-1' .* The nearest is 'mnli-1'"):
        store.read("mnly-1")
    with pytest.raises(NoJobError):
        store.read("../../secrets")


def test_records_are_read_in_parallel(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [store.create("mnli", **FACTS).id for _ in range(4)]
    together = threading.Barrier(4, timeout=20.0)
    read = store.storage.read

    def slow_read(path: str) -> bytes:
        together.wait()
        return read(path)

    monkeypatch.setattr(store.storage, "read", slow_read)
    assert [record.id for record in store.records()] == ids


def test_a_store_with_a_damaged_record_shows_the_others(store: JobStore, tmp_path: Path) -> None:
    record = store.create("mnli", **FACTS)
    folder = tmp_path / "store" / "jobs" / "records"
    (folder / "bad-1.json").write_text("{")
    (folder / "bad-2.json").write_text(json.dumps({"id": "bad-2"}))
    (folder / "bad-3.json").write_bytes((folder / "mnli-1.json").read_bytes())
    assert store.records() == [record]
    for name in ("bad-1", "bad-2", "bad-3"):
        with pytest.raises(ManifestError):
            store.read(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"nodes": None},
        {"created": "today"},
        {"run_url": 5},
        {"submitted_by": "ann"},
        {"handle": None},
        {"experiment": 5},
        {"reason": []},
        {"vm": {}},
    ],
)
def test_a_record_with_a_wrong_type_is_damaged(
    store: JobStore, tmp_path: Path, changes: dict[str, object]
) -> None:
    store.create("mnli", **FACTS)
    record = store.create("qqp", **FACTS)
    store.storage.write("records/qqp-1.json", encode_record({**dataclasses.asdict(record), **changes}))
    assert [found.id for found in store.records()] == ["mnli-1"]
    with pytest.raises(ManifestError, match=f"the type of '{next(iter(changes))}' is wrong"):
        store.read("qqp")


@pytest.mark.parametrize(
    "changes", [{"number": "1"}, {"began": "x"}, {"ended": "x"}, {"outcome": 5}, {"reason": 5}]
)
def test_a_start_with_a_wrong_type_damages_its_record(store: JobStore, changes: dict[str, object]) -> None:
    record = dataclasses.asdict(store.create("qqp", **FACTS))
    starts = [{"number": 1, "began": 5.0, **changes}]
    store.storage.write("records/qqp-1.json", encode_record({**record, "starts": starts}))
    assert store.records() == []
    with pytest.raises(ManifestError, match=f"the type of '{next(iter(changes))}' is wrong"):
        store.read("qqp")


@pytest.mark.parametrize("job_id", ["..", ".", ".x-1", "-x-1"])
def test_an_id_that_leads_out_of_the_folder_of_jobs_is_none(store: JobStore, job_id: str) -> None:
    record = dataclasses.asdict(store.create("mnli", **FACTS))
    store.storage.write(f"records/{job_id}.json", encode_record({**record, "id": job_id}))
    assert [found.id for found in store.records()] == ["mnli-1"]
    with pytest.raises((NoJobError, ManifestError)):
        store.read(job_id)


def test_a_key_of_a_newer_version_is_ignored(store: JobStore, tmp_path: Path) -> None:
    record = store.create("mnli", **FACTS)
    path = tmp_path / "store" / "jobs" / "records" / "mnli-1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "blue"}))
    assert store.read("mnli-1") == record


def test_only_the_first_cancel_of_a_job_returns_true(store: JobStore) -> None:
    record = store.create("mnli", **FACTS)
    assert not store.is_cancelled(record.id)
    assert [store.ask_to_cancel(record.id), store.ask_to_cancel(record.id)] == [True, False]
    assert store.is_cancelled(record.id)
    store.forget_cancel(record.id)
    assert not store.is_cancelled(record.id)


@pytest.mark.parametrize("state", ["preempted", "lost", "finished", "failed", "cancelled"])
def test_final_states_are_over(store: JobStore, state: str) -> None:
    record = store.create("mnli", **FACTS)
    assert not record.is_over
    assert state in OVER
    assert store.write(record, state=state).is_over


def test_homes_of_remote_stores_are_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HF_CLOUDTRAIN_STORE", raising=False)
    stores = [JobStore(url) for url in (None, "memory://a", "memory://b")]
    homes = [store.home("mnli-1") for store in stores]
    assert len(set(homes)) == 3
    assert homes[0] == tmp_path / ".hf_cloudtrain" / "jobs" / "mnli-1"
    assert all(home.is_relative_to(homes[0].parent) for home in homes)
    assert homes == [store.home("mnli-1") for store in stores]
    assert JobStore(f"file://{tmp_path}/here").home("mnli-1") == tmp_path / "here" / "jobs" / "mnli-1"


def test_a_remote_store_holds_records_too() -> None:
    store = JobStore("memory://jobs-elsewhere")
    record: JobRecord = store.create("mnli", **FACTS)
    assert record.run_url == "memory://jobs-elsewhere/runs/mnli-1"
    assert store.read("mnli") == record
