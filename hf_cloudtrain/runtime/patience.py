"""A wait of more than a few seconds says what it waits for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds after which a wait says what it waits for."""


@contextmanager
def told_if_slow(what: str) -> Iterator[None]:
    """Log what is being done, once, if the block takes more than `PATIENCE` seconds.

    Args:
        what: as in "Waiting to <what>".
    """
    timer = threading.Timer(PATIENCE, logger.info, ["Waiting for more than %.0f s to %s.", PATIENCE, what])
    timer.name, timer.daemon = "cloudtrain-patience", True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
