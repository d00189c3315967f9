"""Requests that stay silent: without a byte or an answer for minutes they are given up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from hf_cloudtrain.errors import StorageUnavailableError
from hf_cloudtrain.runtime.threads import answer_in_time

logger = logging.getLogger(__name__)
T = TypeVar("T")

SILENCE = 600.0
"""Seconds of silence after which a request is given up. A native client with its own timeouts ends within 8 minutes (5
for a request, and no new try after 3); other clients may wait for ever."""

SILENT_RATE = 1e6
"""Bytes per second that extend the limit: clients of fsspec may buffer a whole file before they report progress."""

SAY_AFTER = 60.0
"""Seconds of silence after which a warning says what is being waited for."""


class SilentError(StorageUnavailableError):
    """A request was given up because it stayed silent."""


class ByteCount:
    """Bytes of one attempt: subtracted again if it fails, and the sign of life that resets the clock."""

    def __init__(self, on_bytes: Callable[[int], None] | None) -> None:
        self.total = 0
        self.patience = SILENCE
        """Seconds of silence that are tolerated."""
        self.late = False
        self._on_bytes = on_bytes
        self._last_sign = time.monotonic()
        self._warned = False
        self._ended = False

    def __enter__(self) -> ByteCount:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.add(-self.total)
        self._ended = True

    def is_late(self, purpose: str) -> bool:
        """Whether the request was silent for too long."""
        silent = time.monotonic() - self._last_sign
        if silent > SAY_AFTER and not self._warned:
            self._warned = True
            logger.warning("Waiting %s: no answer for %.0f s.", purpose, silent)
        self.late = silent > self.patience
        return self.late

    def add(self, count: int) -> None:
        """Count bytes that were sent or received."""
        if self._ended:
            return  # an attempt that was given up is still running in its thread
        self._last_sign = time.monotonic()
        self.total += count
        if self._on_bytes is not None:
            self._on_bytes(count)


def answer_unless_silent(
    what: str, call: Callable[[ByteCount], T], on_bytes: Callable[[int], None] | None
) -> T:
    """The answer of a call that reports its bytes. Raises SilentError once it stayed silent for too long."""
    with ByteCount(on_bytes) as count:
        try:
            return answer_in_time(lambda: call(count), lambda: count.is_late(f"to {what}"))
        except TimeoutError as error:
            if not count.late:
                raise  # the client's own
            raise SilentError(
                f"Could not {what}: no answer and no byte for {count.patience:.0f} s. Check the network and the "
                "endpoint."
            ) from error
