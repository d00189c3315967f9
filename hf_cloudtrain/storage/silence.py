"""Requests that stay silent: after seconds a command says so, and without a byte or an answer for minutes they are given up."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from hf_cloudtrain.errors import StorageUnavailableError
from hf_cloudtrain.runtime import patience
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


class _Listener:
    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._next, self._pause = say, 0.0, patience.PATIENCE

    def tell(self, text: str) -> None:
        """Say one thing at a time, and less and less often: requests are made in parallel, and a wait may take minutes."""
        if (now := time.monotonic()) >= self._next:
            self._pause *= 2
            self._next = now + self._pause
            self._say(text)


_listeners: list[_Listener] = []


@contextlib.contextmanager
def slow_requests_told(say: Callable[[str], None]) -> Iterator[None]:
    """Say in this block which request has no answer after some seconds. A training says it by other means."""
    listener = _Listener(say)
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell_slow(text: str, seconds: float) -> None:
    """Tell those who listen of a request without an answer for so many seconds, if that is long."""
    if seconds > patience.PATIENCE:
        for listener in _listeners:
            listener.tell(text)


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
        tell_slow(f"Waiting {purpose}: no answer for {silent:.0f} s.", silent)
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
