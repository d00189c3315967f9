"""`run delete` and `job delete`: refuse what is still going on, name what is lost, and delete."""

from __future__ import annotations

import time
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.paths import RUN
from hf_cloudtrain.checkpoints.run_deletion import DELETED, DELETING, RunContents, delete_run, deleted_by
from hf_cloudtrain.checkpoints.titles import Titles
from hf_cloudtrain.cli.output import confirm, fail, say
from hf_cloudtrain.cli.runs import name_of
from hf_cloudtrain.errors import ConfigurationError, NoCheckpointError
from hf_cloudtrain.report.summary import Roles
from hf_cloudtrain.runtime.provenance import person
from hf_cloudtrain.runtime.text import count_text, duration_text, size_text, time_text
from hf_cloudtrain.tracking.status import ALIVE, RunState, quiet_seconds, run_state

CERTAIN = 86400.0
"""Seconds without a heartbeat after which no clock is wrong enough for the attempt to be alive."""
LOOK_SECONDS = 1.0
"""Between two reads of a heartbeat."""
MOST_NAMES = 5
"""Files that a message names."""


def delete(catalog: Catalog, *, force: bool, yes: bool) -> dict[str, Any]:
    """Delete a run; the record for `--json`."""
    catalog.attempts.check_any()  # else these are Trainer's own checkpoints, or the datasets of a store
    now = run_state(catalog)
    by = deleted_by(catalog)
    if by is not None and now.state != DELETING:
        raise NoCheckpointError(f"The run {catalog.storage.url!r} was deleted ({by}).")
    if by is None:
        _check_over(now)
    contents = RunContents.of(catalog)
    _check_no_run_within(catalog, contents)
    losses = _losses(catalog)
    what = f"the run {catalog.storage.url!r} ({count_text(len(contents.objects), 'object')}, {size_text(contents.size)})"
    if losses and not force:
        fail(
            f"{what[:1].upper()}{what[1:]} has checkpoints. {' '.join(losses)} Pass --force to delete it anyway."
        )
    if losses:
        say(f"Warning: {' '.join(losses)}")
    confirm(f"Delete {what}?", yes)
    if by is None and now.state == "killed" and (now.heartbeat_age_seconds or 0.0) < CERTAIN:
        _watch(catalog, now)
    who = person()
    shown = f"{time_text(time.time())}, by {who.get('user')} on {who.get('host')}"
    left = delete_run(catalog, contents, {**who, DELETED: shown})
    if contents.foreign:
        names = ", ".join(info.path for info in contents.foreign[:MOST_NAMES])
        say(f"Kept {count_text(len(contents.foreign), 'file')} that no training of the run wrote: {names}.")
    if left:
        fail(
            f"{count_text(len(left), 'object')} appeared during the deletion, such as {left[0]!r}: a process still writes "
            "to the run. Stop it, and run the same command again."
        )
    say(f"Deleted {what}.")
    return {
        "run_url": catalog.storage.url,
        "objects": len(contents.objects),
        "size": contents.size,
        "losses": losses,
        "kept": [info.path for info in contents.foreign],
    }


def _check_over(now: RunState) -> None:
    """Refuse a run that a training or a job writes to."""
    from hf_cloudtrain.jobs import lifecycle
    from hf_cloudtrain.jobs.records import JobStore

    job = lifecycle.writer_of(now.run_url, JobStore())
    if job is not None:
        raise ConfigurationError(
            f"The job {job.id!r} is {job.state} and writes to {now.run_url!r}. Nothing was deleted. Cancel it first: "
            f"`cloudtrain job cancel {job.id} --wait`"
        )
    if now.state in ALIVE:
        _refuse(now)


def _check_no_run_within(catalog: Catalog, contents: RunContents) -> None:
    """Refuse a run with another one in a folder that it has saved by name."""
    within = [info.path.removesuffix(f"/{RUN}") for info in contents.objects if info.path.endswith(f"/{RUN}")]
    if within:
        url = f"{catalog.storage.url.rstrip('/')}/{within[0]}"
        raise ConfigurationError(
            f"A different run is stored at {url!r}, in a folder of this one. Nothing was deleted. Delete that run first: "
            f"`cloudtrain run delete {url}`"
        )


def _refuse(now: RunState) -> None:
    raise ConfigurationError(
        f"Attempt {now.attempt} of {now.run_url!r} is training. Nothing was deleted. Stop it first: "
        f"`cloudtrain run stop {name_of(now.run_url)} --wait`"
    )


def _watch(catalog: Catalog, now: RunState) -> None:
    """Refuse a run whose newest attempt recorded no end and sends a heartbeat: its clock may be wrong."""
    assert now.attempt is not None
    say(
        f"Attempt {now.attempt} recorded no end. Watching it for {duration_text(quiet_seconds())}: a run that still sends "
        "heartbeats is not deleted."
    )
    before = catalog.attempts.read_progress(now.attempt)
    end = time.monotonic() + quiet_seconds()
    while time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        if catalog.attempts.read_progress(now.attempt) != before:
            _refuse(now)


def _losses(catalog: Catalog) -> list[str]:
    """What is lost with the run, a sentence each."""
    roles, titles = Roles.of(catalog), Titles(catalog)
    pinned = sorted(roles.pinned & {*roles.keys})
    titles.read([*roles.keys[-1:], roles.best, *pinned])

    def named(what: str, keys: list[CheckpointKey]) -> list[str]:
        return [f"{what} {', '.join(titles.of(key) for key in keys)}"] if keys else []

    best = [roles.best] if roles.best in roles.keys and roles.best is not None else []
    which = [*named("the newest is", roles.keys[-1:]), *named("the best is", best), *named("pinned:", pinned)]
    folders = sorted(NamedFolders(catalog).folders())
    losses = []
    if roles.keys:
        losses.append(f"It would lose {count_text(len(roles.keys), 'checkpoint')}: {'; '.join(which)}.")
    if folders:
        losses.append(f"It would lose what was saved by name: {', '.join(folders)}.")
    return losses
