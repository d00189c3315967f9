"""Event files of a tracker are part of the run: stored while it trains, and back on disk where it resumes.

<run URL>/.cloudtrain/events/tensorboard-9f86d081/events.out.tfevents.1790000000.host.17.0             its first 4 MiB
<run URL>/.cloudtrain/events/tensorboard-9f86d081/events.out.tfevents.1790000000.host.17.0.part0002    what follows

Object stores cannot append, so the newest part of a file is written again until it is large enough. Each part ends with a whole
record, so `tensorboard --logdir` can read the parts where they are. A restore joins them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from hf_cloudtrain.checkpoints.paths import EVENTS
from hf_cloudtrain.errors import ManifestError
from hf_cloudtrain.runtime.files import temp_suffix
from hf_cloudtrain.storage.backend import ObjectInfo
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.names import clean_path
from hf_cloudtrain.tracking.services.guard import TrackerGuard
from hf_cloudtrain.tracking.services.runs import TrackerRun
from hf_cloudtrain.tracking.services.service import TrackerService

logger = logging.getLogger(__name__)

PART_BYTES = 4 * 2**20
"""Size above which a new part is started."""
NAMES = "events.out.tfevents.*"
"""No other file of the folder is stored."""
CLOCK_SECONDS = 60.0
"""By how much the clocks of this machine and of its disk may differ."""


@dataclass
class _Stored:
    """What the storage has of one file."""

    size: int = 0
    part: int = 1
    """Number of the part that is written next."""
    data: bytes = b""
    """What that part holds so far."""


class EventFiles:
    """The event files of one tracker run.

    Args:
        folder: where its writers write, also into folders below it.
        flush: lets its writer write what it has.

    Example:
        >>> files = EventFiles(catalog.storage, run, Path("out/runs/Nov30_10-00-00_host"), writer.flush)
        >>> files.fetch()       # on a different machine: what the earlier ones have stored
        >>> files.store()       # after each save
    """

    @classmethod
    def of(
        cls, storage: Storage, service: TrackerService, run: TrackerRun, guard: TrackerGuard
    ) -> EventFiles | None:
        """Those of a tracker run that has just started, with what earlier attempts have stored; None if it has none."""
        folder = service.files(run.id)
        if folder is None:
            return None
        files = cls(storage, run, folder, service.flush)
        with guard("did not restore its event files"):
            files.fetch()
        return files

    def __init__(self, storage: Storage, run: TrackerRun, folder: Path, flush: Callable[[], None]) -> None:
        self._storage = storage
        # By its id: a folder that holds a different training, too, is recorded again, under the next number.
        self._top = f"{EVENTS}/{run.service}-{hashlib.sha256(run.id.encode()).hexdigest()[:8]}"
        self.folder = folder
        self._flush = flush
        self._began = time.time() - CLOCK_SECONDS
        self._stored: dict[str, _Stored] = {}

    def fetch(self) -> None:
        """Bring back the files that this machine lacks. A file that it has stays as it is: it has written it.

        Raises:
            StorageError: one cannot be read.
        """
        count = 0
        for name, parts in self._on_storage():
            self._stored[name] = _Stored(sum(part.size for part in parts), len(parts) + 1)
            path = self.folder / name
            if os.path.lexists(path):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            self._join(parts, path)
            count += 1
        if count:
            logger.info("Restored %d event files of earlier attempts to %s.", count, self.folder)

    def store(self) -> bool:
        """Store what is new in each file, up to one part each; whether there may be more.

        Raises:
            StorageError: the storage does not take it. The next call tries again.
        """
        try:
            self._flush()
        except Exception as error:  # noqa: BLE001 - of any library; one that was closed meanwhile has written everything
            logger.debug("%s", error)
        more = [self._store(path) for path in sorted(self.folder.rglob(NAMES))]
        return any(more)

    def _join(self, parts: list[ObjectInfo], path: Path) -> None:
        beside = path.with_name(f".{temp_suffix()}")
        try:
            with beside.open("wb") as file:
                for part in parts:
                    file.write(self._storage.read(part.path, part.size))
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def _store(self, path: Path) -> bool:
        name = path.relative_to(self.folder).as_posix()
        try:
            found = path.lstat()
            is_foreign = name not in self._stored and (
                found.st_mtime < self._began or _is_of_another(path.name)
            )
            if is_foreign or path.is_symlink() or _without_part(clean_path(name)) != name:
                return False
            stored = self._stored.setdefault(name, _Stored())
            if found.st_size <= stored.size:
                return False
            with path.open("rb") as file:
                file.seek(stored.size)
                new = _whole_records(file, found.st_size)
        except (OSError, ManifestError) as error:  # removed meanwhile, or not readable
            logger.debug("%s", error)
            return False
        if new:
            data = stored.data + new
            self._storage.write(f"{self._top}/{_part(name, stored.part)}", data)
            stored.size, stored.data = stored.size + len(new), data
            if len(data) >= PART_BYTES:
                stored.part, stored.data = stored.part + 1, b""
        return len(new) >= PART_BYTES

    def _on_storage(self) -> Iterator[tuple[str, list[ObjectInfo]]]:
        """The files on storage, each with its parts from the first one on, up to one that is missing."""
        found: dict[str, dict[str, ObjectInfo]] = {}
        for info in self._storage.list(self._top):
            path = info.path.removeprefix(f"{self._top}/")
            name = _without_part(path)
            if fnmatch.fnmatchcase(name.rpartition("/")[2], NAMES):
                found.setdefault(name, {})[path] = info
        for name, parts in found.items():
            try:
                names = itertools.takewhile(
                    parts.__contains__, map(partial(_part, clean_path(name)), itertools.count(1))
                )
            except ManifestError as error:
                logger.warning("%s It is not restored.", error)
                continue
            if whole := [parts[path] for path in names]:
                yield name, whole


def _is_of_another(name: str) -> bool:
    """Whether a different process writes this file: trainings may share a folder. `…tfevents.<seconds>.<host>.<process>.<number>`."""
    return (
        re.search(r"\.\d+\.\d+$", name) is not None and f".{socket.gethostname()}.{os.getpid()}." not in name
    )


def _part(name: str, number: int) -> str:
    return name if number == 1 else f"{name}.part{number:04d}"


def _without_part(name: str) -> str:
    return re.sub(r"\.part\d{4,9}$", "", name)


def _whole_records(file: BinaryIO, size: int) -> bytes:
    """Whole records from where a file stands, of its first `size` bytes; no more than about one part.

    A record: its length (8 bytes), a checksum (4), the data, a checksum (4).
    https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/tensorflow_stub/pywrap_tensorflow.py
    """
    at = file.tell()
    found = bytearray()
    while len(found) < PART_BYTES and at + 12 <= size:
        head = file.read(12)
        length = int.from_bytes(head[:8], "little") + 4
        if at + 12 + length > size:  # it is being written, or is damaged
            break
        found += head + file.read(length)
        at += 12 + length
    return bytes(found)
