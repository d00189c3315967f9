"""What becomes of a Slurm job after a start of its nodes, without a cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.engines.slurm import batch_main
from hf_cloudtrain.jobs.engines.slurm.batch_main import SlurmWatch
from hf_cloudtrain.jobs.engines.slurm.client import SlurmError, SlurmJob, SlurmSilentError
from hf_cloudtrain.jobs.records import JobRecord, JobStore, Start
from hf_cloudtrain.jobs.verdict import Verdict
from tests.unit.jobs.engines.slurm._jobs import slurm_job, submission

SAVED = Verdict(None, "preempted", "Saved and stopped by SIGTERM.")
ASKED = Verdict("preempted", "preempted", "Stopped by SIGUSR1.")
CRASH = Verdict(None, "failed", "The command of node 0 ended with exit code 1.", is_crash=True)
FINISHED = Verdict("finished", "finished", None)
LONG = slurm_job(ended=4e9, limit=None)
ENDING = {"state": "COMPLETING", "ended": 500.0}


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SlurmWatch]:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path))
    store = JobStore()

    def make(job: SlurmJob | None, codes: tuple[int | None, ...]) -> SlurmWatch:
        made = lifecycle.prepare(submission().job, store)
        created = store.create("toy", engine="slurm", nodes=1, nproc_per_node=1, max_restarts=3)
        made = dataclasses.replace(made, id=created.id, home=Path(created.home))
        watching = SlurmWatch(made, store, "7", 0)
        watching._gang.codes = codes

        def known(number: str) -> SlurmJob | None:
            if job is None:
                raise SlurmSilentError("Slurm does not answer")
            return job

        monkeypatch.setattr(watching._client, "job", known)
        return watching

    return make


def queued(watching: SlurmWatch) -> JobRecord:
    record = watching._store.read(watching._submission.id)
    return watching._store.write(record, state="queued", reason="Preempted in Slurm.")


@pytest.mark.parametrize(
    ("verdict", "job", "codes", "state", "reason"),
    [
        (FINISHED, slurm_job(**ENDING), (0,), "finished", None),
        (ASKED, LONG, (75,), "queued", "Asked to stop."),
        (ASKED, slurm_job(), (75,), "queued", "Time limit."),
        (ASKED, slurm_job(preempted=150.0), (75,), "queued", "Preempted in Slurm."),
        (SAVED, slurm_job(preempted=150.0), (75,), "queued", "Preempted in Slurm."),
        (SAVED, LONG, (75,), "queued", "Asked to stop."),
        (SAVED, slurm_job(**ENDING, preempted=150.0), (75,), "queued", "Preempted in Slurm."),
        (CRASH, slurm_job(preempted=150.0), (None,), "queued", "Preempted in Slurm."),
        (SAVED, slurm_job(**ENDING), (75,), "cancelled", "Cancelled in Slurm (scancel)."),
        (CRASH, slurm_job(**ENDING), (None,), "cancelled", "Cancelled in Slurm (scancel)."),
        (ASKED, slurm_job(**ENDING, restarts=1), (75,), "queued", "Queued again in Slurm."),
        (CRASH, slurm_job(**ENDING, restarts=1), (None,), "queued", "Queued again in Slurm."),
        (ASKED, slurm_job(state="COMPLETING"), (75,), "queued", "Time limit."),
        (CRASH, slurm_job(), (None,), None, "The command of node 0"),
        (SAVED, slurm_job(), (75, None), None, "Saved and stopped"),
        (ASKED, None, (75,), "queued", "Asked to stop."),
        (CRASH, None, (None,), None, "The command of node 0"),
    ],
)
def test_a_preempted_job_is_queued_again_and_a_cancelled_or_crashed_one_is_not(
    watch: Callable[..., SlurmWatch],
    verdict: Verdict,
    job: SlurmJob | None,
    codes: tuple[int | None, ...],
    state: str | None,
    reason: str | None,
) -> None:
    found = watch(job, codes)._review(verdict)
    assert found.state == state
    assert (found.reason or "").startswith(reason or "")


def test_a_node_that_writes_nothing_has_crashed_and_the_reason_names_the_disk(
    watch: Callable[..., SlurmWatch],
) -> None:
    found = watch(slurm_job(), (0, 127))._review(CRASH)
    assert (found.state, found.is_crash) == (None, True)
    assert (found.reason or "").startswith("Node 1 ended with exit code 127 before it did anything.")
    assert "on disks that all nodes share" in (found.reason or "")
    silent = watch(slurm_job(), (None, None))
    silent._gang.launch_failure = "srun: error: task 1 launch failed: Slurmd could not connect IO"
    found = silent._review(SAVED)  # the other node was asked to stop because of it
    assert (found.state, found.is_crash) == (None, True)
    assert "launch failed" in (found.reason or "")


def test_a_time_limit_that_leaves_no_time_to_train_fails_the_job(
    watch: Callable[..., SlurmWatch],
) -> None:
    short = slurm_job(ended=160.0, limit=60.0)
    watching = watch(short, ())
    found = watching._review(ASKED)
    assert found.state == "failed"
    assert "too short" in (found.reason or "")
    exit_file = watching._submission.exit_file(0, watching._gang.number)
    exit_file.parent.mkdir(parents=True)
    exit_file.write_text('{"outcome": "preempted", "saved": "000001-0000000003"}')
    assert watching._review(ASKED).state == "queued"  # a short limit with progress is allowed
    assert watch(slurm_job(), ())._review(ASKED).state == "queued"


def test_a_requeue_that_slurm_refuses_leaves_a_job_that_can_be_resumed(
    watch: Callable[..., SlurmWatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*command: str) -> str:
        raise SlurmError("Requested operation is presently disabled")

    monkeypatch.setattr(batch_main, "call", refuse)
    watching = watch(LONG, (75,))
    found = watching._requeue(queued(watching))
    assert found.state == "preempted"
    assert "presently disabled" in (found.reason or "")
    assert f"cloudtrain job run --resume {found.id}" in (found.reason or "")
    already = watch(dataclasses.replace(LONG, restarts=1), (75,))  # by an administrator, at the same moment
    assert already._requeue(queued(already)).state == "queued"


def test_a_saved_job_that_a_silent_slurm_does_not_queue_again_can_be_resumed(
    watch: Callable[..., SlurmWatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*command: str) -> str:
        raise SlurmSilentError("Slurm does not answer.")

    monkeypatch.setattr(batch_main, "call", silent)
    watching = watch(None, (75,))
    ended = watching._requeue(queued(watching))
    assert (ended.state, watching._store.read("toy").state) == ("preempted", "preempted")
    assert "Slurm does not answer" in (ended.reason or "")
    assert "cloudtrain job run --resume toy-1" in (ended.reason or "")


def test_a_job_that_is_cancelled_just_before_its_requeue_is_not_queued_again(
    watch: Callable[..., SlurmWatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(batch_main, "call", lambda *command: called.append(command))
    watching = watch(LONG, (75,))
    watching._store.ask_to_cancel(watching._submission.id)
    assert watching._requeue(queued(watching)).state == "cancelled"
    assert called == [("scancel", "7")]


def test_a_finished_job_that_an_administrator_queues_again_starts_nothing(
    watch: Callable[..., SlurmWatch],
) -> None:
    watching = watch(LONG, ())
    watching._store.write(queued(watching), state="finished")
    assert watching.run() == 0
    assert watching._store.read("toy").state == "finished"


def test_a_start_that_slurm_killed_is_closed_by_the_next_one(
    watch: Callable[..., SlurmWatch],
) -> None:
    watching = watch(LONG, ())
    closed = watching._closed(Start(1, 100.0))
    assert (closed.outcome, closed.reason, closed.exit_codes) == (
        "failed",
        "Slurm took its nodes away.",
        (None,),
    )
    exit_file = watching._submission.exit_file(0, 2)
    exit_file.parent.mkdir(parents=True)
    exit_file.write_text('{"outcome": "preempted", "reason": "SIGTERM", "saved": "000001-0000000003"}')
    closed = watching._closed(Start(2, 100.0))
    assert (closed.outcome, closed.reason) == ("preempted", "Saved and stopped by SIGTERM.")
