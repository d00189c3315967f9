"""What exists in a run: the only module that decides it.

A checkpoint exists if and only if its manifest does. Its folder is claimed before its first byte, so no object of a
committed checkpoint is ever overwritten; the manifest is created exclusively, last, and never changed. Newest is by
(attempt, step), so one LIST of names answers it.

    <run URL>/.cloudtrain/
        run.json                              name, created, versions, command line
        attempts/000003.json                  exclusive create: who, where, resumed from what
        claims/checkpoint-500.json            exclusive create: which attempt may write that folder
        parts/000003-0000000500/0-of-2.json   what one host uploaded, see parts.py
        checkpoints/000003-0000000500.json    the commit
        folders/final-000001.json             the commit of any other folder
        pins/000003-0000000500.json           a person wants this one kept
        retiring/000003-0000000500.json       the manifest of one whose deletion has begun, until it is over
        best.json, last.json                  pointers
        stop.json                             which attempt is asked to stop
        progress/000003.json                  heartbeat
        steps/000003-0001.jsonl               step and metric records
"""

from __future__ import annotations

import dataclasses
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.checkpoints.manifest import (
    CheckpointKey,
    Manifest,
    decode_record,
    encode_record,
    parse_checkpoint_key,
    parse_folder_key,
    texts,
)
from hf_cloudtrain.errors import (
    ManifestError,
    NoCheckpointError,
    ObjectNotFoundError,
    StorageUnavailableError,
)
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.client import DELETES_AT_ONCE, Storage
from hf_cloudtrain.storage.names import META

logger = logging.getLogger(__name__)

READS_AT_ONCE = 8
"""Small records fetched at once: they wait for answers, not for bandwidth."""
SETTLE_SECONDS = 1.0
"""Where exclusive create is not honoured: time after which two that took one number at once see which of them has it."""

MAX_ATTEMPT = 999_999_999
"""A number that only a forged record can have: a run that starts every second gets there in 30 years."""

_RUN = f"{META}/run.json"
_STOP = f"{META}/stop.json"
_ATTEMPTS = f"{META}/attempts"
_CLAIMS = f"{META}/claims"
_PARTS = f"{META}/parts"
_CHECKPOINTS = f"{META}/checkpoints"
_FOLDERS = f"{META}/folders"
_PINS = f"{META}/pins"
_RETIRING = f"{META}/retiring"


@dataclass(frozen=True)
class Attempt:
    """One start of a run, as recorded on storage."""

    number: int
    nonce: str
    started: float = 0.0
    """Seconds since 1970 on that machine."""
    global_step: int = 0
    """Where it began."""
    resumed_from: CheckpointKey | None = None
    exclusive: bool = True
    """Whether the storage honoured exclusive create when it started."""
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    """Host, versions, command line: for people."""


class Catalog:
    """The records of one run.

    Example:
        >>> catalog = Catalog(Storage("s3://bucket/runs/mrpc"))
        >>> catalog.newest()
        CheckpointKey(attempt=3, step=500)
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    # Attempts

    def begin_attempt(
        self, started: float, global_step: int, resumed_from: CheckpointKey | None, facts: dict[str, str]
    ) -> Attempt:
        """Take the next attempt number by an exclusive create; losing a race takes the one after.

        Where the storage does not honour it, the last of those who write one number at the same moment has it.
        """
        number = max(self.attempt_numbers(), default=0) + 1
        while True:
            if number > MAX_ATTEMPT:
                raise ManifestError(
                    f"{self.storage.url!r} holds a record of attempt {number - 1}, which no training has made. Delete "
                    f"{_attempt_path(number - 1)!r} there, or use another run URL."
                )
            attempt = Attempt(
                number=number,
                nonce=secrets.token_hex(16),
                started=started,
                global_step=global_step,
                resumed_from=resumed_from,
                exclusive=self.storage.exclusive is not False,
                facts=facts,
            )
            if self.storage.create(_attempt_path(number), encode_record(dataclasses.asdict(attempt))) and (
                self._still_has(attempt)
            ):
                # Tried by every attempt: the first may have died between the two.
                self.storage.create(_RUN, encode_record({"created": started, **facts}))
                return attempt
            number += 1

    def attempt_numbers(self) -> list[int]:
        """Numbers of all attempts, ascending."""
        names = (
            re.fullmatch(rf"{re.escape(_ATTEMPTS)}/(0*([0-9]{{1,9}}))\.json", info.path)
            for info in self.storage.list(_ATTEMPTS)
        )
        return sorted(int(name[2]) for name in names if name and f"{int(name[2]):06d}" == name[1])

    def attempts(self, last: int = 0) -> list[Attempt]:
        """All attempts or the `last` few, ascending. Unreadable ones are left out with a warning."""
        (found,) = in_threads(self._attempt_or_none, (self.attempt_numbers()[-last:], READS_AT_ONCE))
        return [attempt for attempt in found if attempt is not None]

    def attempt(self, number: int) -> Attempt:
        """One attempt. Raises ObjectNotFoundError, ManifestError."""
        return _parse_attempt(self.storage.read(_attempt_path(number)), number)

    def overtaken_by(self, attempt: int) -> int | None:
        """The number of a newer attempt, if one has started (law 6)."""
        newest = max(self.attempt_numbers(), default=0)
        return newest if newest > attempt else None

    def request_stop(self, asked: float, facts: dict[str, str]) -> int | None:
        """Ask the newest attempt to save and stop; its number, or None where none has ever started.

        An attempt that begins later is not meant: a person who starts the run again wants it to train.

        Args:
            asked: seconds since 1970, for people.
            facts: who asks, for people.
        """
        newest = max(self.attempt_numbers(), default=None)
        if newest is not None:
            self.storage.write(_STOP, encode_record({**facts, "attempt": newest, "time": asked}))
        return newest

    def stop_requested(self, attempt: int) -> bool:
        """Whether this attempt, or a newer one, was asked to stop; one small request."""
        try:
            number = decode_record(self.storage.read(_STOP), "stop request").get("attempt")
        except ObjectNotFoundError:
            return False
        except ManifestError as error:
            logger.debug("%s", error)  # asked at every heartbeat: a warning would be one, too
            return False
        return type(number) is int and number >= attempt

    def is_holder(self, attempt: Attempt) -> bool:
        """Whether nobody else has taken the same number, which only storage without exclusive create allows."""
        if attempt.exclusive:
            return True
        try:
            return self.attempt(attempt.number).nonce == attempt.nonce
        except (ObjectNotFoundError, ManifestError):
            return True  # it names nobody else

    # Checkpoints

    def checkpoints(self) -> list[CheckpointKey]:
        """All committed checkpoints, oldest first, by one LIST."""
        return sorted(key for key in map(_checkpoint_of, self._names(_CHECKPOINTS)) if key)

    def known_checkpoints(self) -> list[CheckpointKey]:
        """As `checkpoints`, and not misled by a listing that lags: the pointer `last` may name a newer one.

        For decisions that would lose work. It costs one small request more.
        """
        keys = self.checkpoints()
        last = self.pointer("last")
        if last is not None and last > max(keys, default=CheckpointKey(0, 0)) and self.holds(last):
            logger.warning("The listing of %r lacks %s, which exists.", self.storage.url, last)
            keys.append(last)
        return keys

    def newest(self) -> CheckpointKey | None:
        """The newest committed checkpoint: the highest attempt that has one, and its highest step."""
        return max(self.checkpoints(), default=None)

    def read(self, key: CheckpointKey) -> Manifest:
        """The manifest of a checkpoint. Raises NoCheckpointError, ManifestError."""
        try:
            data = self.storage.read(_checkpoint_path(key))
        except ObjectNotFoundError:
            raise NoCheckpointError(
                f"There is no checkpoint {str(key)!r} in {self.storage.url!r}. `cloudtrain checkpoint list "
                f"{self.storage.url}` shows those that exist."
            ) from None
        return self._parse(key, data)

    def holds(self, key: CheckpointKey) -> bool:
        """Whether a checkpoint is committed; one small request, however many there are."""
        return self._exists(_checkpoint_path(key))

    def claim(self, key: CheckpointKey, nonce: str, *, exclusive: bool) -> str:
        """The folder that an attempt may write for a step, claimed before its first byte.

        Args:
            exclusive: whether the storage honours exclusive create; where not, only attempt 1 gets the plain name.
        """
        plain = f"checkpoint-{key.step}"
        suffixed = f"{plain}.a{key.attempt}"
        if not exclusive and key.attempt > 1:
            return suffixed
        record = encode_record({"attempt": key.attempt, "nonce": nonce})
        path = f"{_CLAIMS}/{plain}.json"
        if self.storage.create(path, record):
            return plain
        try:
            owner = decode_record(self.storage.read(path), f"claim {path!r}")
        except (ManifestError, ObjectNotFoundError):
            owner = {}  # damaged: whoever it was, it was not us
        # The same attempt again: an upload that was cut off goes on in its own folder. The nonce tells two apart that
        # have one number.
        same = owner.get("attempt") == key.attempt and _of_attempt(owner.get("nonce")) == _of_attempt(nonce)
        return plain if same else suffixed

    def claimed_by(self, folder: str) -> int | None:
        """The attempt that claimed a folder; None where nobody knows."""
        try:
            path = f"{_CLAIMS}/{folder}.json"
            owner = decode_record(self.storage.read(path), f"claim {path!r}").get("attempt")
        except (ObjectNotFoundError, ManifestError):
            return None
        return owner if type(owner) is int and owner > 0 else None

    def commit(self, manifest: Manifest) -> bool:
        """Make a checkpoint exist. False where it exists already from another save of the same (attempt, step)."""
        return self._commit(f"{_CHECKPOINTS}/{manifest.key}.json", manifest)

    def _commit(self, path: str, manifest: Manifest) -> bool:
        data = manifest.encode()
        Manifest.parse(data, manifest.key)  # what we cannot read back must not be committed
        try:
            created = self.storage.create(path, data)
        except StorageUnavailableError:
            # The answer may be lost and the object stored: look before saying that it failed.
            created = self._holds(path, manifest.nonce)
            if not created:
                raise
        if created:
            self._check_written(path, data)
        return created or self._holds(path, manifest.nonce)

    # Retiring

    def retire(self, key: CheckpointKey, *, go_on: Callable[[], bool] = lambda: True) -> bool:
        """Delete a checkpoint: the manifest first, so that a half-deleted one is none, then the data.

        Before that the manifest is written down as retiring, so that a deletion that is cut off can be finished. The
        claim stays: no other attempt ever gets the folder, so whoever still deletes there, or wakes up and deletes on,
        deletes nothing that counts. Which one may go is the caller's question; see `protected`.

        Args:
            go_on: asked between requests; at the first no it is left to `finish_retiring`.

        Returns:
            Whether everything is gone.

        Raises:
            NoCheckpointError, ManifestError, StorageError
        """
        manifest = self.read(key)
        self.storage.write(_retiring_path(key), manifest.encode())
        self.storage.delete([_checkpoint_path(key)])
        return self._delete_files(key, manifest, go_on)

    def retiring(self) -> list[CheckpointKey]:
        """Checkpoints whose deletion has begun and is not over, oldest first, by one LIST."""
        return sorted(key for key in map(_checkpoint_of, self._names(_RETIRING)) if key)

    def finish_retiring(self, key: CheckpointKey, *, go_on: Callable[[], bool] = lambda: True) -> bool:
        """Delete what a deletion that was cut off has left; whether everything is gone.

        One that was cut off before its manifest went still exists, and stays: `retire` begins anew.
        """
        if self.holds(key):
            return False
        try:
            manifest = self._parse(key, self.storage.read(_retiring_path(key)))
        except ObjectNotFoundError:
            return True  # somebody else has finished it
        except ManifestError as error:
            # It would stop every later deletion, and names no files: they are found by their folder.
            logger.warning("%s `cloudtrain run clean %s` finds what is left of it.", error, self.storage.url)
            self.storage.delete([_retiring_path(key)])
            return True
        return self._delete_files(key, manifest, go_on)

    def protected(self) -> dict[CheckpointKey, str]:
        """Checkpoints that no automatic deletion touches, each with the reason in words (law 10)."""
        keys = self.checkpoints()
        reasons: dict[CheckpointKey, str] = {}
        for attempt in self.attempts(last=1):
            # Once it has committed one of its own, the run goes on from that.
            if attempt.resumed_from is not None and not any(key.attempt >= attempt.number for key in keys):
                reasons[attempt.resumed_from] = f"attempt {attempt.number} resumed from it"
        reasons |= dict.fromkeys(self.pins(), "it is pinned")
        best = self.pointer("best")
        if best is not None:
            reasons[best] = "it is the best one"
        if keys:
            reasons[keys[-1]] = "it is the newest one"
        return reasons

    def pins(self) -> list[CheckpointKey]:
        """Checkpoints that a person wants kept, oldest first."""
        return sorted(key for key in map(_checkpoint_of, self._names(_PINS)) if key)

    def pin(self, key: CheckpointKey) -> None:
        """Keep a checkpoint from every automatic deletion. Raises NoCheckpointError where it does not exist."""
        self.storage.write(_pin_path(key), encode_record({"attempt": key.attempt, "step": key.step}))
        try:
            self.read(key)  # looked at after the pin: whoever retires looks for pins before
        except NoCheckpointError:
            self.unpin(key)
            raise

    def unpin(self, key: CheckpointKey) -> None:
        """Take a pin away; none is fine."""
        self.storage.delete([_pin_path(key)])

    def is_pinned(self, key: CheckpointKey) -> bool:
        """Whether a checkpoint is pinned; one small request."""
        return self._exists(_pin_path(key))

    def _delete_files(self, key: CheckpointKey | str, manifest: Manifest, go_on: Callable[[], bool]) -> bool:
        files = [manifest.object_path(entry) for entry in manifest.files]
        # Also what the manifest does not name: of a try that failed, or of a save that was replaced before its commit.
        there = [*self.storage.list(manifest.folder), *self.storage.list(f"{_PARTS}/{key}")]
        paths = list(dict.fromkeys([*files, *(info.path for info in there)]))
        for start in range(0, len(paths), DELETES_AT_ONCE):
            if not go_on():
                return False
            self.storage.delete(paths[start : start + DELETES_AT_ONCE])
        self.storage.delete([_pin_path(key)])
        self.storage.delete([_retiring_path(key)])  # last: until then it can be finished
        return True

    # Other folders

    def begin_folder(self, name: str, nonce: str, attempt: int = 0) -> tuple[str, str]:
        """(key, folder) for a new version of a named folder, claimed before its first byte.

        Args:
            attempt: who saves it; 0: a process that has begun none.
        """
        version = 1
        record = encode_record({"attempt": attempt, "nonce": nonce})
        while True:
            folder = _versioned_folder(name, version)
            if self.storage.create(f"{_CLAIMS}/{folder}.json", record):
                return f"{name}-{version:06d}", folder
            version += 1

    def commit_folder(self, manifest: Manifest) -> bool:
        """Make a named folder exist. False where somebody else's has its key."""
        return self._commit(_folder_path(manifest.key), manifest)

    def folders(self) -> list[str]:
        """Keys of all named folders (`final-000001`), sorted."""
        return [key for key in self._names(_FOLDERS) if parse_folder_key(key)]

    def named_folders(self) -> set[str]:
        """Where the named folders that are committed have their files."""
        return {_versioned_folder(*_name_and_version(key)) for key in self.folders()}

    def read_folder(self, key: str) -> Manifest:
        """The manifest of a named folder."""
        try:
            return self._parse_folder(key, self.storage.read(_folder_path(key)))
        except ObjectNotFoundError:
            raise NoCheckpointError(f"There is no folder {key!r} in {self.storage.url!r}.") from None

    def _parse_folder(self, key: str, data: bytes) -> Manifest:
        manifest = Manifest.parse(data, key)
        if manifest.folder != _versioned_folder(*_name_and_version(key)):
            raise ManifestError(f"The manifest {key!r} names the folder {manifest.folder!r} of another one.")
        return manifest

    def holds_folder(self, key: str) -> bool:
        """Whether a named folder is committed."""
        return self._exists(_folder_path(key))

    def retire_folder(self, key: str) -> None:
        """Delete a named folder in the order of `retire`; once more finishes one that was cut off.

        Its claim stays, so that its version is never given to another one.

        Raises:
            NoCheckpointError, ManifestError, StorageError
        """
        try:
            manifest = self.read_folder(key)
        except NoCheckpointError:
            if key not in self.retiring_folders():
                raise
            manifest = self._parse_folder(key, self.storage.read(_retiring_path(key)))
        else:
            self.storage.write(_retiring_path(key), manifest.encode())
            self.storage.delete([_folder_path(key)])
        self._delete_files(key, manifest, lambda: True)

    def retiring_folders(self) -> list[str]:
        """Keys of named folders whose deletion has begun and is not over, sorted."""
        return [key for key in self._names(_RETIRING) if parse_folder_key(key)]

    def half_deleted_folders(self) -> dict[str, str]:
        """Where named folders whose deletion has begun have what is left of their files: keys by folder."""
        return {_versioned_folder(*_name_and_version(key)): key for key in self.retiring_folders()}

    # Pointers and progress

    def point(self, name: str, key: CheckpointKey, metric: float | None = None) -> None:
        """Move the pointer `best` or `last`. A convenience for people and tools: nothing decides by it but `best`."""
        self.storage.write(
            f"{META}/{name}.json", encode_record({"attempt": key.attempt, "step": key.step, "metric": metric})
        )

    def pointer(self, name: str) -> CheckpointKey | None:
        """Where the pointer `best` or `last` points; None where there is none, or a damaged one."""
        try:
            record = decode_record(self.storage.read(f"{META}/{name}.json"), f"pointer {name!r}")
            return _key_of(record, f"pointer {name!r}")
        except ObjectNotFoundError:
            return None
        except ManifestError as error:
            logger.warning("%s It is left out of account.", error)
            return None

    def run_facts(self) -> dict[str, Any] | None:
        """What run.json says; None where no run has started here."""
        try:
            return decode_record(self.storage.read(_RUN), "record 'run.json'")
        except ObjectNotFoundError:
            return None

    def write_progress(self, attempt: int, record: dict[str, Any]) -> None:
        """Store the heartbeat of an attempt."""
        self.storage.write(f"{META}/progress/{attempt:06d}.json", encode_record(record))

    def read_progress(self, attempt: int) -> dict[str, Any] | None:
        """The last heartbeat of an attempt; None where it never had one, or a damaged one."""
        what = f"heartbeat of attempt {attempt}"
        try:
            return decode_record(self.storage.read(f"{META}/progress/{attempt:06d}.json"), what)
        except ObjectNotFoundError:
            return None
        except ManifestError as error:
            logger.warning("%s", error)
            return None

    def write_steps(self, attempt: int, batch: int, lines: bytes) -> None:
        """Store one batch of step and metric records."""
        self.storage.write(f"{META}/steps/{attempt:06d}-{batch:04d}.jsonl", lines)

    def read_steps(self) -> dict[int, list[bytes]]:
        """All batches of step and metric records by attempt, in order."""
        found = []
        for info in self.storage.list(f"{META}/steps"):
            match = re.fullmatch(rf"{re.escape(META)}/steps/(\d+)-(\d+)\.jsonl", info.path)
            if match:
                found.append((int(match[1]), int(match[2]), info.path))
        found.sort()
        (batches,) = in_threads(self.storage.read, ([path for _, _, path in found], READS_AT_ONCE))
        by_attempt: dict[int, list[bytes]] = {}
        for (attempt, _, _), batch in zip(found, batches, strict=True):
            by_attempt.setdefault(attempt, []).append(batch)
        return by_attempt

    def _parse(self, key: CheckpointKey, data: bytes) -> Manifest:
        manifest = Manifest.parse(data, str(key))
        if (manifest.attempt, manifest.step) != (key.attempt, key.step):
            raise ManifestError(
                f"The manifest {str(key)!r} is of attempt {manifest.attempt}, step {manifest.step}."
            )
        if not key.may_be_in(manifest.folder):
            raise ManifestError(
                f"The manifest {str(key)!r} names the folder {manifest.folder!r} of another one."
            )
        return manifest

    def _names(self, folder: str) -> list[str]:
        return [
            info.path[len(folder) + 1 : -len(".json")]
            for info in self.storage.list(folder)
            if info.path.endswith(".json") and "/" not in info.path[len(folder) + 1 :]
        ]

    def _exists(self, path: str) -> bool:
        try:
            self.storage.read(path)
        except ObjectNotFoundError:
            return False
        return True

    def _attempt_or_none(self, number: int) -> Attempt | None:
        try:
            return self.attempt(number)
        except (ManifestError, ObjectNotFoundError) as error:
            logger.warning("%s", error)
            return None

    def _still_has(self, attempt: Attempt) -> bool:
        if attempt.exclusive:
            return True
        time.sleep(SETTLE_SECONDS)  # whoever saw the number free at the same moment has written by then
        return self.is_holder(attempt)

    def _check_written(self, path: str, data: bytes) -> None:
        """Look at what we have just created: nothing could be restored by a record that changed on its way."""
        found = self._read_or_none(path)
        if found == data or (again := self._read_or_none(path)) == data:
            return
        if found is not None and again is not None:
            # It is ours and of no use to anybody; left there, it would keep the good one out for ever.
            self.storage.delete([path])
        raise StorageUnavailableError(
            f"The storage {self.storage.url!r} does not hold what was written to {path!r}. It is sent again."
        )

    def _read_or_none(self, path: str) -> bytes | None:
        try:
            return self.storage.read(path)
        except ObjectNotFoundError:
            return None

    def _holds(self, path: str, nonce: str) -> bool:
        try:
            return decode_record(self.storage.read(path), f"record {path!r}").get("nonce") == nonce
        except (ObjectNotFoundError, ManifestError):
            return False


def run_urls(storage: Storage) -> list[str]:
    """Names of the runs below a storage, found by their records. Costs one listing of everything below."""
    suffix = f"/{_RUN}"
    return [info.path[: -len(suffix)] for info in storage.list("") if info.path.endswith(suffix)]


def _attempt_path(number: int) -> str:
    return f"{_ATTEMPTS}/{number:06d}.json"


def _checkpoint_path(key: CheckpointKey) -> str:
    return f"{_CHECKPOINTS}/{key}.json"


def _pin_path(key: CheckpointKey | str) -> str:
    return f"{_PINS}/{key}.json"


def _retiring_path(key: CheckpointKey | str) -> str:
    return f"{_RETIRING}/{key}.json"


def _folder_path(key: str) -> str:
    return f"{_FOLDERS}/{key}.json"


def _versioned_folder(name: str, version: int) -> str:
    return name if version == 1 else f"{name}.{version}"


def _name_and_version(key: str) -> tuple[str, int]:
    return parse_folder_key(key) or (key, 0)


def _of_attempt(nonce: object) -> str:
    """What the nonces of all saves of one attempt have in common."""
    return str(nonce).partition("-")[0]


def _checkpoint_of(name: str) -> CheckpointKey | None:
    found = parse_checkpoint_key(name)
    return CheckpointKey(*found) if found else None


def _key_of(record: Any, what: str) -> CheckpointKey:
    values = (record.get("attempt"), record.get("step")) if isinstance(record, dict) else (None, None)
    if not all(type(value) is int and 0 <= value < 2**53 for value in values):
        raise ManifestError(f"The {what} is damaged: it names no attempt and step.")
    return CheckpointKey(*values)  # type: ignore[arg-type]


def _step_of(record: dict[str, Any], what: str) -> int:
    step = record.get("global_step", 0)
    if type(step) is not int or not 0 <= step < 2**53:
        raise ManifestError(f"The {what} is damaged: 'global_step' is {str(step)[:50]!r}, not a count.")
    return step


def _parse_attempt(data: bytes, number: int) -> Attempt:
    what = f"record of attempt {number}"
    record = decode_record(data, what)
    resumed = record.get("resumed_from")
    facts = record.get("facts")
    try:
        return Attempt(
            number=number,
            nonce=str(record.get("nonce")),
            started=float(record.get("started", 0.0)),
            global_step=_step_of(record, what),
            resumed_from=None if resumed is None else _key_of(resumed, what),
            exclusive=record.get("exclusive") is True,
            facts=texts(facts) if isinstance(facts, dict) else {},
        )
    except ManifestError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ManifestError(f"The {what} is damaged ({error}).") from None


def check_run_exists(catalog: Catalog) -> None:
    """Raise NoCheckpointError where no run has ever started."""
    if catalog.attempt_numbers():
        return
    url = catalog.storage.url
    folder = re.fullmatch(r"(.+)/(checkpoint-\d+(?:\.a\d+(?:\.\d+)?)?)", url)
    if folder:
        raise NoCheckpointError(
            f"There is no run at {url!r}, which looks like a folder of one. Name the run and its checkpoint: "
            f"{folder[1]} --checkpoint {folder[2]}"
        )
    raise NoCheckpointError(
        f"There is no run at {url!r}. `cloudtrain run list` with the URL above it shows those that exist."
    )
