"""Deleting a whole run, in an order that can be interrupted anywhere; the same call completes it.

    1. the deletion takes the next attempt number    a process that still trains sees it, and stops as overtaken
    2. the manifests are deleted                     from here on no checkpoint of the run exists
    3. the files and most records are deleted
    4. claims, attempts and run.json are deleted     until then the run is listed, so the deletion can be completed

The attempt of the deletion stays, one small record: a new run at this URL continues its numbers, so what an old machine
still uploads sorts below the new run's checkpoints. Files that no training of the run wrote stay, too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.paths import (
    ATTEMPTS,
    CHECKPOINTS,
    CLAIMS,
    FOLDERS,
    PAGE,
    PAGE_MARK,
    PROGRESS,
    RUN,
)
from hf_cloudtrain.errors import ManifestError, ObjectNotFoundError
from hf_cloudtrain.storage.backend import IncompleteUpload, ObjectInfo
from hf_cloudtrain.storage.client import MAX_RECORD_READ, Storage
from hf_cloudtrain.storage.names import META

DELETED = "deleted"
"""The fact of an attempt that is a deletion: who deleted the run."""
DELETING = "deleting"
"""The state of a run whose deletion is not complete."""
MARKED_BYTES = 4096
"""From the beginning of a page, where its mark is."""


@dataclass(frozen=True)
class RunContents:
    """What is stored below the URL of a run."""

    objects: Sequence[ObjectInfo]
    """What belongs to the run."""
    foreign: Sequence[ObjectInfo]
    """What does not: files of the user, or other runs."""
    uploads: Sequence[IncompleteUpload]

    @classmethod
    def of(cls, catalog: Catalog) -> RunContents:
        """As it is now: one listing, and one of unfinished uploads."""
        objects = catalog.storage.list("")
        claims = re.compile(rf"{re.escape(CLAIMS)}/([^/]+)\.json")
        claimed = {match[1] for info in objects if (match := claims.fullmatch(info.path))}

        pages = [info for info in objects if info.path == PAGE and info.size <= MAX_RECORD_READ]
        has_page = bool(pages) and is_page(catalog.storage)

        def is_own(path: str) -> bool:
            top, below, _ = path.partition("/")
            if path == PAGE:
                return has_page
            ours = top == META or top in claimed or re.fullmatch(r"checkpoint-\d+(\.a\d+(\.\d+)?)?", top)
            return bool(below and ours)

        uploads = [upload for upload in catalog.storage.incomplete() if is_own(upload.path)]
        own = [info for info in objects if is_own(info.path)]
        return cls(own, [info for info in objects if not is_own(info.path)], uploads)

    @property
    def size(self) -> int:
        """Bytes of what belongs to the run."""
        return sum(info.size for info in self.objects) + sum(upload.size for upload in self.uploads)


def delete_run(catalog: Catalog, contents: RunContents, facts: dict[str, str]) -> list[str]:
    """Delete a run; returns the paths that another process has written in the meantime.

    Args:
        facts: who deletes it, for people; `deleted` is shown.
    """
    storage = catalog.storage
    number = _number_of(catalog, facts)
    keep = {_attempt(number), f"{PROGRESS}/{number:06d}.json"}
    paths = [info.path for info in contents.objects if info.path not in keep]
    last = [path for path in paths if path.startswith((f"{CLAIMS}/", f"{ATTEMPTS}/"))]
    storage.delete(path for path in paths if path.startswith((f"{CHECKPOINTS}/", f"{FOLDERS}/")))
    storage.delete(path for path in paths if path != RUN and path not in last)
    storage.abort(contents.uploads)
    storage.delete(last)
    storage.delete([RUN])
    storage.delete(keep - {_attempt(number)})
    left = RunContents.of(catalog)
    return [info.path for info in left.objects if info.path != _attempt(number)]


def is_page(storage: Storage) -> bool:
    """Whether what is at `index.html` is the page of the run; True if nothing is there, False for a file of the user."""
    try:
        return PAGE_MARK in storage.read(PAGE)[:MARKED_BYTES]
    except ObjectNotFoundError:
        return True


def deleted_by(catalog: Catalog) -> str | None:
    """Who deleted the run, and when; None if it is not deleted."""
    number = max(catalog.attempts.numbers(), default=None)
    if number is None:
        return None
    try:
        return catalog.attempts.read(number).facts.get(DELETED)
    except (ObjectNotFoundError, ManifestError):
        return None


def _number_of(catalog: Catalog, facts: dict[str, str]) -> int:
    """The attempt of the deletion: a new one, or that of an interrupted deletion."""
    if deleted_by(catalog) is not None:
        return max(catalog.attempts.numbers())
    number = catalog.attempts.begin(time.time(), 0, None, facts).number
    catalog.attempts.write_progress(number, {"state": DELETING, "time": time.time()})
    return number


def _attempt(number: int) -> str:
    return f"{ATTEMPTS}/{number:06d}.json"
