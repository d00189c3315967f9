"""Slurm's commands: how their output is read, and what happens when they fail."""

from __future__ import annotations

import subprocess
import time

import pytest

from hf_cloudtrain.jobs.engines.slurm import client
from hf_cloudtrain.jobs.engines.slurm.client import (
    SlurmClient,
    SlurmError,
    SlurmSilentError,
    call,
    parse_job,
    seconds,
)
from tests.unit.jobs.engines.slurm._jobs import slurm_job

# The output of 22.05.8, shortened.
SHOWN = (
    "JobId=7 JobName=mnli-1 UserId=root(0) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 "
    "ExitCode=0:0 RunTime=00:00:12 TimeLimit=1-00:30:00 TimeMin=N/A StartTime=2026-11-20T05:01:37 EndTime=2026-11-20T06:00:00 "
    "PreemptTime=2026-11-20T05:02:00 CPUs/Task=1 ReqB:S:C:T=0:0:*:* WorkDir=/home/a b/jobs Power=\n"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90.0),
        ("90:30", 90.5),
        ("1:30:00", 90.0),
        ("1-0", 1440.0),
        ("1-1:30", 1530.0),
        ("0-0:0:30", 0.5),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text: str, expected: float) -> None:
    assert seconds(text) == expected * 60


def test_a_job_is_read_from_one_line_of_scontrol() -> None:
    job = parse_job(SHOWN)
    assert job is not None
    assert (job.name, job.state, job.reason, job.restarts, job.exit_code, job.limit) == (
        "mnli-1",
        "RUNNING",
        "None",
        2,
        "0:0",
        88200.0,
    )
    assert job.was_preempted
    assert not job.is_out_of_time
    assert parse_job("No jobs in the system\n") is None


def test_a_job_that_ended_at_its_limit_is_out_of_time() -> None:
    assert slurm_job(state="COMPLETING").is_out_of_time
    later = time.time() + 900
    assert not slurm_job(began=later - 1800, ended=later).is_out_of_time  # it runs, and must end then
    assert not slurm_job(state="COMPLETING", ended=500.0).is_out_of_time
    assert not slurm_job(state="COMPLETING", limit=None).is_out_of_time


def test_a_preemption_of_an_earlier_start_does_not_count() -> None:
    assert slurm_job(preempted=150.0).was_preempted
    assert not slurm_job(preempted=50.0).was_preempted


def fake_commands(
    monkeypatch: pytest.MonkeyPatch, stderr: str, code: int = 1, stdout: str = ""
) -> list[list[str]]:
    called: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        called.append(list(command))
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    monkeypatch.setattr(client.subprocess, "run", run)
    return called


def test_a_controller_that_is_down_is_not_asked_again_for_each_job(monkeypatch: pytest.MonkeyPatch) -> None:
    called = fake_commands(
        monkeypatch, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
    )
    client = SlurmClient()
    for _ in range(3):
        with pytest.raises(SlurmSilentError, match="Slurm does not answer"):
            client.job("7")
    assert len(called) == 1


def test_a_forgotten_job_is_none_and_other_errors_are_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = SlurmClient()
    fake_commands(monkeypatch, "slurm_load_jobs error: Invalid job id specified\n")
    assert client.job("7") is None
    fake_commands(monkeypatch, "scontrol: error: Access/permission denied\n")
    with pytest.raises(SlurmError, match="permission denied"):
        client.job("7")


def test_variables_that_filter_the_output_of_the_commands_do_not_reach_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    assert call("env").count("SQUEUE_STATES") == 0
    assert "SLURM_TIME_FORMAT" not in call("env")
    assert "SLURM_CONF=/etc/slurm.conf" in call("env")
