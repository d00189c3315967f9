"""Copies of tensors into the shared memory, on more than one core."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections import deque
from typing import Any

from hf_cloudtrain.staging.memory import StagingMemory

SMALL = 2**18
"""Bytes below which a copy is made at once: that takes less time than to hand it to a different thread."""
CHUNK = 4 * 2**20
"""Bytes of one copy by one thread."""
WORTH_A_THREAD = 32 * 2**20
"""Bytes from which on more than one thread copies."""
AT_ONCE = 256 * 2**20
"""Bytes that wait for their copy at most: what torch has brought from a device for it stays in main memory until then."""
THREADS = 4
"""At most. A few cores take all that the memory can give."""


class Copies:
    """The copies of one file. The sources must not change and are kept until `finish`, before which the save does not return.

    Example:
        >>> copies = Copies(memory)
        >>> offset = copies.add(storage.data_ptr(), storage.nbytes(), storage)
        >>> copies.finish()
    """

    def __init__(self, memory: StagingMemory) -> None:
        self._memory = memory
        self._waiting: deque[tuple[int, int, int, Any]] = deque()
        self._size = 0

    def add(self, address: int, size: int, source: object) -> int | None:
        """Copy bytes of this process, by `finish` at the latest; returns where they will be, or None if there is no room.

        Args:
            source: what owns the bytes.
        """
        if size < SMALL:
            return self._memory.copy(address, size)
        offset = self._memory.take(size)
        if offset is not None:
            target = self._memory.address + offset
            for at in range(0, size, CHUNK):
                self._waiting.append((target + at, address + at, min(CHUNK, size - at), source))
            self._size += size
            if self._size >= AT_ONCE:
                self.finish()
        return offset

    def finish(self) -> None:
        """Copy what waits."""
        count = min(THREADS, _cores()) - 1 if self._size >= WORTH_A_THREAD else 0
        helpers = [
            threading.Thread(target=self._work, name="cloudtrain-copy", daemon=True) for _ in range(count)
        ]
        try:
            with contextlib.suppress(RuntimeError):  # no more threads: this one copies all
                for helper in helpers:
                    helper.start()
            self._work()
        finally:
            self.drop()
            for helper in helpers:
                if helper.ident is not None:
                    helper.join()

    def drop(self) -> None:
        """Copy nothing more: the file is not staged."""
        self._waiting.clear()
        self._size = 0

    def _work(self) -> None:
        with contextlib.suppress(IndexError):  # nothing is left
            while True:
                target, address, size, _ = self._waiting.popleft()
                ctypes.memmove(target, address, size)  # without the interpreter's lock


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
