"""Actions: they do what they say, and leave a record in the run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints import retention
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.paths import ACTIONS
from hf_cloudtrain.checkpoints.retention import pins
from hf_cloudtrain.errors import CloudTrainError, StorageUnavailableError
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.ui.actions import act
from hf_cloudtrain.ui.places import Places
from hf_cloudtrain.ui.runs import RunSource
from tests.recorded import record_attempt, record_run


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> Places:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path))
    record_run(Catalog(Storage(f"{tmp_path}/runs/mnli")))
    return Places([str(tmp_path / "runs")])


@pytest.fixture
def catalog(places: Places) -> Catalog:
    return Catalog(Storage(f"{places.roots[0].url}/mnli"))


def lines(catalog: Catalog) -> list[str]:
    """What the run's records say about actions."""
    paths = [info.path for info in catalog.storage.list(ACTIONS)]
    records = [json.loads(catalog.storage.read(path)) for path in paths]
    assert all(record["user"] and record["host"] and record["time"] <= time.time() for record in records)
    return [record["action"] for record in records]


def test_stop_asks_the_attempt_that_trains(places: Places, catalog: Catalog) -> None:
    with pytest.raises(CloudTrainError, match="attempt 3 finished"):
        act(places, {"action": "stop", "run": "0/mnli"})
    assert lines(catalog) == []
    record_attempt(catalog, began=time.time() - 50, steps=range(401, 411))
    found = act(places, {"action": "stop", "run": "0/mnli"})
    assert "Asked attempt 4 to save and stop" in found["text"]
    assert catalog.attempts.stop_requested(4)
    assert lines(catalog) == ["asked attempt 4 to save and stop"]


def test_a_checkpoint_is_pinned_and_unpinned_and_the_page_shows_who_did_it(
    places: Places, catalog: Catalog
) -> None:
    asked = {"run": "0/mnli", "key": "000002-0000000200"}
    assert act(places, {"action": "pin", **asked})["text"].startswith("Pinned checkpoint-200.")
    assert pins(catalog) == [CheckpointKey(2, 200)]
    assert act(places, {"action": "unpin", **asked})["text"].startswith("Unpinned checkpoint-200.")
    assert pins(catalog) == []
    assert lines(catalog) == ["pinned checkpoint-200", "unpinned checkpoint-200"]
    source = RunSource(places, "0/mnli")
    source.turn()
    assert [
        "unpinned checkpoint-200" in line for line in source.document("")["logs"]["Actions from this page"]
    ] == [True, False]


def test_prune_shows_first_and_deletes_exactly_what_was_shown(places: Places, catalog: Catalog) -> None:
    asked = {"action": "prune", "run": "0/mnli", "keep": 2}
    plan = act(places, asked)
    before = catalog.checkpoints()
    assert plan["going"] == [str(key) for key in before[:-2] if key != CheckpointKey(2, 200)]
    assert "5 checkpoints (2.2 GB) would be deleted; 1 other protected." in plan["text"]
    assert lines(catalog) == []
    assert catalog.checkpoints() == before
    changed = act(places, {**asked, "sure": plan["going"][1:]})
    assert "have changed since they were shown" in changed["text"]
    assert catalog.checkpoints() == before
    assert act(places, {**asked, "sure": plan["going"]})["text"] == "Deleted 5 checkpoints."
    assert catalog.checkpoints() == [CheckpointKey(2, 200), *before[-2:]]
    assert lines(catalog) == ["deleted 5 checkpoints, all but the newest 2"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "'None' must be one of: stop, pin, unpin, prune, cancel"),
        ({"action": "delete", "run": "0/mnli"}, "must be one of"),
        ({"action": "stop", "run": "0/../x"}, "on this page"),
        ({"action": "stop"}, "on this page"),
        ({"action": "stop", "run": "0/absent"}, "There is no run at"),
        ({"action": "pin", "run": "0/mnli", "key": "final"}, "'final' is not the key of a checkpoint"),
        ({"action": "pin", "run": "0/mnli", "key": "000009-0000000200"}, "There is no checkpoint"),
        ({"action": "prune", "run": "0/mnli", "keep": 0}, "must be a positive integer"),
        ({"action": "prune", "run": "0/mnli", "keep": "2"}, "must be a positive integer"),
        ({"action": "prune", "run": "0/mnli", "keep": True}, "must be a positive integer"),
        ({"action": "cancel", "job": "absent"}, "No job 'absent'"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    places: Places, catalog: Catalog, asked: dict[str, object], words: str
) -> None:
    with pytest.raises(CloudTrainError, match=words):
        act(places, asked)
    assert lines(catalog) == []


def test_damaged_checkpoints_are_named_before_a_deletion(places: Places, catalog: Catalog) -> None:
    for key in catalog.checkpoints()[:2]:
        catalog.storage.write(f".cloudtrain/checkpoints/{key}.json", b"{oops")
    text = act(places, {"action": "prune", "run": "0/mnli", "keep": 2})["text"]
    assert text.endswith("protected. 2 damaged checkpoints kept."), text


def test_a_deletion_that_fails_half_way_is_noted_with_what_it_deleted(
    places: Places, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    going = act(places, {"action": "prune", "run": "0/mnli", "keep": 2})["going"]
    retire, done = retention.retire_unprotected, []

    def fails_second(catalog: Catalog, key: CheckpointKey) -> str | None:
        if done:
            raise StorageUnavailableError("The storage does not answer.")
        done.append(key)
        return retire(catalog, key)

    monkeypatch.setattr(retention, "retire_unprotected", fails_second)
    with pytest.raises(StorageUnavailableError):
        act(places, {"action": "prune", "run": "0/mnli", "keep": 2, "sure": going})
    assert lines(catalog) == ["deleted 1 checkpoint, then failed: The storage does not answer."]


@pytest.mark.parametrize(
    ("where", "noted", "said"),
    [
        ("runs/mnli", True, ""),
        ("runs/mnli-1", True, ""),
        ("else/where", False, " Its run is not on this page, so the action is not recorded there."),
        ("runs/not-begun", False, ""),
    ],
)
def test_law_11_cancel_is_noted_only_in_a_run_of_the_page_or_the_store(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, noted: bool, said: str
) -> None:
    """A record of a job comes from storage: the server writes to no URL that only the record names."""
    run = Catalog(Storage(f"{tmp_path}/{where}"))
    if where in ("else/where", "runs/mnli-1"):
        run.attempts.begin(time.time(), 0, None, {})
    if where == "runs/mnli-1":
        places.roots = []
    store = JobStore()
    facts = {"engine": "local", "nodes": 1, "nproc_per_node": 1, "max_restarts": 3}
    run_url = None if where == "runs/mnli-1" else run.storage.url
    record = store.create("mnli", run_url=run_url, state="running", **facts)
    monkeypatch.setattr("hf_cloudtrain.jobs.lifecycle.look", lambda store, record: record)
    answer = act(places, {"action": "cancel", "job": record.id})["text"]
    assert answer == f"Asked mnli-1 to save and end.{said}"
    assert store.is_cancelled(record.id)
    assert lines(run) == (["asked the job mnli-1 to end"] if noted else [])
