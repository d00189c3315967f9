"""The only retry policy of this package: which calls are tried again, how often, and after which pause.

The clients also retry inside themselves; how often they may is set here too.
"""

from __future__ import annotations

import datetime
import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from hf_cloudtrain.errors import CloudTrainError, StoragePermissionError, StorageUnavailableError
from hf_cloudtrain.storage.failures import is_throttled
from hf_cloudtrain.storage.silence import SilentError, tell_slow

logger = logging.getLogger(__name__)
T = TypeVar("T")

PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds before each new try, jittered. They bridge failures that outlast the retries of the client."""

LONGEST_PAUSE = 60.0
"""Most seconds that a `Retry-After` of the storage is followed: a wrong date must not stop uploads for a night."""

NATIVE_RETRIES: Any = {"max_retries": 4, "retry_timeout": datetime.timedelta(minutes=3)}
"""Retries inside obstore."""

S3_CLIENT_ATTEMPTS = 1
"""Attempts inside s3fs and botocore. With three layers of retries, a lasting error would appear after five minutes."""

# A generator of our own: retries must not change the random numbers of the training.
_jitter = random.Random()


class Retries:
    """The retries of one Storage, shared by its threads: when the storage throttles one of them, all wait."""

    def __init__(self) -> None:
        self._answered = False
        """Whether a call ever succeeded. If so, a later refusal means that the credentials have expired."""
        self._quiet_until = 0.0
        """Time of the next permitted call, by `time.monotonic`."""

    def run(
        self,
        attempt: Callable[[], T],
        explain: Callable[[Exception], CloudTrainError],
        reconnect: Callable[[], None],
    ) -> T:
        """Make a call, again while its failure may be transient; `explain` turns a client's error into one of ours.

        `reconnect` drops the connection, so that the next attempt makes a new one.
        """
        pauses, began = iter(PAUSES), time.monotonic()
        reconnects = {"silence", "credentials"}  # each of these causes is worth one new connection
        while True:
            if (quiet := self._quiet_until - time.monotonic()) > 0:
                time.sleep(quiet)
            try:
                answer = attempt()
            except Exception as error:  # noqa: BLE001 - every client has its own tree of errors
                ours = explain(error)
                cause = self._cause_to_reconnect(ours)
                if cause is None:
                    pause = next(pauses, None) if isinstance(ours, StorageUnavailableError) else None
                else:
                    reconnect()
                    pause = 0.0 if cause in reconnects else None
                    reconnects.discard(cause)
                if pause is None:
                    raise ours from None
                logger.debug("%s; trying again in about %s s", ours, pause)
                waited = time.monotonic() - began + max(pause, min(retry_after(error), LONGEST_PAUSE))
                tell_slow(f"{ours} Trying again.", waited)
                if cause is None:
                    self._rest(error, pause)
            else:
                self._answered = True
                return answer

    def _cause_to_reconnect(self, error: CloudTrainError) -> str | None:
        """Why a new connection may succeed where this one fails: it hangs, or it uses expired credentials."""
        if isinstance(error, SilentError):
            return "silence"
        return "credentials" if isinstance(error, StoragePermissionError) and self._answered else None

    def _rest(self, error: Exception, pause: float) -> None:
        """Wait before a new try, as long as the storage asks; all threads wait if it throttles."""
        asked = min(retry_after(error), LONGEST_PAUSE)
        seconds = max(jittered(pause), asked)
        if asked or is_throttled(error):
            self._quiet_until = max(self._quiet_until, time.monotonic() + seconds)
        else:
            time.sleep(seconds)


def jittered(pause: float) -> float:
    """A random time between half of `pause` (s) and all of it, so that a thousand hosts do not retry at once."""
    return pause * _jitter.uniform(0.5, 1.0)


def retry_after(error: BaseException | None) -> float:
    """Seconds that the storage asks to wait, if its client exposes the header; else 0.

    https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3; a date instead of seconds is ignored.
    """
    for _ in range(8):  # s3fs chains its own error to that of botocore
        if error is None:
            break
        answer = getattr(error, "response", None)
        found: Any = getattr(answer, "headers", None)
        if isinstance(answer, dict):
            found = (answer.get("ResponseMetadata") or {}).get("HTTPHeaders")
        if found:
            headers = {str(name).lower(): str(value) for name, value in dict(found).items()}
            value = headers.get("retry-after", "")
            return float(value) if re.fullmatch(r"\d{1,9}", value) else 0.0
        error = error.__cause__ or error.__context__
    return 0.0
