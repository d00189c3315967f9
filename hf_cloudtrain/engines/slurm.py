"""Slurm: a batch script of ours, whose supervisor starts the nodes and has itself queued again after a preemption.

python -m hf_cloudtrain.engines.slurm HOME     the supervisor of a job, as the batch script starts it

    notice (USR1 of --signal; TERM of scancel, of `scontrol requeue`, of a preemption) -> the nodes save
    -> taken away, or out of time: `scontrol requeue`, and the next start resumes
    -> cancelled, by us or by scancel: it stays cancelled
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
from collections.abc import Iterator
from pathlib import Path

from hf_cloudtrain.engines import Seen
from hf_cloudtrain.engines.slurm_client import (
    SlurmClient,
    SlurmError,
    SlurmJob,
    SlurmSilentError,
    call,
    minutes,
)
from hf_cloudtrain.engines.slurm_gang import SlurmGang, srun
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, PreemptedExit
from hf_cloudtrain.job_logs import follow_files, last_lines
from hf_cloudtrain.job_record import JobRecord, JobStore, Start, State
from hf_cloudtrain.node import MARGIN
from hf_cloudtrain.plan import CONTRACT
from hf_cloudtrain.submission import Submission
from hf_cloudtrain.supervisor import Supervisor, Verdict, judge

logger = logging.getLogger(__name__)

SCRIPT = "job.sbatch"
EARLY = 60
"""Seconds that Slurm may be early with the signal of `--signal`: https://slurm.schedmd.com/sbatch.html."""
LONGEST_NOTICE = 65535
"""Seconds that `--signal` takes at most."""
LOOK = 5.0
"""Seconds between two questions to Slurm while logs are followed."""
PROGRAMS = ("sbatch", "srun", "scontrol", "squeue", "scancel")
KEPT = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
"""Of Slurm's variables, those that say which cluster. The others are of an allocation that we may be submitted from."""

CANCEL = "`cloudtrain job cancel`"
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
        if "%" in home or not home.isprintable():
            raise ConfigurationError(
                f"{home!r} has a character with a meaning in Slurm's file names. Set HF_CLOUDTRAIN_STORE to another folder."
            )
        limit, notice = submission.job.slurm.time, _notice(submission)
        if limit is not None and 0 < minutes(limit) * 60 <= notice + EARLY:
            raise ConfigurationError(
                f"'slurm.time' is {limit!r}, and the notice comes {notice} s before its end and up to {EARLY} s early, so the "
                f"job would be told to stop as it starts. Take more than {math.ceil((notice + EARLY) / 60)} minutes, or a "
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
        environment = {**_clean(os.environ), **submission.plan.own_variables(os.environ)}
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

    def look(self, record: JobRecord) -> Seen | None:
        """What Slurm says where the supervisor cannot: before it runs, and after it was ended."""
        number = record.handle.get("job")
        if record.is_over or number is None:
            return None
        job = self._client.job(str(number))
        if job is None:
            return Seen(
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


def seen(record: JobRecord, job: SlurmJob) -> Seen | None:
    """What a job's state in Slurm adds to its record; None where the record says all."""
    if job.state in WAITING:
        before = record.reason if record.state == "queued" else None  # why it is queued again
        words = [before, f"Slurm: {job.reason}." if job.reason != "None" else None]
        return Seen(WAITING[job.state], " ".join(filter(None, words)) or None)
    if job.state == "RUNNING":
        return Seen("starting") if record.state == "queued" else None
    if job.state in ("COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"):
        return None
    reason = f"Slurm: {job.state}" + (f", {job.reason}" if job.reason != "None" else "")
    if job.state not in ENDED:
        last = last_lines(Path(record.home, "log", "supervisor.log"), 1)
        reason += f", exit code {job.exit_code.partition(':')[0]}. " + (
            last[0]
            if last
            else f"It said nothing in {record.home!r}: is that on a disk that all nodes share? HF_CLOUDTRAIN_STORE names another."
        )
    return Seen(ENDED.get(job.state, "failed"), reason)


def script(submission: Submission) -> str:
    """The batch script."""
    options = "\n".join(f"#SBATCH --{name}{_assigned(value)}" for name, value in _options(submission).items())
    return f"""\
#!/bin/bash
{options}

# What comes before the supervisor listens must not end it: it looks for itself.
trap '' TERM USR1
exec {shlex.join([sys.executable, "-m", "hf_cloudtrain.engines.slurm", str(submission.home)])}
"""


def _options(submission: Submission) -> dict[str, str | None]:
    job, plan = submission.job, submission.plan
    block, machine = job.slurm, job.machine
    gres = block.gres or (None if machine is None else f"gpu:{machine.gpu}:{machine.gpus}")
    chosen = {
        "partition": block.partition,
        "account": block.account,
        "qos": block.qos,
        "time": block.time,
        "gres": gres,
    }
    return {
        "job-name": submission.id,
        "nodes": str(plan.nodes),
        # As many CPUs a node as processes, at least. Slurm's own variables ask for more, such as SBATCH_CPUS_PER_TASK.
        "ntasks-per-node": str(plan.nproc_per_node),
        **{name: value for name, value in chosen.items() if value is not None},
        "chdir": str(submission.home),
        "output": str(submission.log / "supervisor.log"),
        "open-mode": "append",
        "requeue": None,
        "signal": f"B:USR1@{_notice(submission)}",
    }


def _assigned(value: str | None) -> str:
    return "" if value is None else f"={shlex.quote(value)}"


def _sbatch(submission: Submission) -> list[str]:
    # The variables' values are in the environment alone, which no listing of processes shows to others.
    return ["sbatch", "--parsable", "--export=ALL", str(submission.home / SCRIPT)]


def _clean(environment: os._Environ[str]) -> dict[str, str]:
    """Without what would override the script (variables beat its lines), or is of another job."""
    ours = {"SBATCH_" + name.upper().replace("-", "_") for name in SET_BY_SCRIPT}
    return {
        name: value
        for name, value in environment.items()
        if name not in ours and name not in CONTRACT and (not name.startswith("SLURM_") or name in KEPT)
    }


SET_BY_SCRIPT = (
    *(
        "job-name",
        "open-mode",
        "output",
        "requeue",
        "no-requeue",
        "signal",
        "chdir",
        "export",
        "get-user-env",
    ),
    *("array-inx", "wait", "wait-all-nodes", "exclusive-user", "ntasks-per-node"),
)


def _notice(submission: Submission) -> int:
    """Seconds before its end at which a job is told: the nodes have their grace, and we the rest."""
    return min(math.ceil(submission.plan.grace + 2 * MARGIN), LONGEST_NOTICE)


# --- Within the allocation ---------------------------------------------------------------------------------------------


class SlurmWatch:
    """The supervisor's side of a Slurm job.

    Args:
        number: of the Slurm job.
        restarts: how many times Slurm had queued it again when this start of it began.
    """

    def __init__(self, submission: Submission, store: JobStore, number: str, restarts: int) -> None:
        self._submission = submission
        self._store = store
        self._number = number
        self._restarts = restarts
        self._client = SlurmClient()

    def run(self) -> int:
        """From the first start of the nodes to the exit code of the batch script."""
        record = self._store.read(self._submission.id)
        if record.state == "finished":
            logger.info("The job has finished; there is nothing to start again.")
            return 0
        starts = tuple(start if start.ended else self._closed(start) for start in record.starts)
        record = self._store.write(
            record, state="starting", reason=None, starts=starts, handle={"job": self._number}
        )
        gang = SlurmGang(self._submission, self._number)
        record = Supervisor(self._submission, self._store, record, gang, self._review).run()
        logger.info("%s: %s", record.state, record.reason)
        if record.state == "queued":
            record = self._requeue(record)
        elif record.state == "cancelled":
            self._try("scancel", self._number)  # so that Slurm says so, too
        return {"finished": 0, "queued": 0}.get(
            record.state, PreemptedExit.CODE if record.state == "preempted" else 1
        )

    def _closed(self, start: Start) -> Start:
        """A start whose supervisor was killed before it could say how it ended."""
        nothing = (None,) * self._submission.plan.nodes
        verdict = judge(self._submission, start.number, nothing, None)
        reason = verdict.reason if verdict.outcome != "failed" else "Slurm took its nodes away."
        return dataclasses.replace(
            start, ended=time.time(), outcome=verdict.outcome, reason=reason, exit_codes=nothing
        )

    def _review(self, verdict: Verdict) -> Verdict:
        """Slurm's word on a start that has ended: who is preempted is queued again, who is cancelled is not."""
        if verdict.state in ("finished", "cancelled"):
            return verdict
        job = self._job()
        is_saved = verdict.state == "preempted" or (verdict.state is None and not verdict.is_crash)
        if job is not None and job.state != "RUNNING":
            # It is being ended, whatever has come of the nodes.
            if job.restarts <= self._restarts and not job.was_preempted and not job.is_out_of_time:
                reason = f"Cancelled in Slurm (scancel). {verdict.reason or ''}".strip()
                return dataclasses.replace(verdict, state="cancelled", reason=reason)
        elif not is_saved:
            return verdict
        why = _why(job, self._restarts, _notice(self._submission))
        return dataclasses.replace(verdict, state="queued", reason=f"{why} {verdict.reason or ''}".strip())

    def _requeue(self, record: JobRecord) -> JobRecord:
        """Have Slurm queue this job again, unless it does so already, or somebody wants it to end."""
        if self._is_cancelled():
            self._try("scancel", self._number)
            return self._store.write(
                record, state="cancelled", reason=f"{CANCEL}. {record.reason or ''}".strip()
            )
        error = self._try("scontrol", "requeue", self._number)
        job = self._job() if error else None
        if error is None or (job is not None and job.restarts > self._restarts):
            return record
        return self._store.write(
            record,
            state="preempted",
            reason=f"{record.reason} Slurm does not queue it again: {error} `cloudtrain job run --resume {record.id}` goes on.",
        )

    def _job(self) -> SlurmJob | None:
        try:
            return self._client.job(self._number)
        except SlurmError as error:
            logger.warning("%s", error)
            return None

    def _is_cancelled(self) -> bool:
        try:
            return self._store.is_cancelled(self._submission.id)
        except CloudTrainError as error:
            logger.warning("%s", error)
            return False

    def _try(self, *command: str) -> SlurmError | None:
        try:
            call(*command)
        except SlurmError as error:
            return error
        return None


def _why(job: SlurmJob | None, restarts: int, notice: int) -> str:
    if job is None:
        return "Told to stop."
    if job.was_preempted:
        return "Preempted in Slurm."
    if job.restarts > restarts:
        return "Queued again in Slurm."
    if job.is_out_of_time or (
        job.limit is not None and job.ended is not None and job.ended - time.time() < notice + EARLY
    ):
        return "Time limit."
    return "Told to stop."


def main() -> None:
    """The supervisor of a job."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    submission = Submission.load(sys.argv[1])
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    watch = SlurmWatch(submission, JobStore(submission.store), os.environ["SLURM_JOB_ID"], restarts)
    sys.exit(watch.run())


ENGINE = SlurmEngine()

if __name__ == "__main__":
    main()
