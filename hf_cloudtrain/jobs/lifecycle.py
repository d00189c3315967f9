"""Jobs from submission to their end, as the command line uses them.

    prepare, submit    job file and folder -> record, home, copy of the folder -> engine
    look               the record, and what the engine knows beyond it
    resume             a job that is over or lost, from its newest checkpoint
    cancel             each node has its grace, then the engine kills what is left

The submitter writes the record until the engine has the job; from then on the supervisor does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.jobs.engines import Engine, EngineStatus, engine
from hf_cloudtrain.jobs.inventory import price_of
from hf_cloudtrain.jobs.node.workspace import copy_workspace
from hf_cloudtrain.jobs.records import JobRecord, JobStore
from hf_cloudtrain.jobs.spec.job import EngineName, Job
from hf_cloudtrain.jobs.submission import SUPERVISOR_LOCK, Submission
from hf_cloudtrain.runtime.files import locked
from hf_cloudtrain.runtime.process_tree import is_alive, this_process
from hf_cloudtrain.storage.urls import is_local, local_path, normal_url

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
    """Decide everything about a job, and refuse what is impossible, before anything is started or written.

    Id, home and run URL are those of the next job with this name, until `submit` reserves them.

    Args:
        engine_name: overrides the job file, as do `nodes` and `nproc_per_node`.
        workspace: folder to submit with the job.

    Raises:
        ConfigurationError: with what to do. NoDatasetError: there is no such dataset.
    """
    if workspace is not None and not workspace.is_dir():
        raise ConfigurationError(
            f"{str(workspace)!r} is not a folder. Name the folder with the job's code: -d DIR"
        )
    # The name that the user typed, where the folder is a link; "" for the root folder.
    code = "" if workspace is None else os.path.basename(os.path.abspath(workspace))
    job = job.model_copy(update={"engine": engine_name or job.engine})
    if workspace is not None:
        job = job.with_folder(code)
    plan = job.plan(nodes=nodes, nproc_per_node=nproc_per_node)
    job_id = store.next_id(job.name)
    return Submission(
        job=job,
        plan=dataclasses.replace(plan, price=_price(job, plan.nodes, store)),
        id=job_id,
        run_url=job.run_url or store.below("runs", job_id),
        store=store.url,
        home=store.home(job_id),
        has_workspace=workspace is not None,
        dataset_version=_dataset_version(job, store),
        code=code,
    )


def submit(
    submission: Submission,
    store: JobStore,
    workspace: Path | None = None,
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> JobRecord:
    """Submit a job to its engine; returns without waiting for its end.

    Args:
        submission: from `prepare`.
        on_bytes: called with the number of bytes after each copied piece of the workspace.

    Raises:
        ConfigurationError: with what to do; nothing runs then.
    """
    job = submission.job
    _check(submission, store)
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
    with _failure_recorded(store, record):
        _clear(submission.home)
        submission.home.mkdir(parents=True)
        if workspace is not None:
            excluded = own_folders(submission)
            target = submission.workspace / submission.code
            copy_workspace(workspace, target, leave_out=excluded, on_bytes=on_bytes)
        submission.workspace.mkdir(exist_ok=True)
        submission.save()
        return starter(submission.job).submit(submission, store, record)


def _check(submission: Submission, store: JobStore) -> None:
    """Refuse a job that cannot start now. Raises ConfigurationError."""
    submission.plan.own_variables(os.environ)
    starter(submission.job).check(submission)
    run_url = submission.job.run_url
    record = None if run_url is None else writer_of(run_url, store)
    if record is not None:  # two jobs that write to one run would overtake each other again and again
        raise ConfigurationError(
            f"The job {record.id!r} is {record.state} and writes to {run_url!r} already. Cancel it (`cloudtrain "
            f"job cancel {record.id}`), or give this job a different 'run_url'."
        )


def _clear(home: Path) -> None:
    """Delete the home of an old job whose record was deleted. Raises ConfigurationError if that job still runs."""
    if not home.exists():
        return
    try:
        with locked(home / SUPERVISOR_LOCK):
            shutil.rmtree(home)
    except BlockingIOError:
        raise ConfigurationError(
            f"{str(home)!r} belongs to a running job without a record in this store: its record was deleted, or it belongs "
            "to a different store with the same URL. Stop that job, or give this one a different name."
        ) from None


def own_folders(submission: Submission) -> list[Path]:
    """The folders of jobs and runs on this machine, to exclude from a workspace that contains them."""
    run = [Path(local_path(submission.run_url))] if is_local(submission.run_url) else []
    return [submission.home.parent.parent, *run]


def resume(store: JobStore, job_id: str) -> JobRecord:
    """Start a job again that is over or lost, with the same code and the same run.

    Raises:
        NoJobError: there is no such job. ConfigurationError: it still runs, or cannot be started.
    """
    record = store.read(job_id)
    if not Path(record.home).is_dir():
        host = record.submitted_by.get("host")
        raise ConfigurationError(
            f"{record.home!r} is not on this machine. Resume the job on {host!r}, where it was submitted."
        )
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(Path(record.home, "resume.lock")))
        except BlockingIOError:
            raise ConfigurationError(
                f"A second `cloudtrain job run --resume {record.id}` is already starting this job."
            ) from None
        return _resume(store, look(store, store.read(record.id)))


def _resume(store: JobStore, record: JobRecord) -> JobRecord:
    if not record.is_over:
        advice = f"is {record.state}. Cancel it first: `cloudtrain job cancel {record.id}`."
        raise ConfigurationError(f"The job {record.id!r} {advice}")
    if record.state == "finished":
        raise ConfigurationError(
            f"The job {record.id!r} has finished. To train again, submit the job file again."
        )
    submission = Submission.load_here(record.home)
    own = record.id, record.run_url, store.url  # the record is untrusted
    if (submission.id, submission.run_url, submission.store) != own:
        raise ConfigurationError(
            f"{record.home!r}, which the record of the job {record.id!r} names, belongs to the job {submission.id!r} of the "
            f"store {submission.store!r} with the run {submission.run_url!r}. Nothing was started. Set {env.STORE} to the "
            "store of its submission, or submit the job file again."
        )
    _check(submission, store)
    store.forget_cancel(record.id)
    record = store.write(record, state="queued", reason=None, restarts=0)
    with _failure_recorded(store, record):
        return starter(submission.job).submit(submission, store, record)


@contextlib.contextmanager
def _failure_recorded(store: JobStore, record: JobRecord) -> Iterator[None]:
    """Record why a job could not be started, unless a supervisor has it already and writes the record."""
    try:
        yield
    except BaseException as error:
        try:
            if store.read(record.id).state == "queued":
                reason = f"It could not be started: {error or type(error).__name__}"
                store.write(record, state="failed", reason=reason)
        except CloudTrainError as other:
            logger.warning("%s", other)  # the first error is the one to raise
        raise


def glance(record: JobRecord) -> JobRecord:
    """A record with what its engine knows now. Writes nothing. Raises CloudTrainError, OSError: the engine does not answer."""
    if record.is_over:
        return record
    status = _interrupted(record) or engine(record.engine).look(record)
    return record if status is None else dataclasses.replace(record, state=status.state, reason=status.reason)


def look(store: JobStore, record: JobRecord) -> JobRecord:
    """As `glance`; writes a final state to the store, except `lost`."""
    current = glance(record)
    # A lost job may come back, after its disk was mounted again or the clock was set.
    if current == record or not current.is_over or current.state == "lost":
        return current
    latest = store.read(record.id)
    if latest.is_over:
        return latest  # its supervisor wrote this, and exited, after the record was read
    starts = tuple(
        start if start.ended else dataclasses.replace(start, ended=time.time(), outcome=current.state)
        for start in latest.starts
    )
    return store.write(latest, state=current.state, reason=current.reason, starts=starts)


def _interrupted(record: JobRecord) -> EngineStatus | None:
    """The status of a job whose submitter was killed before an engine had it."""
    by = record.submitter
    if record.state != "queued" or record.handle or by.get("host") != platform.node() or is_alive(by):
        return None
    return EngineStatus("failed", "Its submission was interrupted, so nothing was started. Submit it again.")


def cancel(store: JobStore, job_id: str) -> JobRecord:
    """Ask a job to stop; returns at once.

    Raises:
        NoJobError: there is no such job. ConfigurationError: it is over, or its engine fails.
    """
    record = store.read(job_id)
    try:
        record = look(store, record)
    except CloudTrainError as error:
        logger.warning("%s", error)  # a running supervisor sees the mark without its engine
    if record.is_over:
        reason = f" {record.reason}" if record.state == "lost" else ""
        raise ConfigurationError(f"The job {record.id!r} is over: {record.state}.{reason}")
    store.ask_to_cancel(record.id)
    engine(record.engine).cancel(record, store)
    return record


def starter(job: Job | JobRecord) -> Engine:
    """The engine of a job."""
    return engine(job.engine)


def _dataset_version(job: Job, store: JobStore) -> int | None:
    if job.data is None:
        return None
    name, _, version = job.data.name.partition("@")
    return DatasetStore(store.url).find(name, int(version) if version else None).version


def _price(job: Job, nodes: int, store: JobStore) -> float | None:
    """Hourly price of all machines of a job, if it is known."""
    price = None if job.vm is None else price_of(job.vm, is_rented=job.engine == "skypilot", store=store.url)
    return None if price is None else nodes * price


def writer_of(run_url: str, store: JobStore) -> JobRecord | None:
    """The job that writes to a run and is not over; None if this store has no such job."""
    place = _place(run_url)
    for record in store.records():
        if _is_at(record.run_url, place) and not (found := look(store, record)).is_over:
            return found
    return None


def _is_at(recorded: str, place: str) -> bool:
    with contextlib.suppress(ConfigurationError):  # recorded by an older version, which refused less
        return _place(recorded) == place
    return False


def _place(run_url: str) -> str:
    """The same for all URLs of one run: a folder has a URL as well, and links may lead to it."""
    url = normal_url(run_url)
    return os.path.realpath(local_path(url)) if is_local(url) else url


def facts_of(record: JobRecord) -> dict[str, Any]:
    """A record as `--json` shows it."""
    return dataclasses.asdict(record)
