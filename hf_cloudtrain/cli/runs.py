"""Which run a user means: a URL, a folder, or a name in the store.

The runs below `<store>/runs` have names: `glue-2` is `<store>/runs/glue-2`. The name of a job means the run that it writes
to, wherever that is.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import time
from typing import TYPE_CHECKING

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.attempts import run_urls
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, NoCheckpointError, NoJobError
from hf_cloudtrain.runtime.threads import answer_in_time
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.urls import normal_url, shown_url

if TYPE_CHECKING:
    from hf_cloudtrain.jobs.records import JobRecord

NAMES_SECONDS = 3.0
"""Seconds for the names that an error suggests."""


def open_catalog(run_url: str) -> Catalog:
    """The records of a run by its URL or folder; storage options come from the environment."""
    return Catalog(Storage(run_url, env.storage_options(None)))


def open_run(run: str) -> Catalog:
    """The records of a run by its name, URL or folder.

    Raises:
        NoCheckpointError: there is no run of this name. ConfigurationError: two runs have it.
    """
    return open_catalog(url_of(run))


def url_of(run: str) -> str:
    """The URL or folder of a run that a user names."""
    if "://" in run or run.startswith(("/", "~", ".")) or not run.strip():
        return run
    is_here = _is_run(run)
    if is_here and "/" in run:
        return run
    shown_url(run)  # raises for what looks like a mistyped URL
    below = _in_store(run)
    if is_here and below is not None:
        raise ConfigurationError(
            f"{run!r} is a run in this folder and a run in the store. Type './{run}' for the one in this folder, or "
            f"{below!r} for the other."
        )
    if below is not None:
        return below
    if is_here or "/" in run or os.path.exists(run):
        return run
    raise NoCheckpointError(_unknown(run))


def job_of(run_url: str) -> JobRecord | None:
    """The job of this store that writes to a run and may start a new attempt; None if the store does not answer."""
    from hf_cloudtrain.jobs import lifecycle
    from hf_cloudtrain.jobs.records import JobStore

    try:
        return lifecycle.writer_of(run_url, JobStore())
    except (CloudTrainError, OSError):
        return None


def runs_url() -> str:
    """Where the runs of the store are."""
    return f"{normal_url(env.store(None)).rstrip('/')}/runs"


def name_of(run_url: str) -> str:
    """The name of a run of the store; the URL of any other."""
    prefix = f"{shown_url(runs_url())}/"
    return run_url.removeprefix(prefix)


def add_names(found: list[str]) -> None:
    """Add the names of the jobs and of the runs in the store: one listing, and one that may take many requests."""
    from hf_cloudtrain.jobs.records import JobStore

    found += JobStore().ids()
    found += run_urls(Storage(runs_url(), env.storage_options(None)))


def _is_run(run: str) -> bool:
    return os.path.isdir(run) and bool(open_catalog(run).attempts.numbers())


def _in_store(run: str) -> str | None:
    below = f"{runs_url()}/{run}"
    if open_catalog(below).attempts.numbers():
        return below
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,80}", run):
        return None
    from hf_cloudtrain.jobs.records import JobStore

    try:
        return JobStore().read(run).run_url
    except NoJobError:
        return None


def _unknown(run: str) -> str:
    where = "" if os.environ.get(env.STORE) else f" ({env.STORE} is not set)"
    names: list[str] = []
    late = time.monotonic() + NAMES_SECONDS
    with contextlib.suppress(CloudTrainError, OSError):  # TimeoutError is an OSError
        answer_in_time(lambda: add_names(names), lambda: time.monotonic() > late)
    near = difflib.get_close_matches(run, list(names), n=1)
    hint = f" The nearest is {near[0]!r}." if near else ""
    return (
        f"There is no run {run!r} in the store {shown_url(env.store(None))!r}{where}, and no folder {run!r} here.{hint} "
        "`cloudtrain run list` shows the runs of the store; a run elsewhere is named by its URL."
    )
