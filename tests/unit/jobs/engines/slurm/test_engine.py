"""The engine `slurm` without a cluster: the script, the refusals, and what Slurm's state adds to a record.

tests/integration/test_slurm.py has the cluster.
"""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.engines.slurm import client, engine
from hf_cloudtrain.jobs.engines.slurm.client import SlurmJob
from hf_cloudtrain.jobs.engines.slurm.engine import SlurmEngine, script, status_of
from hf_cloudtrain.jobs.records import JobRecord, JobStore, Start
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import Submission
from tests.unit.jobs.engines.slurm._jobs import slurm_job, submission

GLUE = Path(__file__).resolve().parents[4] / "data" / "periflow_glue.yml"


def test_the_script_requests_the_machines_of_periflows_file_and_a_notice_to_itself() -> None:
    job = parse_job(GLUE.read_bytes())
    text = script(Submission(job, job.plan(), "mnli-1", "/runs/mnli", "/shared", Path("/shared/a b")))
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gres=gpu:v100:4",
        "#SBATCH --chdir='/shared/a b'",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@40",
    } <= set(lines)
    assert lines[-2] == "trap '' TERM USR1"
    assert lines[-1].endswith(" -m hf_cloudtrain.jobs.engines.slurm.batch_main '/shared/a b'")
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_the_options_of_the_slurm_block_go_to_sbatch_and_override_the_machine() -> None:
    text = script(
        submission(
            "vm: azure-16gb-v100-4g-eastus-spot\n"
            "slurm: {gres: 'gpu:a100:2', partition: spot, account: nlp, qos: low, time: '2:00:00', nproc_per_node: 2}"
        )
    )
    for option in (
        "gres=gpu:a100:2",
        "partition=spot",
        "account=nlp",
        "qos=low",
        "time=2:00:00",
        "ntasks-per-node=2",
    ):
        assert f"#SBATCH --{option}\n" in text
    assert "v100" not in text
    assert "gres" not in script(submission())


def test_a_dry_run_shows_script_commands_and_the_names_of_variables_without_values() -> None:
    shown = SlurmEngine().show(
        submission("num_devices: 2\nslurm: {nodes: 2}\nenv: {TOKEN: sesame, OTHER: sesame}")
    )
    assert script(submission("num_devices: 2\nslurm: {nodes: 2}")) in shown
    assert "sbatch --parsable --export=ALL /shared/jobs/toy-1/job.sbatch\n" in shown
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=0" in shown
    assert "TOKEN, OTHER" in shown
    assert "sesame" not in shown


def test_variables_that_override_the_script_or_belong_to_an_allocation_do_not_reach_sbatch() -> None:
    kept = {
        "PATH": "/bin",
        "SBATCH_RESERVATION": "mine",
        "SLURM_CONF": "/etc/slurm.conf",
        "SBATCH_QOS": "low",
    }
    dropped = {
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_SIGNAL": "TERM",
        "SBATCH_PARTITION": "other",
        "SLURM_JOB_ID": "5",
    }
    found = engine._clean({**kept, **dropped, "RANK": "3"}, submission("slurm: {partition: spot}"))
    assert found == kept


@pytest.mark.parametrize("limit", ["1", "1:40", "0-0:1:40", "00:01:40"])
def test_a_time_limit_shorter_than_the_notice_is_refused(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    with pytest.raises(ConfigurationError, match="asked to stop as it starts"):
        SlurmEngine().check(submission(f"slurm: {{time: '{limit}'}}"))
    SlurmEngine().check(submission("slurm: {time: '2:00'}"))
    SlurmEngine().check(submission("slurm: {time: '0'}"))  # no limit


def test_a_machine_without_slurm_and_a_home_that_slurm_would_misread_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigurationError, match="'sbatch' is not found"):
        SlurmEngine().check(submission())
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    for home in ("/shared/100%/toy-1", "shared/toy-1"):
        with pytest.raises(ConfigurationError, match="HF_CLOUDTRAIN_STORE"):
            SlurmEngine().check(submission(home=home))


@pytest.mark.parametrize(
    ("state", "job", "expected"),
    [
        ("queued", slurm_job(state="PENDING", reason="Resources"), ("queued", "Why. Slurm: Resources.")),
        ("running", slurm_job(state="PENDING", reason="BeginTime"), ("queued", "Slurm: BeginTime.")),
        ("queued", slurm_job(), ("starting", None)),
        ("running", slurm_job(), None),
        ("stopping", slurm_job(state="COMPLETING"), None),
        ("running", slurm_job(state="SUSPENDED"), ("running", "Slurm: SUSPENDED.")),
        ("queued", slurm_job(state="CANCELLED"), ("cancelled", "Slurm: CANCELLED")),
        ("running", slurm_job(state="PREEMPTED"), ("preempted", "Slurm: PREEMPTED")),
    ],
)
def test_slurms_state_adds_to_the_record_what_no_supervisor_could_write(
    state: str, job: SlurmJob, expected: tuple[str, str | None] | None, tmp_path: Path
) -> None:
    status = status_of(record(tmp_path, state=state, reason="Why."), job)
    assert (None if status is None else (status.state, status.reason)) == expected


def test_law_11_a_number_that_slurm_has_given_to_a_different_job_cancels_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = "JobId=7 JobName={} JobState={} Reason=None Restarts=0 ExitCode=0:0 StartTime=N/A EndTime=N/A TimeLimit=1"
    calls: list[tuple[str, ...]] = []
    for name, state in (("toy-1", "RUNNING"), ("other-1", "RUNNING"), ("other-1", "PENDING")):

        def call(*command: str, answer: str = shown.format(name, state)) -> str:
            calls.append(command)
            return answer

        monkeypatch.setattr(client, "call", call)
        monkeypatch.setattr(engine, "call", call)
        forged = record(tmp_path, state="running", handle={"job": "7"})
        SlurmEngine().cancel(forged, JobStore(str(tmp_path)))
        status = SlurmEngine().look(forged)
        assert (status is None) == (name == "toy-1")
        if status is not None:
            assert status.state == "lost"
            assert "no job 7 named 'toy-1' any more" in (status.reason or "")
    assert [command for command in calls if command[0] == "scancel"] == [
        ("scancel", "--batch", "--signal=USR1", "7")
    ]


def test_a_running_job_whose_name_an_administrator_changed_is_found_by_its_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A job that is `lost` may be resumed, and a second one would write to its run."""
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path))
    store, calls = JobStore(), list[tuple[str, ...]]()
    shown = "JobId=7 JobName=hold-for-maintenance JobState=RUNNING Reason=None Restarts=0 Command={}/job.sbatch Power=\n"
    # That of a different job, or of a different store, which a record could name as its home, is not accepted.
    for home in (
        tmp_path / "jobs" / "other-1",
        tmp_path / "of-a-colleague" / "jobs" / "toy-1",
        store.home("toy-1"),
    ):

        def call(*command: str, answer: str = shown.format(home)) -> str:
            calls.append(command)
            return answer

        monkeypatch.setattr(client, "call", call)
        monkeypatch.setattr(engine, "call", call)
        found = record(home, state="running", handle={"job": "7"})
        status = SlurmEngine().look(found)
        assert (status is None) == (home == store.home("toy-1"))
        SlurmEngine().cancel(found, store)
    assert [command for command in calls if command[0] == "scancel"] == [
        ("scancel", "--batch", "--signal=USR1", "7")
    ]


@pytest.mark.parametrize("number", ["--all", "7 8", "", "7_1", ["7"], -7, "\u0667"])
def test_law_11_a_number_that_is_not_one_does_not_reach_slurm(
    number: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(client, "call", lambda *command: pytest.fail(f"{command} was called"))
    monkeypatch.setattr(engine, "call", lambda *command: pytest.fail(f"{command} was called"))
    forged = record(tmp_path, state="running", handle={"job": number})
    with pytest.raises(ConfigurationError, match=r"is damaged\. Find the job with `squeue --name=toy-1`"):
        SlurmEngine().look(forged)
    with pytest.raises(ConfigurationError, match="is not the number of a Slurm job"):
        SlurmEngine().cancel(forged, JobStore(str(tmp_path)))


def test_a_job_that_fails_before_its_supervisor_writes_names_the_disk_or_the_last_line_of_the_log(
    tmp_path: Path,
) -> None:
    failed = slurm_job(state="FAILED", reason="JobLaunchFailure", exit_code="0:53")
    status = status_of(record(tmp_path, state="queued"), failed)
    assert status is not None
    assert status.state == "failed"
    assert "on a disk that all nodes share" in (status.reason or "")
    status = status_of(record(tmp_path, state="running", starts=(Start(1, 100.0),)), failed)
    assert status is not None
    assert "Its supervisor was killed." in (status.reason or "")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "supervisor.log").write_text("first\nNo module named 'hf_cloudtrain'\n")
    status = status_of(record(tmp_path, state="starting"), slurm_job(state="NODE_FAIL", exit_code="1:0"))
    assert status is not None
    assert status.reason == "Slurm: NODE_FAIL, exit code 1. No module named 'hf_cloudtrain'"


def record(home: Path, **changes: object) -> JobRecord:
    found = JobRecord("toy-1", "toy", "slurm", "/runs/toy", str(home), 1, 1, 0, 0.0)
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]
