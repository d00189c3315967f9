"""Whether an attempt is still the newest of its run: an older one stops, however late it wakes (law 6).

Numbers decide, and no clock: whoever has a higher one has begun later, because it was taken by an exclusive create. A
look is one LIST of the attempts' names. The uploader looks before the first byte of a checkpoint and right before its
commit; a thread of rank 0 looks every heartbeat interval, so that a training that saves nothing learns of it too. The
steps read an attribute.

Between a look and the commit that follows it a newer attempt may begin. What is committed then sorts below all that
the newer one commits, lies in a folder of its own, and is followed by no pointer: they have a look of their own.
"""

from __future__ import annotations

import datetime
import logging
import threading

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import CloudTrainError, OvertakenError

logger = logging.getLogger(__name__)


class Ownership:
    """Looks whether somebody has overtaken an attempt.

    Example:
        >>> fence = Fence(catalog, attempt)
        >>> fence.start()
        >>> fence.overtaken_by      # costs nothing; set in the background
        >>> fence.look()            # one request: before what cannot be taken back
        2
    """

    def __init__(self, catalog: Catalog, attempt: Attempt) -> None:
        self.attempt = attempt
        self.overtaken_by: int | None = None
        """The newer attempt's number; once set, it stays. Our own where two processes have taken one number."""
        self._catalog = catalog
        self._newer: Attempt | None = None
        self._interval = env.heartbeat()
        self._closed = threading.Event()
        self._ended = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="cloudtrain-fence", daemon=True)

    def start(self) -> None:
        """Look every heartbeat interval from now on, if that has not begun."""
        if not self._thread.is_alive() and not self._closed.is_set() and self.overtaken_by is None:
            self._thread.start()

    def look(self) -> int | None:
        """Ask the storage now. Raises a StorageError where it does not answer: nobody may go on unseen."""
        if self.overtaken_by is None:
            newer = self._catalog.attempts.overtaken_by(self.attempt.number)
            if newer is None and not self._catalog.attempts.is_holder(self.attempt):
                newer = self.attempt.number
            if newer is not None:
                self.note(newer)
        return self.overtaken_by

    def note(self, newer: int) -> None:
        """Hear of a newer attempt, from the storage or from another rank."""
        if self.overtaken_by is not None:
            return
        record = None
        try:
            record = self._catalog.attempts.read(newer)
        except CloudTrainError as error:
            logger.debug("The newer attempt's record: %s", error)
        with self._lock:
            if self._ended or self.overtaken_by is not None:
                return
            self._newer = record
            self.overtaken_by = newer
        logger.warning("%s This one stops.", self._story())

    def check(self) -> None:
        """Look, and raise OvertakenError where a newer attempt has begun."""
        if self.look() is not None:
            raise self.error()

    def error(self, kept: str = "") -> OvertakenError:
        """What to raise.

        Args:
            kept: a sentence about what is saved here and not on storage.
        """
        return OvertakenError(
            f"{self._story()} So this one ends, and stores nothing more. {kept}{self._advice()}"
        )

    def close(self) -> None:
        """Look no more in the background."""
        self._closed.set()

    def end(self) -> None:
        """The attempt is over: whoever begins later does not overtake it."""
        with self._lock:
            self._ended = True
        self.close()

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                if self.look() is not None:
                    return
            except CloudTrainError as error:
                logger.debug("Nobody knows whether a newer attempt has begun: %s", error)

    def _story(self) -> str:
        own = self.attempt.number
        url = self._catalog.storage.url
        if self.overtaken_by == own:
            return (
                f"Attempt {own} of {url!r} was started twice at the same moment, and the other one has it now"
                f"{self._whose()}: this storage does not honour exclusive create."
            )
        return f"Attempt {own} of {url!r} was overtaken by attempt {self.overtaken_by}{self._whose()}."

    def _whose(self) -> str:
        """Where and when the newer one began, for people: its clock and ours may differ."""
        if self._newer is None:
            return ""
        host = self._newer.facts.get("host", "")[:100]
        where = f" on host {host!r}" if host else ""
        when = _when(self._newer.started)
        return f", which began{where}{when}" if where or when else ""

    def _advice(self) -> str:
        other = (
            "the other one" if self.overtaken_by == self.attempt.number else f"attempt {self.overtaken_by}"
        )
        return f"Let {other} go on, or end it before you start the run again."


def _when(started: float) -> str:
    try:
        time = datetime.datetime.fromtimestamp(started, datetime.timezone.utc)
    except (OverflowError, OSError, ValueError):  # what storage says is not trusted
        return ""
    return f" at {time:%Y-%m-%d %H:%M:%S} UTC by its clock" if started else ""
