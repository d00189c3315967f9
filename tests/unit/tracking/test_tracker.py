"""Steps are timed in memory; a thread stores them and the heartbeat, and survives storage errors."""

from __future__ import annotations

import gc
import json
import logging
import math
import sys
import threading
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest

from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.upload_status import Commit, UploadStatus
from hf_cloudtrain.errors import StorageError
from hf_cloudtrain.tracking import tracker as module
from hf_cloudtrain.tracking.records import StepRecords
from hf_cloudtrain.tracking.services.event_files import EventFiles
from hf_cloudtrain.tracking.services.runs import TrackerRun
from hf_cloudtrain.tracking.tracker import StepTracker
from tests.faults.runs import DEADLINE, Machines, wait_until


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module.time, "perf_counter", made.perf_counter)
    return made


@pytest.fixture
def tracker(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> Iterator[StepTracker]:
    monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", "0.02")
    monkeypatch.setattr(module, "SAVE_FLUSH_SECONDS", 0.0)
    made = StepTracker(machines.catalog, 3, first_step=500, total_steps=1_000, samples_per_step=32)
    yield made
    made.close("stopped")


def run(tracker: StepTracker, clock: Clock, steps: range, seconds: float = 0.5) -> None:
    for step in steps:
        tracker.begin_step()
        clock.now += seconds
        tracker.end_step(step)


def stored(machines: Machines) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for batch in StepRecords(machines.catalog.storage).read().get(3, [])
        for line in batch.splitlines()
    ]


def test_a_heartbeat_before_the_first_step_has_no_rates(tracker: StepTracker) -> None:
    beat = tracker.heartbeat()
    assert (beat["step"], beat["total_steps"], beat["state"], beat["attempt"]) == (500, 1_000, "training", 3)
    for name in ("step_seconds", "samples_per_second", "tokens_per_second", "eta_seconds", "loss"):
        assert beat[name] is None


def test_a_heartbeat_records_its_interval(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader on a different machine computes from it when a heartbeat is missing."""
    monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", "40")
    tracker = StepTracker(machines.catalog, 3, first_step=0, total_steps=None)
    assert tracker.heartbeat()["interval_seconds"] == 40


def test_rates_and_eta_are_computed_from_the_latest_steps(tracker: StepTracker, clock: Clock) -> None:
    run(tracker, clock, range(501, 521), seconds=8.0)  # slow, but not among the latest
    run(tracker, clock, range(521, 521 + module.RECENT_STEPS), seconds=0.5)
    beat = tracker.heartbeat()
    assert beat["step"] == 570
    assert beat["step_seconds"] == pytest.approx(0.5)
    assert beat["samples_per_second"] == pytest.approx(64.0)
    assert beat["eta_seconds"] == pytest.approx(430 * 0.5)
    assert beat["productive_seconds"] == pytest.approx(20 * 8.0 + 50 * 0.5)


def test_time_between_a_pause_and_the_next_step_is_not_step_time(tracker: StepTracker, clock: Clock) -> None:
    run(tracker, clock, range(501, 503))
    tracker.pause()
    clock.now += 1_000.0  # an evaluation
    run(tracker, clock, range(503, 504))
    assert tracker.productive_seconds == pytest.approx(1.5)


def test_the_time_of_saves_is_told_and_that_of_an_evaluation_is_not(
    tracker: StepTracker, clock: Clock
) -> None:
    assert tracker.heartbeat()["save_seconds"] is None
    for seconds, why in ((90.0, "save"), (0.1, "save"), (0.3, "save"), (50.0, "evaluation"), (0.2, "save")):
        run(tracker, clock, range(501, 503))
        tracker.pause(why)
        clock.now += seconds
    run(tracker, clock, range(503, 504))
    assert tracker.heartbeat()["save_seconds"] == pytest.approx(0.25)


def test_time_between_two_steps_belongs_to_the_second(tracker: StepTracker, clock: Clock) -> None:
    """Waiting for data is step time."""
    run(tracker, clock, range(501, 502))
    clock.now += 2.0
    run(tracker, clock, range(502, 503))
    assert tracker.productive_seconds == pytest.approx(3.0)


def test_tokens_per_second_are_known_only_if_tokens_are_counted(tracker: StepTracker, clock: Clock) -> None:
    tracker.begin_step()
    tracker.end_step(501, 0)
    assert tracker.heartbeat()["tokens_per_second"] is None
    for step, tokens in ((502, 1_000), (503, 1_500)):
        clock.now += 2.0
        tracker.end_step(step, tokens)
    assert tracker.heartbeat()["tokens_per_second"] == pytest.approx(250.0)


def test_an_unknown_number_of_steps_has_no_eta(machines: Machines, clock: Clock) -> None:
    tracker = StepTracker(machines.catalog, 3, first_step=0, total_steps=None)
    run(tracker, clock, range(1, 3))
    assert tracker.heartbeat()["eta_seconds"] is None
    assert tracker.heartbeat()["samples_per_second"] is None


def test_the_heartbeat_shows_the_last_loss_and_commit(machines: Machines) -> None:
    uploads = UploadStatus()
    uploads.committed(Commit(CheckpointKey(3, 5), saved=1.0, committed=2.0))
    tracker = StepTracker(machines.catalog, 3, first_step=0, total_steps=10, uploads=uploads)
    tracker.log(5, {"loss": 0.5, "learning_rate": 1e-4})
    tracker.log(6, {"loss": 0.4})
    beat = tracker.heartbeat()
    assert (beat["loss"], beat["learning_rate"]) == (0.4, 1e-4)
    assert beat["last_committed"] == "000003-0000000005"


def test_steps_and_logs_are_stored_as_they_were(
    tracker: StepTracker, clock: Clock, machines: Machines
) -> None:
    tracker.start()
    run(tracker, clock, range(501, 504), seconds=0.25)
    tracker.log(503, {"loss": 0.5, "note": "warm", "flag": True})
    run(tracker, clock, range(510, 511))  # a gap starts a new line
    tracker.close("finished")
    found = stored(machines)
    lines = [(line["first"], line["seconds"]) for line in found if line["kind"] == "steps"]
    assert [seconds for first, seconds in lines if first == 510] == [[0.5]]
    assert [second for first, seconds in lines if first < 510 for second in seconds] == [0.25] * 3
    [log] = [line for line in found if line["kind"] == "log"]
    assert (log["step"], log["metrics"]) == (503, {"loss": 0.5, "note": "warm", "flag": True})


def cycle() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


class Hostile:
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


DROPPED = {
    "list": [1],
    "none": None,
    "object": object(),
    "huge": 10**400,
    "very huge": 10**10_000,
    "huge float": 1e305,
    "bytes": b"\xe9",
    "cycle": cycle(),
    "hostile": Hostile(),
    "complex": 1j,
}
KEPT: list[tuple[Any, Any, str, Any]] = [
    ("loss", math.nan, "loss", "nan"),
    ("loss", math.inf, "loss", "inf"),
    ("loss", -math.inf, "loss", "-inf"),
    ("numpy", numpy.float32(0.5), "numpy", 0.5),
    ("numpy", numpy.int64(3), "numpy", 3),
    ("numpy", numpy.float32("nan"), "numpy", "nan"),
    ("fraction", Fraction(1, 4), "fraction", 0.25),
    ("file", "caf\udce9.txt", "file", "caf\\udce9.txt"),
    ("caf\udce9", 1, "caf\\udce9", 1),
    (("a", 1), 0.5, "('a', 1)", 0.5),
    (None, 0.5, "None", 0.5),
    (7, 0.5, "7", 0.5),
    ("text", "\x00\n\u2028", "text", "\x00\n\u2028"),
]


@pytest.mark.parametrize(("name", "value", "as_name", "as_value"), KEPT)
def test_what_json_cannot_hold_is_escaped(
    tracker: StepTracker, machines: Machines, name: Any, value: Any, as_name: str, as_value: Any
) -> None:
    tracker.log(501, {name: value})
    tracker._store_records()
    [log] = stored(machines)
    assert log["metrics"] == {as_name: as_value}


def test_a_metric_that_cannot_be_recorded_is_named_once_and_the_others_are_kept(
    tracker: StepTracker, machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (501, 502):
        tracker.log(step, {**DROPPED, Hostile(): 1.0, "loss": 0.5})
    tracker._store_records()
    assert [log["metrics"] for log in stored(machines)] == [{"loss": 0.5}] * 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(DROPPED) + 1
    for name in DROPPED:
        assert sum(f"The metric {name!r} is not recorded" in warning for warning in warnings) == 1


def test_metrics_never_replace_our_own_fields(tracker: StepTracker, clock: Clock, machines: Machines) -> None:
    names = (
        "kind",
        "step",
        "time",
        "attempt",
        "state",
        "metrics",
        "total_steps",
        "interval_seconds",
        "samples",
    )
    run(tracker, clock, range(501, 502))
    tracker.log(501, dict.fromkeys(names, "mine"))
    tracker._store_records()
    [log] = [line for line in stored(machines) if line["kind"] == "log"]
    assert (log["step"], log["metrics"]) == (501, dict.fromkeys(names, "mine"))
    assert "mine" not in tracker.heartbeat().values()


def test_the_loss_of_a_heartbeat_is_the_last_one_with_its_step(tracker: StepTracker, clock: Clock) -> None:
    tracker.log(501, {"loss": 0.25})
    run(tracker, clock, range(501, 506))
    beat = tracker.heartbeat()
    assert (beat["step"], beat["loss"], beat["loss_step"]) == (505, 0.25, 501)
    tracker.log(505, {"loss": math.nan})
    beat = tracker.heartbeat()
    assert (beat["loss"], beat["loss_step"]) == ("nan", 505)


def test_a_heartbeat_is_json_whatever_the_numbers_are(machines: Machines, clock: Clock) -> None:
    tracker = StepTracker(machines.catalog, 3, first_step=0, total_steps=math.inf)  # type: ignore[arg-type]
    run(tracker, clock, range(1, 3), seconds=math.inf)
    json.loads(json.dumps(tracker.heartbeat(), allow_nan=False))


class SurpriseError(Exception):
    """Of a client library, say."""


@pytest.mark.parametrize("broken", ["_note_uploads", "_store_records", "_write_heartbeat"])
def test_an_unexpected_error_ends_one_turn_and_not_the_thread(
    tracker: StepTracker,
    clock: Clock,
    machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    calls = []
    real = getattr(tracker, broken)

    def breaks() -> None:
        calls.append(1)
        if len(calls) < 4:
            raise SurpriseError("unexpected")
        real()

    monkeypatch.setattr(tracker, broken, breaks)
    run(tracker, clock, range(501, 502))
    tracker.start()
    wait_until(lambda: len(calls) > 4, "a turn without an error")
    tracker.close("finished")
    assert (machines.catalog.attempts.read_progress(3) or {})["state"] == "finished"
    assert [line["first"] for line in stored(machines)] == [501]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "SurpriseError" in warnings[0]


def test_heartbeats_continue_until_close_and_end_with_its_state(
    tracker: StepTracker, clock: Clock, machines: Machines
) -> None:
    tracker.start()
    wait_until(lambda: machines.catalog.attempts.read_progress(3), "the first heartbeat")
    run(tracker, clock, range(501, 502))
    wait_until(lambda: (machines.catalog.attempts.read_progress(3) or {}).get("step") == 501, "the next one")
    tracker.close("finished")
    beat = machines.catalog.attempts.read_progress(3)
    assert beat is not None
    assert (beat["state"], beat["step"]) == ("finished", 501)
    tracker.close("failed")
    assert machines.catalog.attempts.read_progress(3) == beat, "only the first close counts"


@pytest.mark.parametrize(("error", "state"), [(KeyboardInterrupt(), "stopped"), (OSError(), "failed")])
def test_an_attempt_that_the_end_of_the_process_ends_says_whether_it_was_ctrl_c(
    tracker: StepTracker,
    machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    state: str,
) -> None:
    tracker.start()
    monkeypatch.setattr(sys, "last_value", error, raising=False)
    tracker._close_at_exit()
    assert (machines.catalog.attempts.read_progress(3) or {}).get("state") == state


@pytest.mark.parametrize("in_time", [True, False])
def test_event_files_for_which_there_is_no_time_at_the_end_are_named(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, in_time: bool
) -> None:
    run_of_tracker, gate = TrackerRun("tensorboard", "runs/one", 1), threading.Event()
    files = EventFiles(machines.catalog.storage, run_of_tracker, Path("out/runs/one"), gate.wait)
    monkeypatch.setattr(module, "CLOSE_SECONDS", DEADLINE if in_time else 0.01)
    tracker = StepTracker(machines.catalog, 3, first_step=0, total_steps=4, files={"tensorboard": files})
    tracker.start()
    if in_time:
        gate.set()
    tracker.close("preempted")
    tracker._close_at_exit()
    said = "the end of the event files in 'out/runs/one' may be on this machine only" in caplog.text
    assert said is not in_time
    gate.set()
    tracker._thread.join(DEADLINE)


@pytest.mark.parametrize("error", [StorageError("503"), RuntimeError("of tensorboard")])
def test_event_files_whose_last_part_cannot_be_stored_are_named(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(files: EventFiles) -> bool:
        raise error

    monkeypatch.setattr(EventFiles, "store", fail)
    run_of_tracker = TrackerRun("tensorboard", "runs/one", 1)
    files = EventFiles(machines.catalog.storage, run_of_tracker, Path("out/runs/one"), lambda: None)
    tracker = StepTracker(machines.catalog, 3, first_step=0, total_steps=4, files={"tensorboard": files})
    tracker.start()
    tracker.close("finished")
    assert "the end of the event files in 'out/runs/one' may be on this machine only" in caplog.text


def test_records_survive_an_outage(
    tracker: StepTracker, clock: Clock, machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    machines.storage.fail("write", times=6 * 3)
    tracker.start()
    run(tracker, clock, range(501, 504))
    tracker.log(503, {"loss": 0.5})
    wait_until(lambda: stored(machines), "the records")
    tracker.close("finished")
    seconds = [second for line in stored(machines) for second in line.get("seconds", [])]
    assert seconds == [0.5] * 3
    assert [line["metrics"]["loss"] for line in stored(machines) if line["kind"] == "log"] == [0.5]
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1, "one warning for the whole outage"


def test_records_whose_response_was_lost_are_stored_once(
    tracker: StepTracker, clock: Clock, machines: Machines
) -> None:
    machines.storage.lose_answer("write", path="*/steps/*", times=6)
    tracker.start()
    run(tracker, clock, range(501, 504))
    tracker.flush_soon()
    wait_until(lambda: machines.storage.count("write", "*/steps/*") > 6, "a write with a response")
    run(tracker, clock, range(504, 506))
    tracker.close("finished")
    seconds = [second for line in stored(machines) for second in line.get("seconds", [])]
    assert seconds == [0.5] * 5


def test_an_error_of_the_storage_at_the_end_does_not_fail_the_training(
    tracker: StepTracker, machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    tracker.start()
    wait_until(lambda: machines.catalog.attempts.read_progress(3), "the first heartbeat")
    machines.storage.fail("write", StorageError("refused"), times=1_000)
    tracker.log(501, {"loss": 0.5})
    tracker.close("finished")
    assert not tracker._thread.is_alive()
    assert "refused" in caplog.text


def test_a_batch_grows_in_place_until_it_is_large_enough(
    machines: Machines, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 300)
    tracker = StepTracker(machines.catalog, 3, first_step=0, total_steps=None)
    for step in range(1, 7):
        run(tracker, clock, range(step, step + 1))
        tracker._store_records()
    assert 1 < len(StepRecords(machines.catalog.storage).read().get(3, [])) < 6
    assert [second for line in stored(machines) for second in line["seconds"]] == [0.5] * 6


def test_without_new_records_nothing_is_stored(machines: Machines) -> None:
    tracker = StepTracker(machines.catalog, 3, first_step=0, total_steps=None)
    tracker._store_records()
    assert StepRecords(machines.catalog.storage).read().get(3, []) == []


def test_close_before_start_only_sets_the_state(machines: Machines) -> None:
    tracker = StepTracker(machines.catalog, 3, first_step=0, total_steps=None)
    tracker.close("failed")
    assert tracker.heartbeat()["state"] == "failed"


class TestPauses:
    """Time without a step is recorded if it is long enough."""

    def test_the_start_an_evaluation_and_a_save_are_recorded_with_their_times(
        self, clock: Clock, tracker: StepTracker, machines: Machines
    ) -> None:
        clock.now += 12.0
        run(tracker, clock, range(501, 503))
        clock.now += 1.0  # from the last step to the end of the evaluation, no step is done
        tracker.pause("evaluation")
        clock.now += 3.0
        tracker.pause("save")
        run(tracker, clock, range(503, 504))
        tracker.start()
        tracker.close("finished")
        pauses = [item for item in stored(machines) if item["kind"] == "pause"]
        assert [(item["why"], item["step"], item["seconds"]) for item in pauses] == [
            ("start", 500, 12.0),
            ("evaluation", 502, 4.0),
        ]
        assert pauses[0]["time"] == pytest.approx(module.time.time() - 12.0, abs=30)

    def test_short_pauses_are_not_recorded(
        self, tracker: StepTracker, machines: Machines, clock: Clock
    ) -> None:
        for step in range(501, 521):
            run(tracker, clock, range(step, step + 1))
            tracker.pause()
            clock.now += module.PAUSE_SECONDS * 0.9
        tracker.start()
        tracker.close("finished")
        assert {item["kind"] for item in stored(machines)} == {"steps"}


class TestUploads:
    """Saves and commits are in the records and in the heartbeat."""

    def test_each_commit_is_recorded_with_the_time_of_its_save(
        self, machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", "0.02")
        machine = machines.new()
        machine.start()
        tracker = StepTracker(
            machines.catalog, 3, first_step=0, total_steps=9, uploads=machine.checkpointer.uploads
        )
        tracker.start()
        began = module.time.time()
        for step in (4, 8):
            machine.save(step)
            machine.wait()
        tracker.close("finished")
        commits = [item for item in stored(machines) if item["kind"] == "commit"]
        assert [item["checkpoint"] for item in commits] == ["000001-0000000004", "000001-0000000008"]
        for item in commits:
            assert began <= item["saved"] <= item["time"] <= module.time.time()
            assert item["size"] > 1_000_000
        beat = machines.catalog.attempts.read_progress(3)
        assert beat is not None
        assert beat["last_saved"] == "000001-0000000008"
        assert beat["last_saved_time"] == commits[-1]["saved"]

    def test_a_save_whose_upload_fails_is_saved_and_not_committed(self, machines: Machines) -> None:
        machine = machines.new()
        machine.start()
        machines.storage.fail("upload", times=1000)
        machine.save(4)
        uploads = machine.checkpointer.uploads
        assert (uploads.last_saved, uploads.take_commits()) == (CheckpointKey(1, 4), [])

    def test_a_tracker_does_not_keep_the_checkpointer_alive(self, machines: Machines) -> None:
        machine = machines.new()
        tracker = StepTracker(
            machines.catalog, 3, first_step=0, total_steps=9, uploads=machine.checkpointer.uploads
        )
        reference = weakref.ref(machine.checkpointer)
        machines.made.remove(machine)
        del machine
        gc.collect()
        assert reference() is None
        assert tracker.heartbeat()["last_saved"] is None


def test_records_are_stored_at_least_with_each_heartbeat_after_a_save_too(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_FLUSH_SECONDS", 2.0)
    tracker = StepTracker(machines.catalog, 3, first_step=0, total_steps=9)
    tracker._interval = 0.2
    tracker.flush_soon()
    assert tracker._next_flush(100.0) == pytest.approx(100.2)
    tracker._interval = 15.0
    assert tracker._next_flush(100.0) == pytest.approx(102.0)


@pytest.mark.parametrize("value", ["0", "$2.5", "-1"])
def test_a_price_that_is_not_a_number_is_told_and_does_not_end_the_training(
    value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_PRICE", value)
    assert module._price() is None
    assert f"HF_CLOUDTRAIN_PRICE={value!r}" in caplog.text
    assert "The pages show no cost." in caplog.text
