"""Supervisor: it restarts after crashes, stops by cancel or signal, and writes the record whatever the store does."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import StorageError
from hf_cloudtrain.jobs import supervisor
from hf_cloudtrain.jobs.records import JobRecord, JobStore
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.jobs.supervisor import Supervisor
from hf_cloudtrain.storage.client import Storage

FILE = b"name: mnli\nmax_restarts: 2\njob_setting: {docker: {command: torchrun train.py}}\nlocal: {nodes: 2, nproc_per_node: 1}"


class Nodes:
    """Two nodes whose starts end as the test says: with these files and exit codes."""

    def __init__(self, submission: Submission, *starts: Any) -> None:
        self.submission = submission
        self.starts = list(starts)
        self.number = 0
        self.stopped = self.killed = 0
        self._codes: tuple[int | None, ...] | None = None

    def start(self, number: int) -> None:
        self.number = number
        found = self.starts.pop(0)
        if isinstance(found, BaseException):
            raise found
        if callable(found):
            found = found()
        if found is None:  # it runs until it is asked to stop
            self._codes = None
            return
        ends, self._codes = found
        for rank, end in enumerate(ends):
            leave(self.submission, number, rank, end, self._codes[rank])

    def poll(self) -> tuple[int | None, ...] | None:
        return self._codes

    def stop(self) -> None:
        self.stopped += 1
        end = {"outcome": "preempted", "reason": "SIGTERM", "committed": "000001-0000000005", "saved": "x"}
        leave(self.submission, self.number, 0, end, 75)
        self._codes = (75, 75)

    def kill(self) -> None:
        self.killed += 1


def leave(
    submission: Submission, number: int, rank: int, end: dict[str, Any] | None, code: int | None
) -> None:
    for path, record in (
        (submission.exit_file(rank, number), end),
        (submission.node_file(rank, number), None if code is None else {"exit_code": code, "problem": None}),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        if record is not None:
            path.write_text(json.dumps(record))


FINISHED = {"outcome": "finished"}
PREEMPTED = {"outcome": "preempted", "reason": "SIGTERM", "committed": "000001-0000000005", "saved": "x"}
CRASH = ([None, None], (1, 1))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobStore:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(supervisor, "POLL", 0.01)
    monkeypatch.setattr(supervisor, "LOOK", 0.0)
    return JobStore(str(tmp_path / "store"))


@pytest.fixture
def record(store: JobStore) -> JobRecord:
    return store.create("mnli", engine="local", nodes=2, nproc_per_node=1, max_restarts=2)


@pytest.fixture
def submission(store: JobStore, record: JobRecord) -> Submission:
    job = parse_job(FILE)
    return Submission(job, job.plan(), record.id, record.run_url, store.url, Path(record.home))


@pytest.fixture
def run(store: JobStore, record: JobRecord, submission: Submission) -> Callable[..., tuple[JobRecord, Nodes]]:
    def run(*starts: Any) -> tuple[JobRecord, Nodes]:
        nodes = Nodes(submission, *starts)
        last = Supervisor(submission, store, record, nodes).run()
        assert store.read(record.id) == last
        assert not nodes.starts
        return last, nodes

    return run


def test_a_training_that_finishes_is_started_once(run: Callable[..., tuple[JobRecord, Nodes]]) -> None:
    last, _ = run(([FINISHED, None], (0, 0)))
    assert (last.state, last.restarts, last.reason) == ("finished", 0, None)
    assert [(start.number, start.outcome, start.exit_codes) for start in last.starts] == [
        (1, "finished", (0, 0))
    ]


def test_a_crash_is_restarted_as_often_as_the_job_allows(
    run: Callable[..., tuple[JobRecord, Nodes]],
) -> None:
    last, _ = run(CRASH, CRASH, CRASH)
    assert (last.state, last.restarts, len(last.starts)) == ("failed", 2, 3)
    assert "exit code 1" in (last.reason or "")
    assert "restarted 2 times, the limit set by 'max_restarts'" in (last.reason or "")


@pytest.mark.parametrize(
    ("errors", "has_steps", "starts"),
    [
        (["KeyError: 'a'", "KeyError: 'a'"], False, 2),
        (["KeyError: 'a'", "KeyError: 'b'", "KeyError: 'a'"], False, 3),
        (["KeyError: 'a'"] * 3, True, 3),
        (["ConnectionError: reset"] * 3, False, 3),
    ],
)
def test_the_same_failure_twice_before_any_step_ends_the_job(
    run: Callable[..., tuple[JobRecord, Nodes]],
    submission: Submission,
    record: JobRecord,
    errors: list[str],
    has_steps: bool,
    starts: int,
) -> None:
    attempts = Catalog(Storage(record.run_url)).attempts
    submission.log.mkdir(parents=True)

    def crash(error: str) -> Any:
        if has_steps:
            progress = {"state": "training", "step": 5, "productive_seconds": 1.0}
            attempts.write_progress(attempts.begin(0.0, 0, None, {}).number, progress)
        submission.node_log(0).write_text(f"{error}\n")
        return CRASH

    last, _ = run(*(functools.partial(crash, error) for error in errors))
    assert (last.state, len(last.starts)) == ("failed", starts)
    assert ("failed alike before their first step: KeyError: 'a'" in (last.reason or "")) == (starts == 2)


def test_a_server_that_served_is_restarted_after_the_same_failure(
    run: Callable[..., tuple[JobRecord, Nodes]], submission: Submission
) -> None:
    """It makes no steps; what ends it may be the same each time, such as a driver."""
    submission.log.mkdir(parents=True)

    def served(code: int) -> Any:
        submission.node_log(0).write_text("KeyError: 'a'\n")
        return [{"served": True}, None], (code, code)

    last, _ = run(*[functools.partial(served, 1)] * 3)
    assert (last.state, last.restarts) == ("failed", 2)
    assert "the limit set by 'max_restarts'" in (last.reason or "")
    last, _ = run(functools.partial(served, 0), ([FINISHED, None], (0, 0)))
    assert last.starts[0].reason == "The server ended with exit code 0."


SERVED = [{"served": True}, None]


class Pauses:
    """In place of an event: how long the supervisor would wait."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def wait(self, seconds: float) -> None:
        self.found.append(seconds)

    def set(self) -> None: ...


@pytest.mark.parametrize(
    ("steady", "pauses"),
    [(60.0, [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]), (0.0, [1.0] * 7)],
    ids=["right after it served", "after a day"],
)
def test_a_server_that_dies_right_after_it_served_is_restarted_ever_later(
    store: JobStore,
    record: JobRecord,
    submission: Submission,
    monkeypatch: pytest.MonkeyPatch,
    steady: float,
    pauses: list[float],
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(supervisor, "STEADY", steady)
    record = store.write(dataclasses.replace(record, max_restarts=7))
    nodes = Nodes(submission, *[(SERVED, (1, 1))] * 8)
    supervising = Supervisor(submission, store, record, nodes)
    monkeypatch.setattr(supervising, "_wake", waited := Pauses())
    assert supervising.run().restarts == 7
    assert waited.found == pauses


def test_a_server_that_is_stopped_with_its_machine_has_not_crashed(
    run: Callable[..., tuple[JobRecord, Nodes]],
) -> None:
    last, _ = run(*[(SERVED, (75, 0))] * 4, ([FINISHED, None], (0, 0)))
    assert (last.state, last.restarts, last.starts[0].outcome) == ("finished", 0, "preempted")


def test_while_a_job_runs_a_thread_reads_its_exit_files(
    store: JobStore, record: JobRecord, submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be on storage that hangs, such as NFS; a signal must still reach the nodes."""
    threads: list[str] = []

    def served(submission: Submission, number: int) -> bool:
        threads.append(threading.current_thread().name)
        return True

    class Running(Nodes):
        def poll(self) -> tuple[int | None, ...] | None:
            return (0, 0) if store.read(record.id).state == "running" else None

        def start(self, number: int) -> None:
            leave(submission, number, 0, FINISHED, 0)

    monkeypatch.setattr(supervisor, "has_served", served)
    assert Supervisor(submission, store, record, Running(submission)).run().state == "finished"
    assert threads[0] == "cloudtrain-store"
    assert threads.count("MainThread") == 1, "for the verdict"


def test_a_job_that_finishes_after_a_crash_is_finished(run: Callable[..., tuple[JobRecord, Nodes]]) -> None:
    last, _ = run(CRASH, ([FINISHED, None], (0, 0)))
    assert (last.state, last.restarts, last.reason) == ("finished", 1, None)


def test_a_preemption_is_not_a_crash(run: Callable[..., tuple[JobRecord, Nodes]]) -> None:
    gone = ([PREEMPTED, PREEMPTED], (75, 75))
    last, _ = run(gone, gone, gone, gone, ([FINISHED, None], (0, 0)))
    assert (last.state, last.restarts, len(last.starts)) == ("finished", 0, 5)


def test_starts_that_are_stopped_before_they_save_are_limited(
    run: Callable[..., tuple[JobRecord, Nodes]],
) -> None:
    at_once = ([{"outcome": "preempted", "reason": "a notice"}, None], (75, 75))
    last, _ = run(at_once, at_once, at_once)
    assert last.state == "preempted"
    assert "3 starts in a row" in (last.reason or "")


def test_nodes_that_cannot_be_started_count_as_a_crash(run: Callable[..., tuple[JobRecord, Nodes]]) -> None:
    last, _ = run(OSError("no processes left"), ([FINISHED, None], (0, 0)))
    assert (last.state, last.restarts) == ("finished", 1)
    assert last.starts[0].reason == "no processes left"


def test_a_cancelled_job_gives_its_nodes_their_grace_and_is_not_restarted(
    run: Callable[..., tuple[JobRecord, Nodes]], store: JobStore, record: JobRecord
) -> None:
    def cancel_during_the_start() -> None:
        store.ask_to_cancel(record.id)

    last, nodes = run(cancel_during_the_start)
    assert (last.state, nodes.stopped, nodes.killed) == ("cancelled", 1, 1)
    assert last.reason == "Stopped by `cloudtrain job cancel`. The newest checkpoint is 000001-0000000005."


def test_a_job_cancelled_before_its_start_starts_nothing(
    run: Callable[..., tuple[JobRecord, Nodes]], store: JobStore, record: JobRecord
) -> None:
    store.ask_to_cancel(record.id)
    last, _ = run()
    assert (last.state, last.starts) == ("cancelled", ())


def test_a_job_cancelled_during_a_crash_is_not_restarted(
    run: Callable[..., tuple[JobRecord, Nodes]], store: JobStore, record: JobRecord
) -> None:
    def crash() -> Any:
        store.ask_to_cancel(record.id)
        return CRASH

    last, _ = run(crash)
    assert last.state == "cancelled"


def test_a_signal_to_the_supervisor_leaves_a_job_that_can_be_resumed(
    run: Callable[..., tuple[JobRecord, Nodes]],
) -> None:
    def send_sigterm() -> None:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()

    before = signal.getsignal(signal.SIGTERM)
    last, nodes = run(send_sigterm)
    assert (last.state, nodes.stopped) == ("preempted", 1)
    assert "SIGTERM" in (last.reason or "")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_reaches_the_nodes_while_the_store_hangs(
    run: Callable[..., tuple[JobRecord, Nodes]], store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    answers: list[bool] = []
    write = store.write

    def send_sigterm() -> None:
        monkeypatch.setattr(store, "is_cancelled", lambda job_id: answers.append(go_on.wait(20)) or False)
        monkeypatch.setattr(store, "write", lambda *a, **k: answers.append(go_on.wait(20)) or write(*a, **k))
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()

    stopped = Nodes.stop

    def stop(self: Nodes) -> None:
        go_on.set()
        stopped(self)

    monkeypatch.setattr(Nodes, "stop", stop)
    last, _ = run(send_sigterm)
    assert answers
    assert all(answers), "nothing waits for the store before the nodes are asked to stop"
    assert last.state == "preempted"


def test_a_job_is_restarted_after_any_number_of_starts_without_a_step(
    store: JobStore, record: JobRecord, submission: Submission
) -> None:
    supervising = Supervisor(
        submission, store, record, Nodes(submission, CRASH, ([FINISHED, FINISHED], (0, 0)))
    )
    supervising._short = 5_000  # no float is so large as two to the power of it
    assert supervising.run().state == "finished"


def test_files_of_a_start_that_no_record_has_are_deleted(
    run: Callable[..., tuple[JobRecord, Nodes]], submission: Submission
) -> None:
    """Its supervisor was killed while the store did not answer."""
    leave(submission, 1, 0, FINISHED, 0)
    leave(submission, 1, 1, FINISHED, 0)
    submission.restored_file(1).write_text("[1, 5]")
    found: list[bool] = []

    def crash() -> Any:
        found.append(submission.restored_file(1).exists())
        return CRASH

    last, _ = run(crash, ([FINISHED, None], (0, 0)))
    assert found == [False], "the nodes choose a checkpoint again"
    assert (last.state, last.restarts) == ("finished", 1)


def test_a_start_is_judged_by_the_attempt_that_it_began_and_not_by_an_older_one(
    run: Callable[..., tuple[JobRecord, Nodes]], record: JobRecord
) -> None:
    catalog = Catalog(Storage(record.run_url))

    def begins_one_that_finishes() -> Any:
        attempt = catalog.attempts.begin(0.0, 0, None, {})
        catalog.attempts.write_progress(attempt.number, {"state": "finished", "step": 5})
        return [None, None], (None, 1)

    last, _ = run(begins_one_that_finishes)
    assert (last.state, last.restarts) == ("finished", 0)
    last, _ = run(CRASH, CRASH, CRASH)
    assert last.state == "failed"


def test_a_start_that_made_steps_without_saving_is_not_idle(
    run: Callable[..., tuple[JobRecord, Nodes]], record: JobRecord
) -> None:
    catalog = Catalog(Storage(record.run_url))

    def made_a_step() -> Any:
        attempt = catalog.attempts.begin(0.0, 0, None, {})
        catalog.attempts.write_progress(
            attempt.number, {"state": "training", "step": 5, "productive_seconds": 1.0}
        )
        return [{"outcome": "preempted", "reason": "SIGTERM"}, None], (75, 75)

    last, _ = run(made_a_step, made_a_step, made_a_step, ([FINISHED, None], (0, 0)))
    assert last.state == "finished"


def test_nodes_are_asked_to_stop_while_the_store_hangs(
    store: JobStore, record: JobRecord, submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered, order = threading.Event(), threading.Event(), []

    def never_in_time(job_id: str) -> bool:
        if asked.is_set():
            order.append("answered" if answered.wait(20.0) else "given up")
        return False

    def start() -> None:
        asked.set()
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()

    class Stopping(Nodes):
        def stop(self) -> None:
            order.append(f"stopped while {store.read(record.id).state}")
            super().stop()
            answered.set()

    monkeypatch.setattr(store, "is_cancelled", never_in_time)
    assert Supervisor(submission, store, record, Stopping(submission, start)).run().state == "preempted"
    assert order[0] == "stopped while starting"
    assert "given up" not in order


def test_how_a_job_ended_is_written_once_the_store_works_again(
    run: Callable[..., tuple[JobRecord, Nodes]], store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RETRY_PAUSE", 0.0)
    write, refused = store.write, 0

    def full(record: JobRecord, **changes: Any) -> JobRecord:
        nonlocal refused
        if record.state == "finished" and refused < 3:
            refused += 1
            raise StorageError("No space left on device")
        return write(record, **changes)

    monkeypatch.setattr(store, "write", full)
    last, _ = run(([FINISHED, None], (0, 0)))
    assert (last.state, refused) == ("finished", 3)
