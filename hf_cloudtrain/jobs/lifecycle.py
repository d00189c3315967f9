"""Jobs from their file to their end: submit, look at, go on with, cancel.

submit      job file + folder -> record, home, copy of the folder -> engine
look        record, and what the engine knows beyond it
resume      a job that is over or was lost, from its newest checkpoint
cancel      each node has its grace, and then the engine insists
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.jobs.engines import Engine, EngineStatus, engine
from hf_cloudtrain.jobs.node.workspace import copy_workspace
from hf_cloudtrain.jobs.records import JobRecord, JobStore
from hf_cloudtrain.jobs.spec.job import EngineName, Job
from hf_cloudtrain.jobs.submission import SUPERVISOR_LOCK, Submission
from hf_cloudtrain.runtime.files import locked
from hf_cloudtrain.runtime.process_tree import is_alive, this_process
from hf_cloudtrain.storage.urls import is_local, local_path, shown_url

logger = logging.getLogger(__name__)


def prepare(
    job: Job,
    store: JobStore,
    *,
    engine_name: EngineName | None = None,
    nodes: int | None = None,
    nproc_per_node: int | None = None,
    workspace: Path | None = None,
) -> Submission:
    """Everything that can be decided, and refused, before anything is started or written.

    Its id, home and run URL are those of the next job of this name, until `submit` has taken them.

    Args:
        engine_name: instead of the job's own.
        nodes: instead of what the job says.
        nproc_per_node: instead of what the job says.
        workspace: folder that is given with the job.

    Raises:
        ConfigurationError: with what to do. NoDatasetError: there is no such dataset.
    """
    if workspace is not None and not workspace.is_dir():
        raise ConfigurationError(
            f"{str(workspace)!r} is no folder. -d takes the folder with the code of the job."
        )
    job = job.model_copy(update={"engine": engine_name or job.engine})
    plan = job.plan(nodes=nodes, nproc_per_node=nproc_per_node)
    job_id = store.next_id(job.name)
    return Submission(
        job=job,
        plan=plan,
        id=job_id,
        run_url=job.run_url or store.below("runs", job_id),
        store=store.url,
        home=store.home(job_id),
        has_workspace=workspace is not None,
        dataset_version=_dataset_version(job, store),
    )


def submit(
    submission: Submission,
    store: JobStore,
    workspace: Path | None = None,
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> JobRecord:
    """Hand a job over to its engine; returns when it is there, and does not wait for its end.

    Args:
        submission: from `prepare`.
        on_bytes: hears of the workspace's bytes as they are copied.

    Raises:
        ConfigurationError: with what to do; nothing runs then.
    """
    job = submission.job
    submission.plan.own_variables(os.environ)
    starter(submission).check(submission)
    _check_run_not_shared(job, store)
    record = store.create(
        job.name,
        engine=job.engine,
        run_url=job.run_url,
        nodes=submission.plan.nodes,
        nproc_per_node=submission.plan.nproc_per_node,
        max_restarts=job.max_restarts,
        experiment=job.experiment,
        vm=job.vm,
        submitter=this_process(),
    )
    submission = dataclasses.replace(submission, id=record.id, run_url=record.run_url, home=Path(record.home))
    try:
        _clear(submission.home)
        submission.home.mkdir(parents=True)
        if workspace is not None:
            copy_workspace(
                workspace, submission.workspace, leave_out=own_folders(submission), on_bytes=on_bytes
            )
        submission.workspace.mkdir(exist_ok=True)
        submission.save()
        return starter(submission).submit(submission, store, record)
    except BaseException as error:
        _give_up(store, record, error)
        raise


def _clear(home: Path) -> None:
    """Remove what a job has left whose record was deleted. Raises ConfigurationError where it runs still."""
    if not home.exists():
        return
    try:
        with locked(home / SUPERVISOR_LOCK):
            shutil.rmtree(home)
    except BlockingIOError:
        raise ConfigurationError(
            f"In {str(home)!r} a job runs that this store knows nothing of: its record was deleted, or it belongs to a store "
            "of the same URL. End it, or give this job another name."
        ) from None


def own_folders(submission: Submission) -> list[Path]:
    """Where jobs and their runs are kept on this machine: no part of a workspace that they are in."""
    run = [Path(local_path(submission.run_url))] if is_local(submission.run_url) else []
    return [submission.home.parent.parent, *run]


def resume(store: JobStore, job_id: str) -> JobRecord:
    """Start a job again that is over, or whose supervisor is gone: the same code, the same run.

    Raises:
        NoJobError: there is none. ConfigurationError: it runs still, or cannot be started.
    """
    record = store.read(job_id)
    if not Path(record.home).is_dir():
        host = record.submitted_by.get("host")
        raise ConfigurationError(
            f"{record.home!r} is not on this machine: the job was submitted on {host!r}."
        )
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(Path(record.home, "resume.lock")))
        except BlockingIOError:
            raise ConfigurationError(
                f"Another `cloudtrain job run --resume {record.id}` starts this job just now."
            ) from None
        return _resume(store, look(store, store.read(record.id)))


def _resume(store: JobStore, record: JobRecord) -> JobRecord:
    if not record.is_over:
        raise ConfigurationError(
            f"The job {record.id!r} is {record.state}. `cloudtrain job cancel {record.id}` ends it."
        )
    if record.state == "finished":
        raise ConfigurationError(f"The job {record.id!r} has finished. Submit the job file to train anew.")
    submission = Submission.load_here(record.home)
    submission.plan.own_variables(os.environ)
    starter(submission).check(submission)
    _check_run_not_shared(submission.job, store)
    store.forget_cancel(record.id)
    record = store.write(record, state="queued", reason=None, restarts=0)
    try:
        return starter(submission).submit(submission, store, record)
    except BaseException as error:
        _give_up(store, record, error)
        raise


def _give_up(store: JobStore, record: JobRecord, error: BaseException) -> None:
    """Show why a job was not started, unless somebody has taken it over already and writes its record."""
    try:
        if store.read(record.id).state == "queued":
            store.write(
                record, state="failed", reason=f"It could not be started: {error or type(error).__name__}"
            )
    except CloudTrainError as other:
        logger.warning("%s", other)  # the first error is the one to tell


def look(store: JobStore, record: JobRecord) -> JobRecord:
    """A record with what its engine knows now; what is over for good is kept."""
    if record.is_over:
        return record
    seen = _broken_off(record) or engine(record.engine).look(record)
    if seen is None or (seen.state, seen.reason) == (record.state, record.reason):
        return record
    seen_record = dataclasses.replace(record, state=seen.state, reason=seen.reason)
    # What is lost may come back: a disk that is mounted again, a clock that was set.
    if not seen_record.is_over or seen.state == "lost":
        return seen_record
    latest = store.read(record.id)
    if latest.is_over:
        return latest  # its supervisor has written that, and ended, since the record was read
    starts = tuple(
        start if start.ended else dataclasses.replace(start, ended=time.time(), outcome=seen.state)
        for start in latest.starts
    )
    return store.write(latest, state=seen.state, reason=seen.reason, starts=starts)


def _broken_off(record: JobRecord) -> EngineStatus | None:
    """What is known of a job whose submitter was killed before an engine had it."""
    by = record.submitter
    if record.state != "queued" or record.handle or by.get("host") != platform.node() or is_alive(by):
        return None
    return EngineStatus("failed", "Its submission was broken off, so nothing was started. Submit it again.")


def cancel(store: JobStore, job_id: str) -> JobRecord:
    """Ask for the end of a job; returns at once.

    Raises:
        NoJobError: there is none. ConfigurationError: it is over, or its engine does not answer.
    """
    record = store.read(job_id)
    try:
        record = look(store, record)
    except CloudTrainError as error:
        logger.warning("%s", error)  # a supervisor that runs needs no engine to see the mark
    if record.is_over:
        raise ConfigurationError(f"The job {record.id!r} is over: {record.state}.")
    store.ask_to_cancel(record.id)
    engine(record.engine).cancel(record, store)
    return record


def starter_of(record: JobRecord) -> Engine:
    """The engine of a job."""
    return engine(record.engine)


def starter(submission: Submission) -> Engine:
    """The engine of a job that is not started yet."""
    return engine(submission.job.engine)


def _dataset_version(job: Job, store: JobStore) -> int | None:
    if job.data is None:
        return None
    name, _, version = job.data.name.partition("@")
    return DatasetStore(store.url).find(name, int(version) if version else None).version


def _check_run_not_shared(job: Job, store: JobStore) -> None:
    """Two jobs that write to one run would overtake each other for ever."""
    record = None if job.run_url is None else writer_of(job.run_url, store)
    if record is not None:
        raise ConfigurationError(
            f"The job {record.id!r} is {record.state} and writes to {job.run_url!r} already. Cancel it (`cloudtrain "
            f"job cancel {record.id}`), or give this job another 'run_url'."
        )


def writer_of(run_url: str, store: JobStore) -> JobRecord | None:
    """The job that writes to a run and is not over; None where the store knows of none."""
    url = shown_url(run_url)
    for record in store.records():
        if shown_url(record.run_url) == url and not (found := look(store, record)).is_over:
            return found
    return None


def facts_of(record: JobRecord) -> dict[str, Any]:
    """A record as `--json` shows it."""
    return dataclasses.asdict(record)
