"""The engine `skypilot`. The run's storage fills its gaps: saving before a cancel, the end of a forgotten job."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Iterator
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.jobs.engines.protocol import EngineStatus, as_text, states
from hf_cloudtrain.jobs.engines.skypilot import client
from hf_cloudtrain.jobs.engines.skypilot.client import SkyJob
from hf_cloudtrain.jobs.engines.skypilot.task import VERDICT, as_task, cluster_name, launch_argv, problems
from hf_cloudtrain.jobs.records import OVER, JobRecord, JobStore, State
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.runtime.provenance import person
from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.storage.client import Storage

logger = logging.getLogger(__name__)

TASK = "task.yaml"
POLL = 2.0
"""Seconds between two looks at a run that was asked to stop."""
MARGIN = 15.0
"""Seconds beyond heartbeat and grace for a run to report that it has stopped."""
CLOCK_SKEW = 600.0
"""Seconds that the clocks of two machines may differ: an older attempt belongs to an earlier job."""
STATES = states(
    queued="PENDING",
    starting="SUBMITTED STARTING RECOVERING INIT SETTING_UP",
    running="RUNNING WINDING_DOWN",
    stopping="CANCELLING",
    finished="SUCCEEDED",
    cancelled="CANCELLED",
)
"""Of managed jobs and of a cluster's queue (sky/jobs/state.py, sky/skylet/job_lib.py); FAILED… is `failed`."""
ENDS = states(finished="finished", preempted="preempted", cancelled="stopped", failed="failed overtaken")
"""The state in which an attempt ended, and the state of its job."""
CANCELLED = EngineStatus("cancelled", "Stopped by `cloudtrain job cancel`.")


class SkypilotEngine:
    """Managed jobs and clusters of SkyPilot. See `Engine`."""

    def check(self, submission: Submission) -> None:
        """Refuse what cannot run there, before anything is started."""
        if found := problems(submission):
            raise ConfigurationError(" ".join(found))
        submission.plan.own_variables(os.environ)
        client.executable()

    def show(self, submission: Submission) -> str:
        """The task and the command, below comments that name what is missing."""
        comments = "".join(f"# Missing: {problem}\n" for problem in problems(submission))
        command = shlex.join(launch_argv(submission, str(submission.home / TASK)))
        return f"{comments}{as_text(as_task(submission))}---\n{command}\n"

    def submit(self, submission: Submission, store: JobStore, record: JobRecord) -> JobRecord:
        """Hand the task to SkyPilot, which returns once it has accepted it.

        That takes minutes if it must start a machine for its own controller first.
        """
        task = as_task(submission)
        submission.save()
        path = submission.home / TASK
        path.write_text(as_text(task))
        if submission.has_workspace:
            # Without it SkyPilot leaves out what a .gitignore names; the other engines have everything in the copy.
            ignore = submission.workspace / ".skyignore"
            if not ignore.exists():
                ignore.write_text("# Send everything: this folder is a copy without the ignored files.\n")
        output = client.run(launch_argv(submission, str(path)), submission.plan.own_variables(os.environ))
        managed, name = submission.job.skypilot.managed, task["name"]
        numbers = [int(number) for number in client.JOB_ID.findall(output)][-1:]
        if managed and not numbers:
            numbers = [row["job_id"] for row in client.managed_jobs() if row.get("job_name") == name]
        handle = {
            "managed": managed,
            "name": name if managed else cluster_name(submission.id),
            "job": max(numbers, default=None),
        }
        return store.write(record, state="queued" if managed else "starting", handle=handle)

    def look(self, record: JobRecord) -> EngineStatus | None:
        """What SkyPilot says now; None before it has the job. Raises ConfigurationError if it does not answer."""
        if record.is_over or not record.handle:
            return None
        row = SkyJob(record).row()
        return _forgotten(record) if row is None else _status(record, row)

    def cancel(self, record: JobRecord, store: JobStore) -> None:
        """Ask the run to save and stop, wait at most heartbeat and grace for that, and end the job.

        SkyPilot gives a job that it cancels no time to save, so the request goes through the run's storage.
        """
        job = SkyJob(record) if record.handle else None
        record = store.write(record, state="stopping")
        if job is None:  # SkyPilot never had it
            return
        try:
            found = Submission.load(record.home)
            if (found.id, found.run_url) != (record.id, record.run_url):  # records are untrusted
                raise ConfigurationError(f"{record.home!r} belongs to a different job or run.")
            _stop_run(record, found.plan.grace)
        except (CloudTrainError, OSError, ValueError) as error:
            logger.warning("The run could not be asked to save: %s", error)
        job.end()

    def lines(self, record: JobRecord, node_rank: int | None, follow: bool) -> Iterator[str]:
        """From SkyPilot's own log of the job."""
        job = SkyJob(record)
        job.check_number()
        argv = [*job.logs_argv, "--follow" if follow else "--no-follow", "--tail", "0"]
        for line in client.lines(argv, None if follow else client.PATIENCE):  # its end is not that of the job
            shown = client.node_line(line, record.nodes, node_rank)
            if shown is not None:
                yield shown


def _status(record: JobRecord, row: dict[str, Any]) -> EngineStatus:
    status = str(row.get("status"))
    state: State = "failed" if status.startswith("FAILED") else STATES.get(status, record.state)
    if record.state == "stopping":
        return CANCELLED if state in OVER else EngineStatus("stopping")
    detail = row.get("failure_reason") or row.get("details")
    reason = None if detail is None else redact(str(detail))
    if status == "RECOVERING":
        reason = reason or "SkyPilot is restarting it on a different machine."
    status_of_node_0 = _verdict(record) if state == "finished" else None
    return status_of_node_0 or EngineStatus(state, reason)


def _verdict(record: JobRecord) -> EngineStatus | None:
    """What node 0 printed at its end: SkyPilot calls every job a success that must not be started again."""
    try:
        output = client.answer([*SkyJob(record).logs_argv, "--no-follow", "--tail", "200"]).stdout
        lines = [client.node_line(line, 1, None) or "" for line in output.splitlines()]
        verdict = next(line for line in reversed(lines) if line.startswith(VERDICT))
        found = json.loads(verdict[len(VERDICT) :])
        return EngineStatus(found["state"], found["reason"])
    except (ConfigurationError, OSError, StopIteration, ValueError, KeyError, TypeError):
        return None


def _forgotten(record: JobRecord) -> EngineStatus:
    """The end by the run itself: SkyPilot removes a cluster after its job, and its controller while no job runs."""
    if record.state == "stopping":
        return CANCELLED
    try:
        catalog = _catalog(record)
        progress = catalog.attempts.read_progress(max(catalog.attempts.numbers(), default=0)) or {}
    except CloudTrainError as error:
        return EngineStatus("lost", f"SkyPilot no longer knows it, and its run cannot be read. {error}")
    written = progress.get("time")
    is_its_own = isinstance(written, (int, float)) and written > record.created - CLOCK_SKEW
    state = ENDS.get(str(progress.get("state"))) if is_its_own else None
    if state is None:
        logs = shlex.join(SkyJob(record).logs_argv)
        return EngineStatus(
            "lost", f"SkyPilot no longer knows it, and its run has recorded no end. See `{logs}`."
        )
    return EngineStatus(state, f"SkyPilot no longer knows it; its run has ended as {progress['state']!r}.")


def _stop_run(record: JobRecord, grace: float) -> None:
    """Ask the newest attempt to save and stop; return when it has, or when the time for it is over."""
    catalog = _catalog(record)
    attempt = max(catalog.attempts.numbers(), default=None)
    if attempt is None or not _is_training(catalog, attempt):
        return
    catalog.attempts.request_stop(time.time(), person())
    deadline = time.monotonic() + env.heartbeat() + grace + MARGIN
    while _is_training(catalog, attempt) and time.monotonic() < deadline:
        time.sleep(POLL)


def _is_training(catalog: Catalog, attempt: int) -> bool:
    return (catalog.attempts.read_progress(attempt) or {}).get("state", "started") in ("started", "training")


def _catalog(record: JobRecord) -> Catalog:
    return Catalog(Storage(record.run_url, env.storage_options(None)))


ENGINE = SkypilotEngine()
