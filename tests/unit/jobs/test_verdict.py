"""What happens to a job after a start is decided from the files of its nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.jobs.verdict import Verdict, judge
from tests.unit.jobs.test_supervisor import FINISHED, PREEMPTED, leave

FILE = b"name: mnli\nmax_restarts: 2\njob_setting: {docker: {command: torchrun train.py}}\nlocal: {nodes: 2, nproc_per_node: 1}"


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    store = JobStore(str(tmp_path / "store"))
    record = store.create("mnli", engine="local", nodes=2, nproc_per_node=1, max_restarts=2)
    job = parse_job(FILE)
    return Submission(job, job.plan(), record.id, record.run_url, store.url, Path(record.home))


@pytest.mark.parametrize(
    ("ends", "codes", "stopped_by", "state", "outcome", "part"),
    [
        ([FINISHED, None], (1, 0), None, "finished", "finished", "then the command ended with exit code 1"),
        ([FINISHED, None], (75, 75), "cancelled", "finished", "finished", "exit code 75"),
        ([None, None], (0, 0), None, "failed", "failed", "trained nothing"),
        ([None, None], (75, 75), "cancelled", "cancelled", "preempted", "Nothing was saved."),
        (
            [{"outcome": "overtaken", "reason": "attempt 3"}, None],
            (1, 1),
            None,
            "failed",
            "overtaken",
            "attempt 3",
        ),
        ([{"outcome": "stopped", "step": 5}, None], (0, 0), None, "finished", "stopped", "step 5"),
        (
            [{"outcome": "preempted", "reason": "`cloudtrain run stop` for attempt 1"}, None],
            (75, 75),
            None,
            "cancelled",
            "preempted",
            "`cloudtrain run stop` for attempt 1",
        ),
        ([PREEMPTED, None], (75, 1), None, None, "preempted", "SIGTERM"),
        ([None, None], (None, 1), None, None, "failed", "Node 0 was lost."),
        ([None, None], (None, 0), None, None, "failed", "Node 0 was lost."),
        ([None, None], (1, 75), None, None, "failed", "node 0 ended with exit code 1"),
        ([None, None], (137, 75), None, None, "failed", "exit code 137 (SIGKILL)."),
        ([None, {"outcome": "failed", "reason": "CUDA"}], (75, 1), None, None, "failed", "exit code 1: CUDA"),
    ],
)
def test_how_a_start_ended_is_read_from_the_files_of_its_nodes(
    submission: Submission,
    ends: list[Any],
    codes: tuple[int | None, ...],
    stopped_by: str | None,
    state: str | None,
    outcome: str,
    part: str,
) -> None:
    for rank in (0, 1):
        leave(submission, 1, rank, ends[rank], codes[rank])
    verdict = judge(submission, 1, codes, stopped_by)
    assert (verdict.state, verdict.outcome) == (state, outcome)
    assert part in (verdict.reason or "")


def test_a_node_that_could_not_start_its_command_names_the_reason(submission: Submission) -> None:
    leave(submission, 1, 0, None, None)
    submission.node_file(1, 1).parent.mkdir(parents=True)
    submission.node_file(1, 1).write_text('{"exit_code": null, "problem": "No such dataset"}')
    assert judge(submission, 1, (1, 1), None) == Verdict(None, "failed", "No such dataset", is_crash=True)


def test_a_signal_that_ended_a_command_is_named(submission: Submission) -> None:
    leave(submission, 1, 0, None, -9)
    assert "SIGKILL" in (judge(submission, 1, (1, 75), None).reason or "")


def test_the_last_lines_of_the_log_add_advice(submission: Submission) -> None:
    leave(submission, 1, 0, None, 1)
    submission.log.mkdir()
    submission.node_log(0).write_text("… EADDRINUSE: address already in use\n")
    assert "A port is in use. Let the command use MASTER_PORT" in (
        judge(submission, 1, (1, 75), None).reason or ""
    )


@pytest.mark.parametrize(
    ("end", "progress", "state"),
    [
        (None, None, "failed"),
        ({"outcome": "failed"}, None, None),
        (None, "training", None),
        ({"served": True}, None, None),
    ],
)
def test_a_command_that_was_not_found_is_not_started_again_unless_training_or_serving_began(
    submission: Submission, end: dict[str, Any] | None, progress: str | None, state: str | None
) -> None:
    leave(submission, 1, 0, end, 127)
    submission.log.mkdir()
    submission.node_log(0).write_text("--- start 1 ---\nbash: line 4: trian: command not found\n")
    verdict = judge(submission, 1, (1, 75), None, progress=progress)
    assert verdict.state == state
    assert ("'trian' was not found" in (verdict.reason or "")) == (state is not None)


@pytest.mark.parametrize(
    ("progress", "state"), [("finished", "finished"), ("overtaken", "failed"), ("training", None)]
)
def test_the_progress_that_a_lost_node_wrote_to_storage_counts(
    submission: Submission, progress: str, state: str | None
) -> None:
    assert judge(submission, 1, (None, 1), None, progress=progress).state == state


def test_a_problem_that_a_restart_cannot_solve_is_not_retried(submission: Submission) -> None:
    leave(submission, 1, 0, None, None)
    record = {"exit_code": None, "problem": "No such dataset", "hopeless": True}
    submission.node_file(0, 1).write_text(json.dumps(record))
    assert judge(submission, 1, (1, 75), None) == Verdict("failed", "failed", "No such dataset")
