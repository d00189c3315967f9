"""The engine `slurm`: a batch script that starts the supervisor, and has itself queued again after a preemption."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.engines.protocol import EngineStatus, states
from hf_cloudtrain.jobs.engines.slurm.batch_main import CANCEL, EARLY, notice
from hf_cloudtrain.jobs.engines.slurm.client import (
    SlurmClient,
    SlurmError,
    SlurmJob,
    SlurmSilentError,
    call,
    seconds,
)
from hf_cloudtrain.jobs.engines.slurm.gang import srun
from hf_cloudtrain.jobs.logs import follow_nodes, last_lines
from hf_cloudtrain.jobs.records import OVER, JobRecord, JobStore
from hf_cloudtrain.jobs.spec.node_plan import CONTRACT
from hf_cloudtrain.jobs.submission import Submission

logger = logging.getLogger(__name__)

SCRIPT = "job.sbatch"
LOOK = 5.0
"""Seconds between two questions to Slurm while a log is followed."""
PROGRAMS = ("sbatch", "srun", "scontrol", "squeue", "scancel")
KEPT = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
"""The variables of Slurm that name the cluster. The others belong to the allocation that a user may submit from."""
CHOSEN = {"partition": "PARTITION", "account": "ACCOUNT", "qos": "QOS", "time": "TIMELIMIT", "gres": "GRES"}
"""Options of the job file, and sbatch's variables for them."""
DECIDED = (
    *("JOB_NAME", "OPEN_MODE", "OUTPUT", "ERROR", "INPUT", "REQUEUE", "NO_REQUEUE", "SIGNAL", "EXPORT"),
    *("GET_USER_ENV", "ARRAY_INX", "WAIT", "WAIT_ALL_NODES", "CLUSTERS", "NO_KILL"),
)
"""sbatch's variables for what this engine decides; all others apply."""

WAITING = states(
    queued="PENDING REQUEUED REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT RESV_DEL_HOLD", starting="CONFIGURING"
)
ENDED = states(cancelled="CANCELLED", preempted="PREEMPTED")
"""Ends of a job whose supervisor could not record its own; every other end is a failure."""


class SlurmEngine:
    """A Slurm cluster. See `Engine`."""

    def __init__(self) -> None:
        self._client = SlurmClient()

    def check(self, submission: Submission) -> None:
        """Refuse what Slurm would accept and could not do."""
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise ConfigurationError(
                f"{missing[0]!r} is not found. Submit on a machine of the Slurm cluster, such as its login node, or "
                "use a different engine."
            )
        home = str(submission.home)
        if not submission.home.is_absolute():
            raise ConfigurationError(
                f"{home!r} is relative, but a job runs in a different folder. Set HF_CLOUDTRAIN_STORE to an absolute "
                "path."
            )
        if "%" in home or not home.isprintable():
            raise ConfigurationError(
                f"{home!r} has a character with a meaning in Slurm's file names. Set HF_CLOUDTRAIN_STORE to a folder "
                "without it."
            )
        limit, least = submission.job.slurm.time, notice(submission) + EARLY
        if limit is not None and 0 < seconds(limit) <= least:
            raise ConfigurationError(
                f"'slurm.time' is {limit!r}, but Slurm's notice comes {notice(submission)} s before its end and up to "
                f"{EARLY} s early, so the job would be asked to stop as it starts. Set more than "
                f"{math.ceil(least / 60)} minutes, or a shorter HF_CLOUDTRAIN_GRACE."
            )

    def show(self, submission: Submission) -> str:
        """The batch script, the command that submits it, and the command in it that starts the nodes."""
        names = ", ".join(submission.plan.variables)
        variables = f"# in the environment of sbatch, which passes it on: {names}\n" if names else ""
        nodes = shlex.join(srun(submission, "ADDRESS", 0, 1)).replace(
            "--master-port 0 ", "--master-port PORT "
        )
        return (
            f"# {submission.home / SCRIPT}\n{script(submission)}\n"
            f"{variables}{shlex.join(_sbatch(submission))}\n\n"
            f"# within the allocation, for each start\n{nodes}\n"
        )

    def submit(self, submission: Submission, store: JobStore, record: JobRecord) -> JobRecord:
        """Write the batch script and queue it."""
        submission.log.mkdir(parents=True, exist_ok=True)
        (submission.home / SCRIPT).write_text(script(submission))
        environment = {**_clean(os.environ, submission), **submission.plan.own_variables(os.environ)}
        try:
            number = call(*_sbatch(submission), environment=environment).strip().partition(";")[0]
        except SlurmSilentError as error:
            raise ConfigurationError(f"{error} Nothing was submitted.") from None
        except SlurmError as error:
            raise ConfigurationError(f"Slurm refused the job. {error}") from None
        now = store.read(record.id)
        # The job may run already, and then its supervisor writes the record.
        return now if now.handle.get("job") == number else store.write(now, handle={"job": number})

    def look(self, record: JobRecord) -> EngineStatus | None:
        """What Slurm says where the supervisor cannot: before it runs, and after Slurm has ended it."""
        number = _number(record)
        if record.is_over or number is None:
            return None
        job = self._job(number, record, JobStore())
        if job is None:
            return EngineStatus(
                "lost",
                f"Slurm has no job {number} named {record.id!r} any more, and no record says how it ended. {record.resume_hint}",
            )
        return status_of(record, job)

    def cancel(self, record: JobRecord, store: JobStore) -> None:
        """Take the job out of the queue. One that runs is asked to save, and its supervisor enforces the grace."""
        number = _number(record)
        if number is None:
            return
        try:
            job = self._job(number, record, store)
            if job is not None and job.state != "RUNNING":
                call("scancel", "--state=PENDING", number)  # also one that is about to be queued again
                job = self._job(number, record, store)
            if job is not None and job.state == "CANCELLED":
                reason = f"Cancelled by {CANCEL} while it was queued."
                store.write(store.read(record.id), state="cancelled", reason=reason)
            elif job is not None and job.state == "RUNNING":
                call("scancel", "--batch", "--signal=USR1", number)
        except SlurmSilentError as error:
            # The supervisor sees the cancel mark by itself.
            logger.warning(
                "%s A job that runs ends all the same; one that is queued ends as soon as it starts.", error
            )
        except SlurmError as error:
            logger.info("%s", error)  # the job has ended in the meantime

    def _job(self, number: str, record: JobRecord, store: JobStore) -> SlurmJob | None:
        """What Slurm knows about a job; None if it has forgotten it, or if the number is that of a different job.

        An administrator may have changed its name, but not its script.
        """
        job = self._client.job(number)
        if job is None or job.name == record.id or job.command == str(store.home(record.id) / SCRIPT):
            return job
        return None

    def lines(self, record: JobRecord, node_rank: int | None, follow: bool) -> Iterator[str]:
        """From the nodes' files. Slurm is asked every few seconds whether a job still exists."""
        asked = time.monotonic()

        def is_over(now: JobRecord) -> bool:
            nonlocal asked
            if now.is_over or time.monotonic() < asked + LOOK:
                return now.is_over
            asked = time.monotonic()
            try:
                status = self.look(now)
            except SlurmError:
                return False
            return status is not None and status.state in OVER

        return follow_nodes(record, node_rank, follow, is_over)


def _number(record: JobRecord) -> str | None:
    """The number of its Slurm job, from its record, which is untrusted. Raises ConfigurationError: it is not a number."""
    number = record.handle.get("job")
    if number is None or re.fullmatch("[0-9]+", str(number)):
        return None if number is None else str(number)
    raise ConfigurationError(
        f"{str(number)[:100]!r} is not the number of a Slurm job: the record of the job {record.id!r} is damaged. Find the "
        f"job with `squeue --name={record.id}`."
    )


def status_of(record: JobRecord, job: SlurmJob) -> EngineStatus | None:
    """What a job's state in Slurm adds to its record; None if the record says everything."""
    if job.state in WAITING:
        before = record.reason if record.state == "queued" else None  # why it is queued again
        reasons = [before, f"Slurm: {job.reason}." if job.reason != "None" else None]
        return EngineStatus(WAITING[job.state], " ".join(filter(None, reasons)) or None)
    if job.state == "RUNNING":
        return EngineStatus("starting") if record.state == "queued" else None
    if job.state in ("SUSPENDED", "STOPPED"):
        return EngineStatus(record.state, f"Slurm: {job.state}.")
    if job.state in ("COMPLETING", "SIGNALING", "STAGE_OUT"):
        return None
    reason = f"Slurm: {job.state}" + (f", {job.reason}" if job.reason != "None" else "")
    if job.state not in ENDED:
        reason += f", exit code {job.exit_code.partition(':')[0]}. {_why_it_died(record)}"
    return EngineStatus(ENDED.get(job.state, "failed"), reason)


def _why_it_died(record: JobRecord) -> str:
    """Why a supervisor ended that could not write it into the record."""
    last = last_lines(Path(record.home, "log", "supervisor.log"), 1)
    if last:
        return last[0]
    if record.starts:
        return f"Its supervisor was killed. {record.resume_hint}"
    return (
        f"It wrote nothing to {record.home!r}. Is that folder on a disk that all nodes share? HF_CLOUDTRAIN_STORE sets "
        "a different one."
    )


def script(submission: Submission) -> str:
    """The batch script."""
    options = "\n".join(f"#SBATCH --{name}{_assigned(value)}" for name, value in _options(submission).items())
    return f"""\
#!/bin/bash
{options}

# Signals before the supervisor's handlers must not end it: it asks Slurm by itself.
trap '' TERM USR1
exec {shlex.join([sys.executable, "-m", "hf_cloudtrain.jobs.engines.slurm.batch_main", str(submission.home)])}
"""


def _options(submission: Submission) -> dict[str, str | None]:
    job, plan = submission.job, submission.plan
    machine = job.machine
    chosen = {option: getattr(job.slurm, option) for option in CHOSEN}
    if machine is not None:
        chosen["gres"] = chosen["gres"] or f"gpu:{machine.gpu}:{machine.gpus}"
    return {
        "job-name": submission.id,
        "nodes": str(plan.nodes),
        # At least one CPU a process. Slurm's own variables request more: SBATCH_CPUS_PER_GPU, SBATCH_EXCLUSIVE.
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
    # The values of variables are only in the environment, which process listings do not show to other users.
    return ["sbatch", "--parsable", "--export=ALL", str(submission.home / SCRIPT)]


def _clean(environment: Mapping[str, str], submission: Submission) -> dict[str, str]:
    """Without what would override the script (variables beat its lines), or belongs to a different job."""
    block = submission.job.slurm
    chosen = [name for option, name in CHOSEN.items() if getattr(block, option) is not None]
    ours = {f"SBATCH_{name}" for name in (*DECIDED, *chosen)}
    return {
        name: value
        for name, value in environment.items()
        if name not in ours and name not in CONTRACT and (not name.startswith("SLURM_") or name in KEPT)
    }


ENGINE = SlurmEngine()
