"""Whether an attempt is still the newest of its run: an older one stops, however late it wakes (law 6).

Numbers decide, and no clock: an attempt with a higher number has begun later, because numbers are taken by an exclusive
create. A check is one LIST of the attempts' names. The sender checks before the first byte of a checkpoint and right before
its commit; a thread of rank 0 checks every heartbeat interval, so that a training that saves nothing finds out too. The steps
read an attribute.

Between a check and the commit that follows it, a newer attempt may begin. What is committed then sorts below all that the
newer one commits, lies in a folder of its own, and no pointer follows it: pointers are moved after a check of their own.
"""

from __future__ import annotations

import datetime
import logging
import threading

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import CloudTrainError, OvertakenError
from hf_cloudtrain.runtime.threads import SafeTurn

logger = logging.getLogger(__name__)


class Ownership:
    """Checks whether a newer attempt has overtaken an attempt.

    Example:
        >>> ownership = Ownership(catalog, attempt)
        >>> ownership.start()
        >>> ownership.overtaken_by      # costs nothing; set in the background
        >>> ownership.look()            # one request: before what cannot be taken back
        2
    """

    def __init__(self, catalog: Catalog, attempt: Attempt) -> None:
        self.attempt = attempt
        self.overtaken_by: int | None = None
        """The newer attempt's number; once set, it stays. Our own number if two processes have taken it."""
        self._catalog = catalog
        self._newer: Attempt | None = None
        self._interval = env.heartbeat()
        self._closed = threading.Event()
        self._ended = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="cloudtrain-ownership", daemon=True)

    def start(self) -> None:
        """Check every heartbeat interval from now on, if that has not begun."""
        if not self._thread.is_alive() and not self._closed.is_set() and self.overtaken_by is None:
            self._thread.start()

    def look(self) -> int | None:
        """Ask the storage now. Raises a StorageError if it does not answer: an attempt must not continue unchecked."""
        if self.overtaken_by is None:
            newer = self._catalog.attempts.overtaken_by(self.attempt.number)
            if newer is None and not self._catalog.attempts.is_holder(self.attempt):
                newer = self.attempt.number
            if newer is not None:
                self.note(newer)
        return self.overtaken_by

    def note(self, newer: int) -> None:
        """Note a newer attempt that the storage or another rank has reported."""
        if self.overtaken_by is not None:
            return
        record = None
        try:
            record = self._catalog.attempts.read(newer)
        except CloudTrainError as error:
            logger.debug("Cannot read the newer attempt's record: %s", error)
        with self._lock:
            if self._ended or self.overtaken_by is not None:
                return
            self._newer = record
            self.overtaken_by = newer
        logger.warning("%s Stopping this attempt.", self._story())

    def check(self) -> None:
        """Look, and raise OvertakenError if a newer attempt has begun."""
        if self.look() is not None:
            raise self.error()

    def error(self, kept: str = "") -> OvertakenError:
        """What to raise.

        Args:
            kept: a sentence about what is saved here and not on storage.
        """
        number = self.overtaken_by
        other = "the other one" if number == self.attempt.number else f"attempt {number}"
        return OvertakenError(
            f"{self._story()} Stopping this attempt; it will not write any more checkpoints. {kept}Let {other} continue, or "
            "end it before you start the run again."
        )

    def close(self) -> None:
        """Stop checking in the background."""
        self._closed.set()

    def end(self) -> None:
        """Note that the attempt is over: an attempt that begins later does not overtake it."""
        with self._lock:
            self._ended = True
        self.close()

    def _watch(self) -> None:
        turn = SafeTurn("The check for a newer attempt")
        while not self._closed.wait(self._interval):
            with turn:
                try:
                    if self.look() is not None:
                        return
                except CloudTrainError as error:
                    logger.debug("Cannot check whether a newer attempt has begun: %s", error)

    def _story(self) -> str:
        own, url = self.attempt.number, self._catalog.storage.url
        if self.overtaken_by == own:
            return (
                f"Attempt {own} of {url!r} was started twice at the same moment, and the other process has the number now"
                f"{self._newer_began()}: this storage does not honour exclusive create."
            )
        return f"Attempt {own} of {url!r} was overtaken by attempt {self.overtaken_by}{self._newer_began()}."

    def _newer_began(self) -> str:
        """Where and when the newer one began, for people: its clock may differ from ours."""
        if self._newer is None:
            return ""
        host = self._newer.facts.get("host", "")[:100]
        where = f" on host {host!r}" if host else ""
        when = _when(self._newer.started)
        return f", which began{where}{when}" if where or when else ""


def _when(started: float) -> str:
    try:
        time = datetime.datetime.fromtimestamp(started, datetime.timezone.utc)
    except (OverflowError, OSError, ValueError):  # records on storage are not trusted
        return ""
    return f" at {time:%Y-%m-%d %H:%M:%S} UTC by its clock" if started else ""
