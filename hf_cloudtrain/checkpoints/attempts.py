"""The attempts of a run: their numbers, their records, their heartbeats, and the request that one of them stops.

Each start of a run takes the next number by an exclusive create. Numbers alone decide which attempt is newer; no clock
is compared.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.checkpoints.manifest import CheckpointKey, count, decode_record, encode_record, texts
from hf_cloudtrain.checkpoints.paths import ATTEMPTS, PROGRESS, RUN, STOP
from hf_cloudtrain.errors import ManifestError, NoCheckpointError, ObjectNotFoundError
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.client import READS_AT_ONCE, Storage
from hf_cloudtrain.storage.names import META

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 1.0
"""Where exclusive create is not honoured: seconds after which each of two processes sees which of them has the number."""
MAX_ATTEMPT = 999_999_999
"""A number that only a forged record can have: a run that starts every second gets there in 30 years."""


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
    trained: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)
    """What its manifests say of model, arguments and data, once these are known."""


class Attempts:
    """The attempts of one run.

    Example:
        >>> attempt = catalog.attempts.begin(time.time(), 0, None, {"host": "node-0"})
        >>> catalog.attempts.overtaken_by(attempt.number)     # None, until a newer attempt begins
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def begin(
        self, started: float, global_step: int, resumed_from: CheckpointKey | None, facts: dict[str, str]
    ) -> Attempt:
        """Take the next number by an exclusive create; a process that loses a race takes the one after.

        Where the storage does not honour exclusive create, the process that writes a number last has it.
        """
        number = max(self.numbers(), default=0) + 1
        while True:
            if number > MAX_ATTEMPT:
                raise ManifestError(
                    f"{self._storage.url!r} holds a record of attempt {number - 1}, which no training can have made. "
                    f"Delete {_path(number - 1)!r} there, or use another run URL."
                )
            attempt = Attempt(
                number=number,
                nonce=secrets.token_hex(16),
                started=started,
                global_step=global_step,
                resumed_from=resumed_from,
                exclusive=self._storage.exclusive is not False,
                facts=facts,
            )
            created = self._storage.create(_path(number), encode_record(_record(attempt)))
            if created and self._still_has(attempt):
                # Each attempt tries: the first may have died before it got here.
                self._storage.create(RUN, encode_record({"created": started, **facts}))
                return attempt
            number += 1

    def numbers(self) -> list[int]:
        """Numbers of all attempts, ascending, by one LIST."""
        names = (
            re.fullmatch(rf"{re.escape(ATTEMPTS)}/(0*([0-9]{{1,9}}))\.json", info.path)
            for info in self._storage.list(ATTEMPTS)
        )
        return sorted(int(name[2]) for name in names if name and f"{int(name[2]):06d}" == name[1])

    def read(self, number: int) -> Attempt:
        """One attempt. Raises ObjectNotFoundError, ManifestError."""
        return _parse(self._storage.read(_path(number)), number)

    def read_all(self, last: int = 0) -> list[Attempt]:
        """All attempts, or the `last` few, ascending. Skips unreadable ones with a warning."""
        (found,) = in_threads(self._read_or_none, (self.numbers()[-last:], READS_AT_ONCE))
        return [attempt for attempt in found if attempt is not None]

    def overtaken_by(self, number: int) -> int | None:
        """The number of a newer attempt, if one has started (law 6)."""
        newest = max(self.numbers(), default=0)
        return newest if newest > number else None

    def is_holder(self, attempt: Attempt) -> bool:
        """Whether no other process has taken the same number, which can happen only without exclusive create."""
        if attempt.exclusive:
            return True
        try:
            return self.read(attempt.number).nonce == attempt.nonce
        except (ObjectNotFoundError, ManifestError):
            return True  # the record names no other process

    def request_stop(self, asked: float, facts: dict[str, str]) -> int | None:
        """Ask the newest attempt to save and stop; returns its number, or None if no attempt has ever started.

        Attempts that begin later ignore the request: a user who starts the run again wants it to train.

        Args:
            asked: seconds since 1970, for people.
            facts: who asks, for people.
        """
        newest = max(self.numbers(), default=None)
        if newest is not None:
            self._storage.write(STOP, encode_record({**facts, "attempt": newest, "time": asked}))
        return newest

    def stop_requested(self, number: int) -> bool:
        """Whether this attempt or a newer one was asked to stop; one small request."""
        try:
            asked = decode_record(self._storage.read(STOP), "stop request").get("attempt")
        except ObjectNotFoundError:
            return False
        except ManifestError as error:
            logger.debug("%s", error)  # read at each heartbeat, so a warning would be repeated
            return False
        return type(asked) is int and asked >= number

    def write_progress(self, number: int, record: dict[str, Any]) -> None:
        """Store the heartbeat of an attempt."""
        self._storage.write(f"{PROGRESS}/{number:06d}.json", encode_record(record))

    def read_progress(self, number: int) -> dict[str, Any] | None:
        """The last heartbeat of an attempt; None if it has none, or a damaged one."""
        what = f"heartbeat of attempt {number}"
        try:
            return decode_record(self._storage.read(f"{PROGRESS}/{number:06d}.json"), what)
        except ObjectNotFoundError:
            return None
        except ManifestError as error:
            logger.warning("%s", error)
            return None

    def run_facts(self) -> dict[str, Any] | None:
        """What run.json says; None if no attempt has started."""
        try:
            return decode_record(self._storage.read(RUN), "record 'run.json'")
        except ObjectNotFoundError:
            return None

    def check_any(self) -> None:
        """Raise NoCheckpointError if no attempt has ever started: then there is no run at this URL."""
        if self.numbers():
            return
        url = self._storage.url
        folder = re.fullmatch(r"(.+)/(checkpoint-\d+(?:\.a\d+(?:\.\d+)?)?)", url)
        if folder:
            raise NoCheckpointError(
                f"There is no run at {url!r}, which looks like a folder of one. Name the run and its checkpoint: "
                f"{folder[1]} --checkpoint {folder[2]}"
            )
        raise NoCheckpointError(
            f"There is no run at {url!r}. `cloudtrain run list` with the URL above it shows those that exist."
        )

    def _read_or_none(self, number: int) -> Attempt | None:
        try:
            return self.read(number)
        except (ManifestError, ObjectNotFoundError) as error:
            logger.warning("%s", error)
            return None

    def _still_has(self, attempt: Attempt) -> bool:
        if attempt.exclusive:
            return True
        time.sleep(SETTLE_SECONDS)  # by then every process that saw the number free has written its record
        return self.is_holder(attempt)


def run_urls(storage: Storage) -> list[str]:
    """Names of the runs below a storage, found by their records. Costs one listing of everything below."""
    return [name for name in run_listing(storage) if name]


def run_listing(storage: Storage) -> dict[str, tuple[dict[str, int], int]]:
    """The same, each with the sizes of its records and of all that it stores; "" is a run at the URL itself."""
    objects, suffix = storage.list(""), f"/{RUN}"
    names = sorted(path[: -len(suffix)] for info in objects if (path := f"/{info.path}").endswith(suffix))
    records: dict[str, dict[str, int]] = {name: {} for name in names}
    sizes = dict.fromkeys(names, 0)
    for info in objects:
        above, is_record, below = f"/{info.path}".partition(f"/{META}/")
        if is_record and above in records:
            records[above][f"{META}/{below}"] = info.size
        while above and above not in sizes:
            above = above.rpartition("/")[0]
        if above in sizes:
            sizes[above] += info.size
    return {name[1:]: (records[name], sizes[name]) for name in names}


def _record(attempt: Attempt) -> dict[str, Any]:
    record = dataclasses.asdict(attempt)
    del record["trained"]  # not known when an attempt begins
    return record


def _path(number: int) -> str:
    return f"{ATTEMPTS}/{number:06d}.json"


def _parse(data: bytes, number: int) -> Attempt:
    what = f"record of attempt {number}"
    record = decode_record(data, what)
    resumed = record.get("resumed_from")
    facts = record.get("facts")
    try:
        return Attempt(
            number=number,
            nonce=str(record.get("nonce")),
            started=float(record.get("started", 0.0)),
            global_step=count({"global_step": 0, **record}, "global_step", what),
            resumed_from=None if resumed is None else CheckpointKey.parse(resumed, what),
            exclusive=record.get("exclusive") is True,
            facts=texts(facts) if isinstance(facts, dict) else {},
        )
    except ManifestError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ManifestError(f"The {what} is damaged ({error}).") from None
