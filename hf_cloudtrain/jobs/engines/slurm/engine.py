"""Slurm: a batch script of ours, whose supervisor starts the nodes and has itself queued again after a preemption.

What runs within the allocation is in slurm_watch.py and slurm_gang.py.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.engines.protocol import EngineStatus
from hf_cloudtrain.jobs.engines.slurm.batch_main import CANCEL, EARLY, notice
from hf_cloudtrain.jobs.engines.slurm.client import (
    SlurmClient,
    SlurmError,
    SlurmJob,
    SlurmSilentError,
    call,
    minutes,
)
from hf_cloudtrain.jobs.engines.slurm.gang import srun
from hf_cloudtrain.jobs.logs import follow_files, last_lines
from hf_cloudtrain.jobs.records import JobRecord, JobStore, State
from hf_cloudtrain.jobs.spec.node_plan import CONTRACT
from hf_cloudtrain.jobs.submission import Submission

logger = logging.getLogger(__name__)

SCRIPT = "job.sbatch"
LOOK = 5.0
"""Seconds between two questions to Slurm while logs are followed."""
PROGRAMS = ("sbatch", "srun", "scontrol", "squeue", "scancel")
KEPT = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
"""Of Slurm's variables, those that say which cluster. The others are of an allocation that we may be submitted from."""

CHOSEN = {"partition": "PARTITION", "account": "ACCOUNT", "qos": "QOS", "time": "TIMELIMIT", "gres": "GRES"}
"""Options of the job file, and sbatch's variables for them."""
DECIDED = (
    *("JOB_NAME", "OPEN_MODE", "OUTPUT", "ERROR", "INPUT", "REQUEUE", "NO_REQUEUE", "SIGNAL", "EXPORT"),
    *("GET_USER_ENV", "ARRAY_INX", "WAIT", "WAIT_ALL_NODES", "CLUSTERS", "NO_KILL"),
)
"""sbatch's variables for what is not the user's to say; all others count."""

WAITING: dict[str, State] = {
    "PENDING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "queued",
    "REQUEUE_FED": "queued",
    "SPECIAL_EXIT": "queued",
    "RESV_DEL_HOLD": "queued",
    "CONFIGURING": "starting",
}
ENDED: dict[str, State] = {"CANCELLED": "cancelled", "PREEMPTED": "preempted"}
"""Of a job whose supervisor could not say how it ended; every other end is a failure."""


class SlurmEngine:
    """A Slurm cluster. See `Engine`."""

    def __init__(self) -> None:
        self._client = SlurmClient()

    def check(self, submission: Submission) -> None:
        """Refuse what Slurm would take and could not do."""
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise ConfigurationError(
                f"{missing[0]!r} is not found. Submit on a machine of the Slurm cluster, such as its login node, or take "
                "another engine."
            )
        home = str(submission.home)
        if not submission.home.is_absolute():
            raise ConfigurationError(
                f"{home!r} is relative, and a job runs in another folder. Set HF_CLOUDTRAIN_STORE to an absolute path."
            )
        if "%" in home or not home.isprintable():
            raise ConfigurationError(
                f"{home!r} has a character with a meaning in Slurm's file names. Set HF_CLOUDTRAIN_STORE to another folder."
            )
        limit, seconds = submission.job.slurm.time, notice(submission)
        if limit is not None and 0 < minutes(limit) * 60 <= seconds + EARLY:
            raise ConfigurationError(
                f"'slurm.time' is {limit!r}, and the notice comes {seconds} s before its end and up to {EARLY} s early, so the "
                f"job would be told to stop as it starts. Take more than {math.ceil((seconds + EARLY) / 60)} minutes, or a "
                "shorter HF_CLOUDTRAIN_GRACE."
            )

    def show(self, submission: Submission) -> str:
        """The batch script, the command that submits it, and the one that starts the nodes from within."""
        names = ", ".join(submission.plan.variables)
        variables = f"# in the environment of sbatch, which hands it on: {names}\n" if names else ""
        nodes = shlex.join(srun(submission, "ADDRESS", 0, 1)).replace(
            "--master-port 0 ", "--master-port PORT "
        )
        return (
            f"# {submission.home / SCRIPT}\n{script(submission)}\n"
            f"{variables}{shlex.join(_sbatch(submission))}\n\n"
            f"# within the allocation, for each start\n{nodes}\n"
        )

    def submit(self, submission: Submission, store: JobStore, record: JobRecord) -> JobRecord:
        """Queue it."""
        submission.log.mkdir(parents=True, exist_ok=True)
        (submission.home / SCRIPT).write_text(script(submission))
        environment = {**_clean(os.environ, submission), **submission.plan.own_variables(os.environ)}
        try:
            said = call(*_sbatch(submission), environment=environment)
        except SlurmSilentError as error:
            raise ConfigurationError(f"{error} Nothing was submitted.") from None
        except SlurmError as error:
            raise ConfigurationError(f"Slurm does not take the job. {error}") from None
        number = said.strip().partition(";")[0]
        now = store.read(record.id)
        # It may run already, and then its supervisor writes the record.
        return now if now.handle.get("job") == number else store.write(now, handle={"job": number})

    def look(self, record: JobRecord) -> EngineStatus | None:
        """What Slurm says where the supervisor cannot: before it runs, and after it was ended."""
        number = record.handle.get("job")
        if record.is_over or number is None:
            return None
        job = self._client.job(str(number))
        if job is None:
            return EngineStatus(
                "lost",
                f"Slurm knows no job {number} any more, and nothing says how it ended. `cloudtrain job run --resume "
                f"{record.id}` goes on.",
            )
        return seen(record, job)

    def cancel(self, record: JobRecord, store: JobStore) -> None:
        """Take it out of the queue; one that runs is told to save, and its supervisor insists."""
        number = record.handle.get("job")
        if number is None:
            return
        try:
            job = self._client.job(str(number))
            if job is not None and job.state != "RUNNING":
                call("scancel", "--state=PENDING", str(number))  # also one that is about to be queued again
                job = self._client.job(str(number))
            if job is not None and job.state == "CANCELLED":
                store.write(store.read(record.id), state="cancelled", reason=f"{CANCEL}, while it was queued")
            elif job is not None and job.state == "RUNNING":
                call("scancel", "--batch", "--signal=USR1", str(number))
        except SlurmSilentError as error:
            # The supervisor looks at the mark by itself.
            logger.warning(
                "%s The job ends where it runs, and where it is queued as soon as it starts.", error
            )
        except SlurmError as error:
            logger.info("%s", error)  # it has ended in between

    def lines(self, record: JobRecord, node_rank: int | None, follow: bool) -> Iterator[str]:
        """From the nodes' files."""
        submission = Submission.load_here(record.home)
        ranks = range(record.nodes) if node_rank is None else [node_rank]
        files = {f"node {rank}": submission.node_log(rank) for rank in ranks}
        return follow_files(files, follow, _IsOver(self, JobStore(submission.store), record.id))


class _IsOver:
    """Whether a job is over; Slurm itself is asked now and then."""

    def __init__(self, engine: SlurmEngine, store: JobStore, job_id: str) -> None:
        self._engine, self._store, self._id = engine, store, job_id
        self._asked = time.monotonic()

    def __call__(self) -> bool:
        record = self._store.read(self._id)
        if record.is_over or time.monotonic() < self._asked + LOOK:
            return record.is_over
        self._asked = time.monotonic()
        try:
            found = self._engine.look(record)
        except SlurmError:
            return False
        return found is not None and dataclasses.replace(record, state=found.state).is_over


def seen(record: JobRecord, job: SlurmJob) -> EngineStatus | None:
    """What a job's state in Slurm adds to its record; None where the record says all."""
    if job.state in WAITING:
        before = record.reason if record.state == "queued" else None  # why it is queued again
        words = [before, f"Slurm: {job.reason}." if job.reason != "None" else None]
        return EngineStatus(WAITING[job.state], " ".join(filter(None, words)) or None)
    if job.state == "RUNNING":
        return EngineStatus("starting") if record.state == "queued" else None
    if job.state in ("SUSPENDED", "STOPPED"):
        return EngineStatus(record.state, f"Slurm: {job.state}.")
    if job.state in ("COMPLETING", "SIGNALING", "STAGE_OUT"):
        return None
    reason = f"Slurm: {job.state}" + (f", {job.reason}" if job.reason != "None" else "")
    if job.state not in ENDED:
        reason += f", exit code {job.exit_code.partition(':')[0]}. {_last_words(record)}"
    return EngineStatus(ENDED.get(job.state, "failed"), reason)


def _last_words(record: JobRecord) -> str:
    """Why a supervisor ended that could not write it into the record."""
    last = last_lines(Path(record.home, "log", "supervisor.log"), 1)
    if last:
        return last[0]
    if record.starts:
        return f"Its supervisor was killed. `cloudtrain job run --resume {record.id}` goes on."
    return f"It said nothing in {record.home!r}: is that on a disk that all nodes share? HF_CLOUDTRAIN_STORE names another."


def script(submission: Submission) -> str:
    """The batch script."""
    options = "\n".join(f"#SBATCH --{name}{_assigned(value)}" for name, value in _options(submission).items())
    return f"""\
#!/bin/bash
{options}

# What comes before the supervisor listens must not end it: it looks for itself.
trap '' TERM USR1
exec {shlex.join([sys.executable, "-m", "hf_cloudtrain.jobs.engines.slurm.batch_main", str(submission.home)])}
"""


def _options(submission: Submission) -> dict[str, str | None]:
    job, plan = submission.job, submission.plan
    block, machine = job.slurm, job.machine
    gres = block.gres or (None if machine is None else f"gpu:{machine.gpu}:{machine.gpus}")
    chosen = {option: getattr(block, option) for option in CHOSEN} | {"gres": gres}
    return {
        "job-name": submission.id,
        "nodes": str(plan.nodes),
        # A CPU a process, at least. Slurm's own variables ask for more: SBATCH_CPUS_PER_GPU, SBATCH_EXCLUSIVE.
        "ntasks-per-node": str(plan.nproc_per_node),
        **{name: value for name, value in chosen.items() if value is not None},
        "chdir": str(submission.home),
        "output": str(submission.log / "supervisor.log"),
        "open-mode": "append",
        "requeue": None,
        "signal": f"B:USR1@{notice(submission)}",
    }


def _assigned(value: str | None) -> str:
    return "" if value is None else f"={shlex.quote(value)}"


def _sbatch(submission: Submission) -> list[str]:
    # The variables' values are in the environment alone, which no listing of processes shows to others.
    return ["sbatch", "--parsable", "--export=ALL", str(submission.home / SCRIPT)]


def _clean(environment: Mapping[str, str], submission: Submission) -> dict[str, str]:
    """Without what would override the script (variables beat its lines), or is of another job."""
    block = submission.job.slurm
    chosen = [name for option, name in CHOSEN.items() if getattr(block, option) is not None]
    ours = {f"SBATCH_{name}" for name in (*DECIDED, *chosen)}
    return {
        name: value
        for name, value in environment.items()
        if name not in ours and name not in CONTRACT and (not name.startswith("SLURM_") or name in KEPT)
    }


ENGINE = SlurmEngine()
