"""A job within its Slurm allocation: the supervisor of its nodes, and what Slurm makes of their end.

python -m hf_cloudtrain.jobs.engines.slurm.batch_main HOME     as the batch script starts it

notice (USR1 of --signal; TERM of scancel, of `scontrol requeue`, of a preemption) -> the nodes save
-> taken away, or out of time: `scontrol requeue`, and the next start resumes
-> cancelled, by us or by scancel: it stays cancelled
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
from hf_cloudtrain.jobs.node.stopping import MARGIN
from hf_cloudtrain.jobs.records import JobRecord, JobStore, Start, State
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.jobs.supervisor import Supervisor, Verdict, judge
from hf_cloudtrain.tracking.exit_record import read_end

logger = logging.getLogger(__name__)

EARLY = 60
"""Seconds that Slurm may be early with the signal of `--signal`: https://slurm.schedmd.com/sbatch.html."""
LONGEST_NOTICE = 65535
"""Seconds that `--signal` takes at most."""
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
        """From the first start of the nodes to the exit code of the batch script."""
        record = self._store.read(self._submission.id)
        if record.state == "finished":
            logger.info("The job has finished; there is nothing to start again.")
            return 0
        starts = tuple(start if start.ended else self._closed(start) for start in record.starts)
        record = self._store.write(
            record, state="starting", reason=None, starts=starts, handle={"job": self._number}
        )
        record = Supervisor(self._submission, self._store, record, self._gang, self._review).run()
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
        is_told = verdict.state == "preempted" or (verdict.state is None and self._gang.all_have_saved)
        if job is not None and job.state != "RUNNING":
            # It is being ended, whatever has come of the nodes.
            if job.restarts <= self._restarts and not job.was_preempted and not job.is_out_of_time:
                reason = f"Cancelled in Slurm (scancel). {verdict.reason or ''}".strip()
                return dataclasses.replace(verdict, state="cancelled", reason=reason)
        elif not is_told and not (job is not None and job.was_preempted):
            return self._of_mute_nodes(verdict)
        seconds = notice(self._submission)
        why = _why(job, self._restarts, seconds)
        if job is not None and why == TIME_LIMIT and self._is_too_short(job):
            reason = (
                f"Its time limit of {job.limit:.0f} s is too short: the notice comes {seconds} s before its end and up to "
                f"{EARLY} s early, and nothing was saved. Give 'slurm.time'."
            )
            return dataclasses.replace(verdict, state="failed", reason=reason)
        return dataclasses.replace(verdict, state="queued", reason=f"{why} {verdict.reason or ''}".strip())

    def _is_too_short(self, job: SlurmJob) -> bool:
        """Whether the time limit, which may be the partition's, leaves no time to begin, so that another start would not help."""
        if job.limit is None or job.limit > notice(self._submission) + EARLY:
            return False
        ranks, number = range(self._submission.plan.nodes), self._gang.number
        ends = [read_end(self._submission.exit_file(rank, number)) or {} for rank in ranks]
        return not any(end.get("saved") for end in ends)

    def _of_mute_nodes(self, verdict: Verdict) -> Verdict:
        """A crash of a node that has said nothing: most likely it does not see what the job is made of."""
        problem, number = self._gang.launch_failure, self._gang.number
        for rank, code in enumerate(self._gang.codes):
            is_mute = not self._submission.node_file(rank, number).exists()
            if is_mute and code not in (None, 0, PreemptedExit.CODE):
                problem = problem or f"Node {rank} ended with exit code {code} before it did anything."
        if problem is None:
            return verdict
        reason = (
            f"{problem} {str(self._submission.home)!r} and {sys.executable!r} have to be on disks that all nodes share; "
            "HF_CLOUDTRAIN_STORE names another place for the first."
        )
        record = self._store.read(self._submission.id)
        state: State | None = "failed" if record.restarts >= record.max_restarts else None
        return dataclasses.replace(verdict, state=state, reason=reason, is_crash=True)

    def _requeue(self, record: JobRecord) -> JobRecord:
        """Have Slurm queue this job again, unless it does so already, or somebody wants it to end."""
        if self._is_cancelled():
            self._try("scancel", self._number)
            return self._store.write(
                record, state="cancelled", reason=f"{CANCEL}. {record.reason or ''}".strip()
            )
        error = self._try("scontrol", "requeue", self._number)
        if error is None or self._is_queued_again():
            return record
        return self._store.write(
            record,
            state="preempted",
            reason=f"{record.reason} Slurm does not queue it again: {error} `cloudtrain job run --resume {record.id}` goes on.",
        )

    def _is_queued_again(self) -> bool:
        job = self._job()
        return job is not None and job.restarts > self._restarts

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


def notice(submission: Submission) -> int:
    """Seconds before its end at which a job is told: the nodes have their grace, and we the rest."""
    return min(math.ceil(submission.plan.grace + 2 * MARGIN), LONGEST_NOTICE)


def _why(job: SlurmJob | None, restarts: int, seconds: int) -> str:
    if job is None:
        return "Told to stop."
    if job.was_preempted:
        return "Preempted in Slurm."
    if job.restarts > restarts:
        return "Queued again in Slurm."
    if job.is_out_of_time or (
        job.limit is not None and job.ended is not None and job.ended - time.time() < seconds + EARLY
    ):
        return TIME_LIMIT
    return "Told to stop."


def main() -> None:
    """The supervisor of a job."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    submission = Submission.load(sys.argv[1])
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    watch = SlurmWatch(submission, JobStore(submission.store), os.environ["SLURM_JOB_ID"], restarts)
    sys.exit(watch.run())


if __name__ == "__main__":
    main()
