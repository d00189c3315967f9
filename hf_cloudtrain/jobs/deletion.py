"""Deleting a job: its record, and its folder on this machine. The run that it wrote stays.

1. a mark is created       no job ever gets its id again, so none continues its run by accident
2. the record is deleted   from here on the job does not exist
3. its cancel mark and its folder are deleted; until then the same call completes the deletion
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from hf_cloudtrain.errors import ConfigurationError, NoJobError
from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.records import JobRecord, JobStore
from hf_cloudtrain.jobs.submission import SUPERVISOR_LOCK, Submission
from hf_cloudtrain.runtime.files import locked


def find(store: JobStore, job: str) -> JobRecord | None:
    """The job that is to be deleted, as its engine knows it; None if only the rest of its deletion is left.

    Raises:
        NoJobError: there is no such job. ConfigurationError: it is not over.
    """
    try:
        record = store.read(job)
    except NoJobError:
        if job in store.deleted_ids() and store.home(job).exists():
            return None
        raise
    record = lifecycle.look(store, record)
    if not record.is_over:
        raise ConfigurationError(
            f"The job {record.id!r} is {record.state}. Nothing was deleted. Cancel it first: "
            f"`cloudtrain job cancel {record.id} --wait`"
        )
    with _not_running(home(store, record.id, record)):
        return record


def home(store: JobStore, job_id: str, record: JobRecord | None) -> Path:
    """The job's folder on this machine, which need not exist: the records of a copied store name the folders of the original."""
    own = store.home(job_id)
    if record is None or own.exists():
        return own
    try:
        found = Submission.load(record.home)
        is_ours = (found.store, found.id) == (store.url, record.id)
    except (OSError, ValueError):
        is_ours = False
    return Path(record.home) if is_ours else own


def delete(store: JobStore, job_id: str, home: Path) -> None:
    """Delete a job that is over, in the order above.

    Raises:
        ConfigurationError: its supervisor still runs.
    """
    with _not_running(home):
        store.delete(job_id)
        if home.exists():
            shutil.rmtree(home)


@contextlib.contextmanager
def _not_running(home: Path) -> Iterator[None]:
    """Hold the lock of a job's supervisor. Raises ConfigurationError if it runs."""
    with contextlib.ExitStack() as held:
        if home.is_dir():
            try:
                held.enter_context(locked(home / SUPERVISOR_LOCK))
            except BlockingIOError:
                raise ConfigurationError(
                    f"A process of this job still runs: it holds {str(home / SUPERVISOR_LOCK)!r}. Nothing was deleted."
                ) from None
        yield
