"""The engine `slurm` without a cluster: what it writes, reads and decides. tests/integration/test_slurm.py has the cluster."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.engines.slurm import batch_main, engine
from hf_cloudtrain.jobs.engines.slurm import client as slurm_client
from hf_cloudtrain.jobs.engines.slurm import gang as slurm_gang
from hf_cloudtrain.jobs.engines.slurm.batch_main import SlurmWatch
from hf_cloudtrain.jobs.engines.slurm.client import (
    SlurmError,
    SlurmJob,
    SlurmSilentError,
    call,
    minutes,
    parse_job,
)
from hf_cloudtrain.jobs.engines.slurm.engine import SlurmEngine, script, seen
from hf_cloudtrain.jobs.engines.slurm.gang import SlurmGang, bad_ends, srun
from hf_cloudtrain.jobs.records import JobRecord, JobStore, Start
from hf_cloudtrain.jobs.spec.job_file import parse_job as parse_job_file
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.jobs.supervisor import Verdict

GLUE = Path(__file__).resolve().parents[4] / "data" / "periflow_glue.yml"
# What 22.05.8 said, shortened.
SHOWN = (
    "JobId=7 JobName=mnli-1 UserId=root(0) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 "
    "ExitCode=0:0 RunTime=00:00:12 TimeLimit=1-00:30:00 TimeMin=N/A StartTime=2026-11-20T05:01:37 EndTime=2026-11-20T06:00:00 "
    "PreemptTime=2026-11-20T05:02:00 CPUs/Task=1 ReqB:S:C:T=0:0:*:* WorkDir=/home/a b/jobs Power=\n"
)


def submission(more: str = "", home: str = "/shared/jobs/toy-1") -> Submission:
    job = parse_job_file(
        f"name: toy\nengine: slurm\njob_setting: {{docker: {{command: torchrun train.py}}}}\n{more}".encode()
    )
    return Submission(job, job.plan(), "toy-1", "/runs/toy", "/shared", Path(home))


def slurm_job(**changes: object) -> SlurmJob:
    job = SlurmJob("RUNNING", "None", 0, "0:0", began=100.0, ended=1900.0, limit=1800.0, preempted=None)
    return dataclasses.replace(job, **changes)  # type: ignore[arg-type]


# --- What is written ---------------------------------------------------------------------------------------------------


def test_the_script_asks_for_the_machines_of_periflows_file_and_for_a_notice_to_itself() -> None:
    job = parse_job_file(GLUE.read_bytes())
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


def test_the_options_of_the_block_are_sbatchs_and_beat_the_machine() -> None:
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


def test_a_dry_run_shows_script_and_commands_and_of_variables_the_names() -> None:
    told = SlurmEngine().show(
        submission("num_devices: 2\nslurm: {nodes: 2}\nenv: {TOKEN: sesame, OTHER: sesame}")
    )
    assert script(submission("num_devices: 2\nslurm: {nodes: 2}")) in told
    assert "sbatch --parsable --export=ALL /shared/jobs/toy-1/job.sbatch\n" in told
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=0" in told
    assert "TOKEN, OTHER" in told
    assert "sesame" not in told


def test_the_shells_variables_neither_override_the_script_nor_bring_another_allocation_along() -> None:
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
def test_a_time_limit_within_which_the_notice_may_come_at_the_start_is_refused(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    with pytest.raises(ConfigurationError, match="told to stop as it starts"):
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
def test_time_limits_are_read_as_sbatch_reads_them(text: str, expected: float) -> None:
    assert minutes(text) == expected


def test_starts_and_jobs_have_ports_of_their_own_below_those_that_linux_hands_out() -> None:
    ports = {slurm_gang.master_port(str(job), start) for job in range(50) for start in range(1, 50)}
    assert len(ports) == 50 * 49
    assert all(1024 < port < 32768 for port in ports)


# --- What is read ------------------------------------------------------------------------------------------------------


def test_a_job_is_read_from_one_line_of_scontrol() -> None:
    job = parse_job(SHOWN)
    assert job is not None
    assert (job.state, job.reason, job.restarts, job.exit_code, job.limit) == (
        "RUNNING",
        "None",
        2,
        "0:0",
        88200.0,
    )
    assert job.was_preempted
    assert not job.is_out_of_time
    assert parse_job("No jobs in the system\n") is None


def test_a_job_is_out_of_time_where_it_ended_at_its_limit() -> None:
    assert slurm_job(state="COMPLETING").is_out_of_time
    later = time.time() + 900
    assert not slurm_job(began=later - 1800, ended=later).is_out_of_time  # it has to end then, and runs
    assert not slurm_job(state="COMPLETING", ended=500.0).is_out_of_time
    assert not slurm_job(state="COMPLETING", limit=None).is_out_of_time


def test_a_preemption_of_an_earlier_start_is_none() -> None:
    assert slurm_job(preempted=150.0).was_preempted
    assert not slurm_job(preempted=50.0).was_preempted


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("srun: error: n1: task 0: Exited with exit code 75", {0: 75}),
        ("srun: error: n[1-3]: tasks 0-1,5: Exited with exit code 1", {0: 1, 1: 1, 5: 1}),
        ("srun: error: n2: task 1: Killed", {1: None}),
        ("srun: error: n2: task 1: Segmentation fault (core dumped)", {1: None}),
        ("srun: launch/slurm: _task_finish: Received task exit notification", {}),
        ("Traceback: task 3: Exited with exit code 1", {}),
    ],
)
def test_the_ends_of_nodes_are_read_from_what_srun_says(line: str, expected: dict[int, int | None]) -> None:
    assert bad_ends(line) == expected


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
def test_slurms_state_adds_to_the_record_what_no_supervisor_could_say(
    state: str, job: SlurmJob, expected: tuple[str, str | None] | None, tmp_path: Path
) -> None:
    found = seen(record(tmp_path, state=state, reason="Why."), job)
    assert (None if found is None else (found.state, found.reason)) == expected


def test_a_job_that_fails_before_its_supervisor_speaks_names_the_disk_and_else_its_last_line(
    tmp_path: Path,
) -> None:
    failed = slurm_job(state="FAILED", reason="JobLaunchFailure", exit_code="0:53")
    found = seen(record(tmp_path, state="queued"), failed)
    assert found is not None
    assert found.state == "failed"
    assert "on a disk that all nodes share" in (found.reason or "")
    found = seen(record(tmp_path, state="running", starts=(Start(1, 100.0),)), failed)
    assert found is not None
    assert "Its supervisor was killed." in (found.reason or "")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "supervisor.log").write_text("first\nNo module named 'hf_cloudtrain'\n")
    found = seen(record(tmp_path, state="starting"), slurm_job(state="NODE_FAIL", exit_code="1:0"))
    assert found is not None
    assert found.reason == "Slurm: NODE_FAIL, exit code 1. No module named 'hf_cloudtrain'"


def record(home: Path, **changes: object) -> JobRecord:
    found = JobRecord("toy-1", "toy", "slurm", "/runs/toy", str(home), 1, 1, 0, 0.0)
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


# --- Slurm's commands --------------------------------------------------------------------------------------------------


def answering(
    monkeypatch: pytest.MonkeyPatch, stderr: str, code: int = 1, stdout: str = ""
) -> list[list[str]]:
    called: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        called.append(list(command))
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    monkeypatch.setattr(slurm_client.subprocess, "run", run)
    return called


def test_a_controller_that_is_down_is_not_asked_again_for_each_job(monkeypatch: pytest.MonkeyPatch) -> None:
    called = answering(
        monkeypatch, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
    )
    client = slurm_client.SlurmClient()
    for _ in range(3):
        with pytest.raises(SlurmSilentError, match="Slurm does not answer"):
            client.job("7")
    assert len(called) == 1


def test_a_job_that_slurm_has_forgotten_is_none_and_other_errors_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = slurm_client.SlurmClient()
    answering(monkeypatch, "slurm_load_jobs error: Invalid job id specified\n")
    assert client.job("7") is None
    answering(monkeypatch, "scontrol: error: Access/permission denied\n")
    with pytest.raises(SlurmError, match="permission denied"):
        client.job("7")


def test_variables_that_filter_what_the_commands_say_do_not_reach_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    assert call("env").count("SQUEUE_STATES") == 0
    assert "SLURM_TIME_FORMAT" not in call("env")
    assert "SLURM_CONF=/etc/slurm.conf" in call("env")


# --- What becomes of a job ---------------------------------------------------------------------------------------------


SAVED = Verdict(None, "preempted", "Saved and stopped by SIGTERM.")
TOLD = Verdict("preempted", "preempted", "Stopped by SIGUSR1.")
CRASH = Verdict(None, "failed", "The command of node 0 ended with exit code 1.", is_crash=True)
FINISHED = Verdict("finished", "finished", None)
LONG = slurm_job(ended=4e9, limit=None)
ENDING = {"state": "COMPLETING", "ended": 500.0}


@pytest.mark.parametrize(
    ("verdict", "job", "codes", "state", "reason"),
    [
        (FINISHED, slurm_job(**ENDING), (0,), "finished", None),
        (TOLD, LONG, (75,), "queued", "Told to stop."),
        (TOLD, slurm_job(), (75,), "queued", "Time limit."),
        (TOLD, slurm_job(preempted=150.0), (75,), "queued", "Preempted in Slurm."),
        (SAVED, slurm_job(preempted=150.0), (75,), "queued", "Preempted in Slurm."),
        (SAVED, LONG, (75,), "queued", "Told to stop."),
        (SAVED, slurm_job(**ENDING, preempted=150.0), (75,), "queued", "Preempted in Slurm."),
        (CRASH, slurm_job(preempted=150.0), (None,), "queued", "Preempted in Slurm."),
        (SAVED, slurm_job(**ENDING), (75,), "cancelled", "Cancelled in Slurm (scancel)."),
        (CRASH, slurm_job(**ENDING), (None,), "cancelled", "Cancelled in Slurm (scancel)."),
        (TOLD, slurm_job(**ENDING, restarts=1), (75,), "queued", "Queued again in Slurm."),
        (CRASH, slurm_job(**ENDING, restarts=1), (None,), "queued", "Queued again in Slurm."),
        (TOLD, slurm_job(state="COMPLETING"), (75,), "queued", "Time limit."),
        (CRASH, slurm_job(), (None,), None, "The command of node 0"),
        (SAVED, slurm_job(), (75, None), None, "Saved and stopped"),
        (TOLD, None, (75,), "queued", "Told to stop."),
        (CRASH, None, (None,), None, "The command of node 0"),
    ],
)
def test_who_has_to_give_way_is_queued_again_and_who_is_cancelled_or_crashes_is_not(
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


def test_a_node_that_says_nothing_is_a_crash_whose_reason_names_the_disk(
    watch: Callable[..., SlurmWatch],
) -> None:
    found = watch(slurm_job(), (0, 127))._review(CRASH)
    assert (found.state, found.is_crash) == (None, True)
    assert (found.reason or "").startswith("Node 1 ended with exit code 127 before it did anything.")
    assert "on disks that all nodes share" in (found.reason or "")
    silent = watch(slurm_job(), (None, None))
    silent._gang.launch_failure = "srun: error: task 1 launch failed: Slurmd could not connect IO"
    found = silent._review(SAVED)  # the other node was told to stop for its sake
    assert (found.state, found.is_crash) == (None, True)
    assert "launch failed" in (found.reason or "")


def test_a_time_limit_that_leaves_no_time_to_begin_is_said_and_not_tried_for_ever(
    watch: Callable[..., SlurmWatch],
) -> None:
    short = slurm_job(ended=160.0, limit=60.0)
    watching = watch(short, ())
    found = watching._review(TOLD)
    assert found.state == "failed"
    assert "too short" in (found.reason or "")
    exit_file = watching._submission.exit_file(0, watching._gang.number)
    exit_file.parent.mkdir(parents=True)
    exit_file.write_text('{"outcome": "preempted", "saved": "000001-0000000003"}')
    assert watching._review(TOLD).state == "queued"  # a little at a time is no error
    assert watch(slurm_job(), ())._review(TOLD).state == "queued"


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


def test_a_start_that_slurm_ended_before_it_could_say_so_is_closed_by_the_next(
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


def queued(watching: SlurmWatch) -> JobRecord:
    record = watching._store.read(watching._submission.id)
    return watching._store.write(record, state="queued", reason="Preempted in Slurm.")


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


def test_a_gang_whose_srun_could_not_start_anything_has_lost_all_nodes() -> None:
    gang = SlurmGang(submission("num_devices: 2\nslurm: {nodes: 2}"), "7")
    assert gang._codes(1) == (None, None)
    assert gang._codes(0) == (0, 0)
    gang._ends = {1: 75}
    assert gang._codes(75) == (0, 75)
    gang.launch_failure = "srun: error: task 1 launch failed"
    assert gang._codes(0) == (None, None)


def test_srun_leaves_nodes_alone_that_save_while_another_has_ended() -> None:
    words = srun(submission(), "n1", 20_000, 3)
    assert "--kill-on-bad-exit=0" in words
    assert "--wait=0" in words
    assert words[-1].endswith(
        "-m hf_cloudtrain.jobs.node.node /shared/jobs/toy-1 --node-rank $SLURM_NODEID --master-addr n1 --master-port 20000 --start 3"
    )
