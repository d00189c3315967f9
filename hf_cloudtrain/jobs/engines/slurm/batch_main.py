"""What the batch script runs: the supervisor of a job's nodes, and what becomes of the Slurm job after each start.

python -m hf_cloudtrain.jobs.engines.slurm.batch_main HOME

notice (USR1 of --signal; TERM of scancel, of `scontrol requeue`, of a preemption) -> the nodes save, and then
  preempted, or out of time      -> `scontrol requeue`; the next start resumes
  cancelled, by us or by scancel -> the job stays cancelled
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import time

from hf_cloudtrain.errors import CloudTrainError, PreemptedExit
from hf_cloudtrain.jobs.engines.slurm.client import SlurmClient, SlurmError, SlurmJob, call
from hf_cloudtrain.jobs.engines.slurm.gang import SlurmGang
from hf_cloudtrain.jobs.logs import show_messages
from hf_cloudtrain.jobs.node.stopping import MARGIN
from hf_cloudtrain.jobs.records import JobRecord, JobStore, Start, State
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.jobs.supervisor import Supervisor
from hf_cloudtrain.jobs.verdict import Verdict, exit_records, judge

logger = logging.getLogger(__name__)

EARLY = 60
"""Seconds that Slurm may be early with the signal of `--signal`: https://slurm.schedmd.com/sbatch.html."""
LONGEST_NOTICE = 65535
"""Seconds that `--signal` accepts at most."""
CANCEL = "`cloudtrain job cancel`"
TIME_LIMIT = "Time limit."


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
        self._gang = SlurmGang(submission, number)

    def run(self) -> int:
        """Start the nodes until the job is over; return the exit code of the batch script."""
        record = self._store.read(self._submission.id)
        if record.state == "finished":
            logger.info("The job has finished already; nothing is started.")
            return 0
        starts = tuple(start if start.ended else self._closed(start) for start in record.starts)
        handle = {"job": self._number}
        record = self._store.write(record, state="starting", reason=None, starts=starts, handle=handle)
        record = Supervisor(self._submission, self._store, record, self._gang, self._review).run()
        logger.info("%s: %s", record.state, record.reason)
        if record.state == "queued":
            record = self._requeue(record)
        elif record.state == "cancelled":
            _try("scancel", self._number)  # so that Slurm shows it as cancelled, too
        return {"finished": 0, "queued": 0, "preempted": PreemptedExit.CODE}.get(record.state, 1)

    def _closed(self, start: Start) -> Start:
        """A start whose supervisor was killed before it could record the end."""
        lost = (None,) * self._submission.plan.nodes
        verdict = judge(self._submission, start.number, lost, None)
        reason = "Slurm took its nodes away." if verdict.outcome == "failed" else verdict.reason
        return dataclasses.replace(
            start, ended=time.time(), outcome=verdict.outcome, reason=reason, exit_codes=lost
        )

    def _review(self, verdict: Verdict) -> Verdict:
        """What Slurm adds to the verdict on a start: a preempted job is queued again, a cancelled one is not."""
        if verdict.state in ("finished", "cancelled"):
            return verdict
        job = self._job()
        was_asked = verdict.state == "preempted" or (verdict.state is None and self._gang.all_have_saved)
        if job is not None and job.state != "RUNNING":
            # Slurm is ending it, however its nodes have ended.
            if job.restarts <= self._restarts and not job.was_preempted and not job.is_out_of_time:
                reason = f"Cancelled in Slurm (scancel). {verdict.reason or ''}".strip()
                return dataclasses.replace(verdict, state="cancelled", reason=reason)
        elif not was_asked and not (job is not None and job.was_preempted):
            return self._of_silent_nodes(verdict)
        why = _why(job, self._restarts, notice(self._submission))
        if job is not None and why == TIME_LIMIT and self._is_too_short(job):
            reason = (
                f"The time limit of {job.limit:.0f} s is too short: Slurm's notice comes "
                f"{notice(self._submission)} s before its end and up to {EARLY} s early, and nothing was saved. Set a "
                "longer 'slurm.time'."
            )
            return dataclasses.replace(verdict, state="failed", reason=reason)
        return dataclasses.replace(verdict, state="queued", reason=f"{why} {verdict.reason or ''}".strip())

    def _is_too_short(self, job: SlurmJob) -> bool:
        """Whether the time limit, perhaps the partition's, leaves no time to train, so that a restart cannot help."""
        if job.limit is None or job.limit > notice(self._submission) + EARLY:
            return False
        return not any(end.get("saved") for end in exit_records(self._submission, self._gang.number))

    def _of_silent_nodes(self, verdict: Verdict) -> Verdict:
        """A crash of a node that has written nothing: most likely it does not see the files of the job."""
        problem, number = self._gang.launch_failure, self._gang.number
        for rank, code in enumerate(self._gang.codes):
            is_silent = not self._submission.node_file(rank, number).exists()
            if is_silent and code not in (None, 0, PreemptedExit.CODE):
                problem = problem or f"Node {rank} ended with exit code {code} before it did anything."
        if problem is None:
            return verdict
        reason = (
            f"{problem} {str(self._submission.home)!r} and {sys.executable!r} must be on disks that all nodes share. "
            "HF_CLOUDTRAIN_STORE sets the folder of the first."
        )
        record = self._store.read(self._submission.id)
        state: State | None = "failed" if record.restarts >= record.max_restarts else None
        return dataclasses.replace(verdict, state=state, reason=reason, is_crash=True)

    def _requeue(self, record: JobRecord) -> JobRecord:
        """Queue the job again, unless Slurm already has, or a user has cancelled it."""
        if self._is_cancelled():
            _try("scancel", self._number)
            reason = f"Cancelled by {CANCEL}. {record.reason or ''}".strip()
            return self._store.write(record, state="cancelled", reason=reason)
        error = _try("scontrol", "requeue", self._number)
        job = self._job() if error else None
        if error is None or (job is not None and job.restarts > self._restarts):
            return record
        reason = f"{record.reason} Slurm did not queue it again: {error} {record.resume_hint}"
        return self._store.write(record, state="preempted", reason=reason)

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


def notice(submission: Submission) -> int:
    """Seconds before its end at which Slurm signals a job: the grace of the nodes, and the supervisor's margins."""
    return min(math.ceil(submission.plan.grace + 2 * MARGIN), LONGEST_NOTICE)


def _why(job: SlurmJob | None, restarts: int, seconds: int) -> str:
    if job is None:
        return "Asked to stop."
    if job.was_preempted:
        return "Preempted in Slurm."
    if job.restarts > restarts:
        return "Queued again in Slurm."
    ends_soon = job.limit is not None and job.ended is not None and job.ended - time.time() < seconds + EARLY
    return TIME_LIMIT if job.is_out_of_time or ends_soon else "Asked to stop."


def _try(*command: str) -> SlurmError | None:
    try:
        call(*command)
    except SlurmError as error:
        return error
    return None


def main() -> None:
    """The supervisor of a job."""
    show_messages("%(asctime)s %(message)s")
    submission = Submission.load(sys.argv[1])
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    watch = SlurmWatch(submission, JobStore(submission.store), os.environ["SLURM_JOB_ID"], restarts)
    sys.exit(watch.run())


if __name__ == "__main__":
    main()
