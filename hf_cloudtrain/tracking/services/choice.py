"""Whether an attempt goes on in the tracker run of the attempt before, and in which one if not."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from hf_cloudtrain.runtime.redaction import redact, secrets_of_environment
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.services.guard import TrackerGuard
from hf_cloudtrain.tracking.services.runs import TrackerRun, TrackerRuns
from hf_cloudtrain.tracking.services.service import TrackerContent, TrackerService, TrackerStart

logger = logging.getLogger(__name__)

_reported: dict[tuple[str, str], Storage] = {}
"""The run that was first in this process to report to a tracker run, by service and location."""


def start_run(
    storage: Storage,
    service: TrackerService,
    start: TrackerStart,
    begin: Callable[[TrackerRun], None],
    *,
    run: TrackerRun | None = None,
    apart: str | None = None,
) -> TrackerRun:
    """Start the tracker run of this attempt, or a new one if it turns out to be deleted; which one it is.

    Args:
        begin: starts a tracker run by the means of its service.
        run: as it was chosen before in this process.
        apart: see `choose_run`.
    """
    run = run or choose_run(storage, service, start, apart=apart)
    try:
        begin(run)
    except Exception as error:
        if not service.is_lost(error):
            raise
        run = begin_next(storage, service, start, run, "it was deleted")
        begin(run)
    return run


def content_of(
    storage: Storage, service: TrackerService, run: TrackerRun, step: int
) -> TrackerContent | None:
    """What a tracker run that has just started holds of this run; None where a different training reports to it, too.

    A script may train twice while one W&B run is active. Then a step in it may be of either training, so none may be left out.

    Args:
        step: from which the training resumes.
    """
    if run.is_shared:
        return None
    first = _reported.setdefault((service.name, service.location(run.id)), storage)
    content = service.sent(run.id)
    is_of_first = first.url != storage.url and content.newest >= 0
    is_older = run.is_new and step == 0 and content.newest > 0
    if not is_of_first and not is_older:
        return content
    logger.info(
        "The %s run %s holds a different training, too, so steps that are redone after a resume are in it twice.",
        service.name,
        run.id,
    )
    for runs in {one.url: TrackerRuns(one) for one in (first, storage)}.values():
        known = runs.newest(service.name)
        if known is not None and known.id == run.id and not known.is_shared:
            runs.add(TrackerRun(service.name, run.id, known.number + 1, is_shared=True))
    return None


def page_of(service: TrackerService, run: TrackerRun, guard: TrackerGuard) -> str:
    """Where users find a tracker run that has just started, which is linked to the one before: its URL, or its id."""
    found = run.id
    with guard("is not linked"):
        page = service.page(run.id)
        found = redact(page, secrets_of_environment()) if page else run.id
        if run.previous is not None:
            service.follows(run.previous, run.reason or "")
    return found


def choose_run(
    storage: Storage, service: TrackerService, start: TrackerStart, *, apart: str | None = None
) -> TrackerRun:
    """The tracker run of this attempt: the user's, else the recorded one, else a new one, which is recorded.

    Args:
        apart: why it must not go on with the recorded one, such as "the run starts over".

    Raises:
        StorageError: the records cannot be read or written.
        Exception: of the service.

    Example:
        >>> choose_run(storage, MLflow(), TrackerStart(500, Path("out")))
        TrackerRun(service='mlflow', id='4bc1…', number=1, previous=None, reason=None)
    """
    runs = TrackerRuns(storage)
    known = runs.newest(service.name)
    with service.patiently():
        chosen = start.chosen or service.users_id(start)
        if chosen is not None:
            return _of_user(runs, service, known, chosen, starts_over=start.step == 0 and apart is not None)
        if known is None:
            return runs.add(TrackerRun(service.name, service.new_id(start), 1))
        reason = apart or service.lacks(known.id)
        if reason is None:
            return known
        return begin_next(storage, service, start, known, reason)


def begin_next(
    storage: Storage, service: TrackerService, start: TrackerStart, before: TrackerRun, reason: str
) -> TrackerRun:
    """A new tracker run, linked to the one before, which cannot go on.

    Args:
        reason: why not, as in "was deleted".
    """
    with service.patiently():
        new = TrackerRun(service.name, service.new_id(start), before.number + 1, before.id, reason)
    new = TrackerRuns(storage).add(new)
    logger.warning(
        "The %s run %s does not go on (%s). This attempt reports to a new one, %s.",
        service.name,
        before.id,
        reason,
        new.id,
    )
    return dataclasses.replace(new, previous=before.id, reason=reason)


def _of_user(
    runs: TrackerRuns, service: TrackerService, known: TrackerRun | None, chosen: str, *, starts_over: bool
) -> TrackerRun:
    if known is not None and known.id == chosen:
        return dataclasses.replace(known, is_new=starts_over)
    if known is None:
        return dataclasses.replace(runs.add(TrackerRun(service.name, chosen, 1)), is_new=True)
    logger.warning(
        "This attempt reports to the %s run %s, which the script or its environment names; the one before reported to %s. If the "
        "script starts its tracker itself, let it pass that id.",
        service.name,
        chosen,
        known.id,
    )
    reason = "the user named a different one"
    new = runs.add(TrackerRun(service.name, chosen, known.number + 1, known.id, reason))
    return dataclasses.replace(new, is_new=True)
