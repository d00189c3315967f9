"""What exists in a run: the only module that decides it.

A checkpoint exists if and only if its manifest does. Its folder is claimed before its first byte, so no object of a
committed checkpoint is ever overwritten; the manifest is created exclusively, last, and never changed. Newest is by
(attempt, step), so one LIST of names answers it.

    <run URL>/.cloudtrain/
        run.json                              name, created, versions, command line
        attempts/000003.json                  exclusive create: who, where, resumed from what
        claims/checkpoint-500.json            exclusive create: which attempt may write that folder
        parts/000003-0000000500/0-of-2.json   what one host uploaded
        checkpoints/000003-0000000500.json    the commit
        folders/final-000001.json             the commit of any other folder
        best.json, last.json                  pointers
        progress/000003.json                  heartbeat
        steps/000003-0001.jsonl               step and metric records
"""

from __future__ import annotations

import dataclasses
import logging
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.errors import (
    ManifestError,
    NoCheckpointError,
    ObjectNotFoundError,
    StorageUnavailableError,
)
from hf_cloudtrain.manifest import (
    MAX_FILES,
    META,
    FileEntry,
    Manifest,
    checkpoint_key,
    decode_record,
    encode_record,
    parse_checkpoint_key,
    parse_folder_key,
    texts,
)
from hf_cloudtrain.process import in_threads
from hf_cloudtrain.storage import Storage

logger = logging.getLogger(__name__)

READS_AT_ONCE = 8
"""Small records fetched at once: they wait for answers, not for bandwidth."""

MAX_ATTEMPT = 999_999_999
"""A number that only a forged record can have: a run that starts every second gets there in 30 years."""

_RUN = f"{META}/run.json"
_ATTEMPTS = f"{META}/attempts"
_CLAIMS = f"{META}/claims"
_PARTS = f"{META}/parts"
_CHECKPOINTS = f"{META}/checkpoints"
_FOLDERS = f"{META}/folders"


@dataclass(frozen=True, order=True)
class CheckpointKey:
    """Which checkpoint: sorts as law 9 wants it, so the newest is the largest."""

    attempt: int
    step: int

    def __str__(self) -> str:
        return checkpoint_key(self.attempt, self.step)


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
        """Take the next attempt number by an exclusive create; losing a race takes the one after."""
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
            if self.storage.create(_attempt_path(number), encode_record(dataclasses.asdict(attempt))):
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

    def overtaken_by(self, attempt: int) -> int | None:
        """The number of a newer attempt, if one has started (law 6)."""
        newest = max(self.attempt_numbers(), default=0)
        return newest if newest > attempt else None

    # Checkpoints

    def checkpoints(self) -> list[CheckpointKey]:
        """All committed checkpoints, oldest first, by one LIST."""
        return sorted(key for key in map(_checkpoint_of, self._names(_CHECKPOINTS)) if key)

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
        manifest = Manifest.parse(data, str(key))
        if (manifest.attempt, manifest.step) != (key.attempt, key.step):
            raise ManifestError(
                f"The manifest {str(key)!r} is of attempt {manifest.attempt}, step {manifest.step}."
            )
        if manifest.folder not in (f"checkpoint-{key.step}", f"checkpoint-{key.step}.a{key.attempt}"):
            raise ManifestError(
                f"The manifest {str(key)!r} names the folder {manifest.folder!r} of another one."
            )
        return manifest

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
            owner = decode_record(self.storage.read(path), f"claim {path!r}").get("attempt")
        except ManifestError:
            owner = None  # damaged: whoever it was, it was not us
        # The same attempt again: an upload that was cut off goes on in its own folder.
        return plain if owner == key.attempt else suffixed

    def put_part(
        self, key: CheckpointKey, host: int, hosts: int, files: Iterable[FileEntry]
    ) -> list[FileEntry] | None:
        """Record what one host uploaded, and answer as `parts`. After that the host writes nothing more of it."""
        record = {"files": [dataclasses.asdict(entry) for entry in files]}
        self.storage.write(_part_path(key, host, hosts), encode_record(record))
        return self.parts(key, hosts)

    def has_part(self, key: CheckpointKey, host: int, hosts: int) -> bool:
        """Whether a host's part is recorded."""
        return self._exists(_part_path(key, host, hosts))

    def parts(self, key: CheckpointKey, hosts: int) -> list[FileEntry] | None:
        """All hosts' files, sorted by path; None while a part is missing."""
        there = {info.path for info in self.storage.list(f"{_PARTS}/{key}")}
        wanted = [_part_path(key, host, hosts) for host in range(hosts)]
        if not set(wanted) <= there:
            return None
        found: list[FileEntry] = []
        for path in wanted:
            items = decode_record(self.storage.read(path), f"part {path!r}").get("files")
            if not isinstance(items, list) or len(items) > MAX_FILES:
                raise ManifestError(f"The part {path!r} is damaged: 'files' is no list of files.")
            found += [FileEntry.parse(item, f"part {path!r}") for item in items]
        return sorted(found, key=lambda entry: entry.path)

    def commit(self, manifest: Manifest) -> bool:
        """Make a checkpoint exist. False where it exists already from another save of the same (attempt, step)."""
        data = manifest.encode()
        Manifest.parse(data, manifest.key)  # what we cannot read back must not be committed
        path = f"{_CHECKPOINTS}/{manifest.key}.json"
        try:
            created = self.storage.create(path, data)
        except StorageUnavailableError:
            # The answer may be lost and the object stored: look before saying that it failed.
            created = self._holds(path, manifest.nonce)
            if not created:
                raise
        return created or self._holds(path, manifest.nonce)

    def retire(self, key: CheckpointKey) -> None:
        """Delete a checkpoint: the manifest first, so that a half-deleted one is none, then the data, then its claim.

        Which one may go is the caller's question; see `protected`.
        """
        manifest = self.read(key)
        self.storage.delete([_checkpoint_path(key)])
        self.storage.delete(manifest.object_path(entry) for entry in manifest.files)
        self.storage.delete(info.path for info in self.storage.list(f"{_PARTS}/{key}"))
        if manifest.folder == f"checkpoint-{key.step}":
            self.storage.delete([f"{_CLAIMS}/{manifest.folder}.json"])

    def protected(self) -> dict[CheckpointKey, str]:
        """Checkpoints that no automatic deletion touches, each with the reason in words (law 10)."""
        reasons: dict[CheckpointKey, str] = {}
        for attempt in self.attempts(last=1):
            if attempt.resumed_from is not None:
                reasons[attempt.resumed_from] = f"attempt {attempt.number} resumed from it"
        best = self.pointer("best")
        if best is not None:
            reasons[best] = "it is the best one"
        newest = self.newest()
        if newest is not None:
            reasons[newest] = "it is the newest one"
        return reasons

    # Other folders

    def begin_folder(self, name: str, nonce: str) -> tuple[str, str]:
        """(key, folder) for a new version of a named folder, claimed before its first byte."""
        version = 1
        while True:
            folder = _versioned_folder(name, version)
            if self.storage.create(f"{_CLAIMS}/{folder}.json", encode_record({"nonce": nonce})):
                return f"{name}-{version:06d}", folder
            version += 1

    def commit_folder(self, manifest: Manifest) -> bool:
        """Make a named folder exist."""
        return self.storage.create(_folder_path(manifest.key), manifest.encode())

    def folders(self) -> list[str]:
        """Keys of all named folders (`final-000001`), sorted."""
        return [key for key in self._names(_FOLDERS) if parse_folder_key(key)]

    def read_folder(self, key: str) -> Manifest:
        """The manifest of a named folder."""
        try:
            manifest = Manifest.parse(self.storage.read(_folder_path(key)), key)
        except ObjectNotFoundError:
            raise NoCheckpointError(f"There is no folder {key!r} in {self.storage.url!r}.") from None
        if manifest.folder != _versioned_folder(*_name_and_version(key)):
            raise ManifestError(f"The manifest {key!r} names the folder {manifest.folder!r} of another one.")
        return manifest

    def holds_folder(self, key: str) -> bool:
        """Whether a named folder is committed."""
        return self._exists(_folder_path(key))

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
            return _parse_attempt(self.storage.read(_attempt_path(number)), number)
        except (ManifestError, ObjectNotFoundError) as error:
            logger.warning("%s", error)
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


def _part_path(key: CheckpointKey, host: int, hosts: int) -> str:
    return f"{_PARTS}/{key}/{host}-of-{hosts}.json"


def _folder_path(key: str) -> str:
    return f"{_FOLDERS}/{key}.json"


def _versioned_folder(name: str, version: int) -> str:
    return name if version == 1 else f"{name}.{version}"


def _name_and_version(key: str) -> tuple[str, int]:
    return parse_folder_key(key) or (key, 0)


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
