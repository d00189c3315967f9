"""The gang of a job: a failed node stops the others, and what outlives the grace is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_cloudtrain.jobs import gang as module
from hf_cloudtrain.jobs.gang import ExitCodes, Gang
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import Submission

FILE = (
    b"name: toy\nenv: {HF_CLOUDTRAIN_GRACE: '20'}\njob_setting: {docker: {command: true}}\nlocal: {nodes: 2}"
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Recording(Gang):
    def __init__(self, submission: Submission) -> None:
        super().__init__(submission)
        self.calls: list[str] = []
        self.codes: dict[int, int | None] = {}

    def kill(self) -> None:
        self.calls.append("kill")

    def _start_nodes(self) -> None:
        self.calls.append(f"start {self.number}")

    def _exit_codes(self) -> ExitCodes | None:
        return (self.codes[0], self.codes[1]) if len(self.codes) == 2 else None

    def _has_failed(self) -> bool:
        return any(code != 0 for code in self.codes.values())

    def _ask_to_stop(self) -> None:
        self.calls.append("ask")

    def _remind(self) -> None:
        self.calls.append("remind")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def gang(clock: Clock, tmp_path: Path) -> Recording:
    job = parse_job(FILE)
    submission = Submission(job, job.plan(), "toy-1", str(tmp_path / "run"), str(tmp_path), tmp_path / "home")
    gang = Recording(submission)
    gang.start(1)
    return gang


def test_nodes_that_run_or_have_finished_are_left_alone(gang: Recording, clock: Clock) -> None:
    gang.codes = {0: 0}
    clock.now += 1000
    assert gang.poll() is None
    assert gang.calls == ["start 1"]


def test_exit_codes_are_given_once_all_nodes_have_ended(gang: Recording) -> None:
    gang.codes = {0: 0, 1: None}
    assert gang.poll() == (0, None)
    assert gang.calls == ["start 1"]


@pytest.mark.parametrize("code", [1, 75, None])
def test_a_node_that_fails_stops_the_others_once(gang: Recording, code: int | None) -> None:
    gang.codes = {1: code}
    assert gang.poll() is None
    assert gang.poll() is None
    gang.stop()
    assert gang.calls == ["start 1", "ask", "remind"]


def test_nodes_that_outlive_the_grace_and_two_margins_are_killed_at_each_poll(
    gang: Recording, clock: Clock
) -> None:
    gang.stop()
    clock.now += 20 + 2 * module.MARGIN
    gang.poll()
    clock.now += 0.1
    gang.poll()
    gang.poll()
    assert gang.calls == ["start 1", "ask", "remind", "kill", "kill"]


def test_a_new_start_forgets_that_the_old_one_was_stopped(gang: Recording, clock: Clock) -> None:
    gang.stop()
    gang.start(2)
    clock.now += 1000
    gang.poll()
    gang.stop()
    assert gang.calls == ["start 1", "ask", "start 2", "ask"]
