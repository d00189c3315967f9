"""What interrupted work has left on storage, and which of it may be deleted.

    deletion    a checkpoint whose manifest is deleted and whose files are not: any process may finish it
    upload      a folder, or parts of hosts, without a manifest, and files in it that were never finished
    save        the folder of a save that a later save of the same step has replaced
    file        an unfinished file, beside complete ones or among our records
    probe       the small object of a start that was killed while it checked the storage

Claims, attempts and step records are never deleted: a process that wakes up after weeks must find its folder still its own,
without files of other processes in it. A run in a folder of this one is left alone: its own clean knows its attempts.

The owner of an upload is known by its attempt's number; no clock but our own is trusted. An upload may go as soon as a newer
attempt has committed a checkpoint: whatever its owner still commits sorts below that one. Otherwise it may go if nothing has
changed during a watch: neither it, nor the heartbeat of its attempt and of the newest one, for at least four heartbeats and a
minute. An outbox that still holds it sends everything again.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import finish_retiring, retiring
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, decode_record
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.paths import CLAIMS
from hf_cloudtrain.errors import (
    ManifestError,
    NoCheckpointError,
    ObjectNotFoundError,
    StorageError,
    StorageUnavailableError,
)
from hf_cloudtrain.storage.backend import IncompleteUpload, ObjectInfo
from hf_cloudtrain.storage.names import META

logger = logging.getLogger(__name__)
T = TypeVar("T", ObjectInfo, IncompleteUpload)

WATCH_SECONDS = 60.0
"""The shortest watch."""
LONGEST_WATCH = 3600.0
"""The longest watch, whatever interval a heartbeat names."""
_RECORDS = f"/{META}/"
"""In the path of what a run in a folder of this run has recorded."""
LOOKS = 20
"""How often the heartbeats are read during a watch."""


@dataclass(frozen=True)
class LeftOver:
    """One thing that is left over."""

    what: str
    """`deletion`, `upload`, `save`, `file` or `probe`."""
    name: str
    """Its folder or path, below the run URL."""
    attempt: int | None = None
    """The attempt that wrote it, if known."""
    key: CheckpointKey | None = None
    """The checkpoint that it would have been, or was."""
    objects: tuple[ObjectInfo, ...] = ()
    uploads: tuple[IncompleteUpload, ...] = ()
    parts: tuple[str, ...] = ()
    """Records of hosts that have sent their files."""
    free: bool = False
    """Whether it may go without a watch."""

    @property
    def size(self) -> int:
        """Bytes of all that is there."""
        return sum(info.size for info in self.objects) + sum(upload.size for upload in self.uploads)

    @property
    def count(self) -> int:
        """Objects, records and unfinished files."""
        return len(self.objects) + len(self.uploads) + len(self.parts)


def find(catalog: Catalog) -> list[LeftOver]:
    """Everything that is left over, by name. Costs a listing of the whole run.

    Raises:
        StorageError: the storage does not answer.
    """
    return sorted(_Finder(catalog).left_overs(), key=lambda left: (left.name, left.what))


def remove(catalog: Catalog, left: LeftOver) -> bool:
    """Delete it; False if it has been committed since, so that it is not a left-over.

    Parts go first, so that a host that still has its files notices that it must send them again.
    """
    if left.what == "deletion":
        if left.key is not None:
            return finish_retiring(catalog, left.key)
        with contextlib.suppress(NoCheckpointError):  # another process has finished it
            NamedFolders(catalog).retire(NamedFolders(catalog).half_deleted().get(left.name, ""))
        return True
    whole = left.what == "upload"
    if whole and _is_committed(catalog, left):
        return False
    catalog.storage.delete(left.parts)
    catalog.storage.abort(left.uploads)
    catalog.storage.delete(info.path for info in left.objects)
    return not (whole and _is_committed(catalog, left))


def clean(
    catalog: Catalog, found: Sequence[LeftOver], on_watch: Callable[[float], None]
) -> Iterator[tuple[LeftOver, str | None]]:
    """Delete what may go; each left-over with the reason why it stays, None once it is deleted.

    Args:
        on_watch: called before a watch with the seconds that it takes.
    """
    for left in found:
        if left.free:
            yield left, _remove(catalog, left)
    others = [left for left in found if not left.free]
    if not others:
        return
    watch = Watch(catalog, others)
    on_watch(watch.seconds)
    gone = {(left.what, left.name): left for left in others}
    for left, reason in watch.wait():
        gone.pop((left.what, left.name), None)  # two unfinished uploads may be of one object
        yield left, reason or _remove(catalog, left)
    for left in gone.values():
        yield left, "it was completed or removed during the watch"


class Watch:
    """Compares left-overs and heartbeats before and after a pause.

    Example:
        >>> watch = Watch(catalog, [left for left in find(catalog) if not left.free])
        >>> for left, reason in watch.wait():
        ...     print(left.name, reason or "may go")
    """

    def __init__(self, catalog: Catalog, left: Sequence[LeftOver]) -> None:
        self._catalog = catalog
        self._left = list(left)
        self._attempts = catalog.attempts.numbers()
        owners = {item.attempt for item in left if item.attempt is not None} & {*self._attempts}
        self._beats = {
            number: catalog.attempts.read_progress(number) for number in (*owners, *self._attempts[-1:])
        }
        beats = [_seconds(beat.get("interval_seconds")) for beat in self._beats.values() if beat]
        self.seconds = min(
            LONGEST_WATCH, max(WATCH_SECONDS, *(4 * beat for beat in (*beats, env.heartbeat())))
        )
        """How long it takes."""

    def wait(self, sleep: Callable[[float], None] = time.sleep) -> Iterator[tuple[LeftOver, str | None]]:
        """Each left-over with the reason why it stays; None if nothing has changed."""
        moved: set[int] = set()
        for _ in range(LOOKS):
            if all(self._stays(item, moved) for item in self._left):
                break
            sleep(self.seconds / LOOKS)
            moved |= {
                number
                for number, beat in self._beats.items()
                if self._catalog.attempts.read_progress(number) != beat
            }
        # Only now: what was committed or has grown in the meantime is a different left-over, or not one.
        there = {(item.what, item.name): item for item in find(self._catalog)}
        begun = self._catalog.attempts.numbers() != self._attempts
        for item in self._left:
            reason = self._stays(item, moved)
            now = there.get((item.what, item.name))
            if reason is None and begun and item.attempt is not None:
                reason = "a new attempt has begun"
            if reason is None and now is not None and replace(now, free=item.free) != item:
                reason = "it has changed"
            if now is not None:
                yield item, reason

    def _stays(self, item: LeftOver, moved: set[int]) -> str | None:
        if item.what not in ("upload", "deletion"):
            return None  # no process needs so long for it
        if any(re.search(r"/\d+-of-\d+\.json$", path) for path in item.parts):
            return "another host may still have the rest: `cloudtrain checkpoint flush` there finishes it"
        for number in filter(None, (item.attempt, *self._attempts[-1:])):
            if number in moved:
                return f"attempt {number} still sends heartbeats"
            if self._beats.get(number) is None:
                return f"attempt {number} has no heartbeat, so it may still be running"
        return None


class _Finder:
    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        uploads, objects = _without_nested_runs(_incomplete(catalog), catalog.storage.list(""))
        # After the listing, so that what was committed in between is not a left-over.
        self._keys = catalog.checkpoints()
        self._named = NamedFolders(catalog).folders()
        self._retiring = set(retiring(catalog)) - set(self._keys)
        self._half_deleted = set(NamedFolders(catalog).half_deleted()) - self._named
        self._records = {info.path: info for info in objects if info.path.startswith(f"{META}/")}
        self._parts = self._parts_without_manifest()
        self._objects = _by_folder(objects)
        self._uploads = _by_folder(uploads)
        self._homes = {folder: key for folder in {*self._objects, *self._uploads} if (key := _key_in(folder))}
        self._suffixed = set(self._homes.values())

    def left_overs(self) -> Iterator[LeftOver]:
        homeless = {*self._parts, *self._retiring}
        for folder in sorted({*self._objects, *self._uploads} - {"", META}):
            found = self._in_folder(folder)
            if found is not None:
                yield found
                if found.key is not None:
                    homeless.discard(found.key)
        for folder in sorted(self._half_deleted):
            yield LeftOver("deletion", folder, **self._contents(folder), free=True)
        for key in homeless:  # it has records only
            yield self._of_checkpoint(key, f"{META}/{'retiring' if key in self._retiring else 'parts'}/{key}")
        for path, info in self._records.items():
            if re.fullmatch(rf"{re.escape(META)}/(?:probes/)?probe-[0-9a-f]{{16}}", path):
                yield LeftOver("probe", path, objects=(info,))
        for upload in self._uploads.get(META, ()):
            yield LeftOver("file", upload.path, uploads=(upload,))

    def _in_folder(self, folder: str) -> LeftOver | None:
        """What a folder below the run is; None if it is complete, or not ours."""
        key = self._key_of(folder)
        if key is not None and key not in self._keys:
            return self._of_checkpoint(key, folder)
        if key is not None and self._is_replaced(key, folder):
            return LeftOver("save", folder, key.attempt, **self._contents(folder), free=True)
        if key is not None or folder in self._named:
            # All of it has arrived, so no process is still sending.
            uploads = tuple(self._uploads.get(folder, ()))
            attempt = key.attempt if key else None
            return LeftOver("file", folder, attempt, uploads=uploads, free=True) if uploads else None
        if folder in self._half_deleted:
            return None
        if f"{META}/claims/{folder}.json" not in self._records or folder.startswith("checkpoint-"):
            return None
        attempt = _claimed_by(self._catalog, folder)
        return LeftOver("upload", folder, attempt, **self._contents(folder), free=self._is_below(attempt))

    def _of_checkpoint(self, key: CheckpointKey, name: str) -> LeftOver:
        deletion = key in self._retiring
        return LeftOver(
            "deletion" if deletion else "upload",
            name,
            key.attempt,
            key,
            **self._contents(name),
            parts=self._parts.get(key, ()),
            free=deletion or self._is_below(key.attempt),
        )

    def _key_of(self, folder: str) -> CheckpointKey | None:
        """The checkpoint of a folder, by its name, else by its claim."""
        match = re.fullmatch(r"checkpoint-(0|[1-9]\d{0,14})", folder)
        if match is None:
            return self._homes.get(folder)
        for key in self._keys:
            # Most plain folders belong to a checkpoint that exists, so their claim need not be read.
            if key.step == int(match[1]) and key not in self._suffixed:
                return key
        attempt = _claimed_by(self._catalog, folder)
        return None if attempt is None else CheckpointKey(attempt, int(match[1]))

    def _is_replaced(self, key: CheckpointKey, folder: str) -> bool:
        """Whether a checkpoint exists and has its files in a different folder."""
        plain = f"checkpoint-{key.step}"
        folders = {other for other, owner in self._homes.items() if owner == key} | {plain} & set(
            self._objects
        )
        if folders <= {folder}:
            return False
        try:
            return self._catalog.read(key).folder != folder
        except (ManifestError, NoCheckpointError):
            return False

    def _parts_without_manifest(self) -> dict[CheckpointKey, tuple[str, ...]]:
        found: dict[CheckpointKey, tuple[str, ...]] = {}
        for path in self._records:
            match = re.fullmatch(rf"{re.escape(META)}/parts/([^/]+)/.+", path)
            key = CheckpointKey.named(match[1]) if match else None
            if key is not None and key not in self._keys:
                found[key] = (*found.get(key, ()), path)
        return found

    def _contents(self, folder: str) -> dict[str, Any]:
        return {
            "objects": tuple(self._objects.get(folder, ())),
            "uploads": tuple(self._uploads.get(folder, ())),
        }

    def _is_below(self, attempt: int | None) -> bool:
        """Whether a newer attempt has committed a checkpoint since."""
        return attempt is not None and bool(self._keys) and self._keys[-1].attempt > attempt


def _key_in(folder: str) -> CheckpointKey | None:
    """The checkpoint of a folder that has an attempt in its name."""
    match = re.fullmatch(r"checkpoint-(0|[1-9]\d{0,14})\.a([1-9]\d{0,8})(?:\.[1-9]\d{0,8})?", folder)
    return CheckpointKey(int(match[2]), int(match[1])) if match else None


def _incomplete(catalog: Catalog) -> Sequence[IncompleteUpload]:
    try:
        return catalog.storage.incomplete()
    except StorageUnavailableError:
        raise
    except StorageError as error:  # a server that cannot list them, or a key that may not
        logger.warning("Cannot list unfinished uploads, so they are not cleaned. %s", error)
        return []


def _without_nested_runs(
    uploads: Sequence[IncompleteUpload], objects: Sequence[ObjectInfo]
) -> tuple[list[IncompleteUpload], list[ObjectInfo]]:
    """What is not below a folder that holds the records of a run of its own."""
    paths = [*(upload.path for upload in uploads), *(info.path for info in objects)]
    runs = tuple({f"{path.partition(_RECORDS)[0]}/" for path in paths if _RECORDS in path})
    return (
        [upload for upload in uploads if not upload.path.startswith(runs)],
        [info for info in objects if not info.path.startswith(runs)],
    )


def _by_folder(items: Iterable[T]) -> dict[str, list[T]]:
    """Items by the first part of their paths; "" for those outside of folders."""
    found: dict[str, list[T]] = {}
    for item in items:
        folder, below, _ = item.path.partition("/")
        found.setdefault(folder if below else "", []).append(item)
    return found


def _remove(catalog: Catalog, left: LeftOver) -> str | None:
    if remove(catalog, left):
        return None
    return "it has just been committed; check its files with `cloudtrain checkpoint verify`"


def _claimed_by(catalog: Catalog, folder: str) -> int | None:
    """The attempt that claimed a folder; None if unknown."""
    path = f"{CLAIMS}/{folder}.json"
    try:
        owner = decode_record(catalog.storage.read(path), f"claim {path!r}").get("attempt")
    except (ObjectNotFoundError, ManifestError):
        return None
    return owner if type(owner) is int and owner > 0 else None


def _is_committed(catalog: Catalog, left: LeftOver) -> bool:
    return left.name in NamedFolders(catalog).folders() if left.key is None else catalog.holds(left.key)


def _seconds(value: Any) -> float:
    """A number of an untrusted record."""
    return float(value) if type(value) in (int, float) and 0 < value < LONGEST_WATCH else 0.0
