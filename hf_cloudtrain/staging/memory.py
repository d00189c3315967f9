"""The shared memory into which a save is copied.

An anonymous file (memfd), so that neither the size of `/dev/shm` nor a killed process matters: the system frees it when the last
process that has it open ends. Its size is an address range; memory is taken by what is written, and kept for the next save.
https://man7.org/linux/man-pages/man2/memfd_create.2.html
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ALIGNMENT = 64
"""Bytes; of every copy, so that memcpy runs at full speed."""
MADV_POPULATE_WRITE = 23
"""Linux 5.14: fault pages in now. https://man7.org/linux/man-pages/man2/madvise.2.html"""
SPARE = 512 * 2**20
"""Bytes of memory that must stay free."""
JOB_SPACE = 64 * 2**20
"""Bytes behind the tensors, for the description of the save: 500,000 tensors."""

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


class StagingMemory:
    """A region that this process and the writer share.

    Args:
        capacity: bytes at most.
        fd: of a region that another process has made; None makes one.

    Raises:
        OSError: the system has no memfd, or no address space.

    Example:
        >>> memory = StagingMemory(2**20)
        >>> offset = memory.put(b"header")
        >>> bytes(memory.view(offset, 6))
        b'header'
    """

    def __init__(self, capacity: int, fd: int | None = None) -> None:
        self.capacity = capacity
        self.used = 0
        """Bytes that the save in it takes."""
        self._is_owner = fd is None
        self.fd = _make(capacity) if fd is None else fd
        self._map = mmap.mmap(self.fd, capacity + JOB_SPACE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def copy(self, address: int, size: int) -> int | None:
        """Copy bytes of this process; returns where they are now, or None if there is no room."""
        offset = self.take(size)
        if offset is not None and size:
            ctypes.memmove(self.address + offset, address, size)  # without the interpreter's lock
        return offset

    def put(self, data: bytes) -> int | None:
        """As `copy`, for a bytes object."""
        offset = self.take(len(data))
        if offset is not None:
            self._map[offset : offset + len(data)] = data
        return offset

    def put_job(self, data: bytes) -> None:
        """Put the description of the save beside its bytes. Raises ValueError if it is too long."""
        if len(data) > JOB_SPACE:
            raise ValueError(f"The description of a save has {len(data)} bytes, and {JOB_SPACE} fit.")
        self._map[self.capacity : self.capacity + len(data)] = data

    def view(self, offset: int, size: int) -> memoryview:
        """The bytes of one copy; a description is at `capacity`."""
        return memoryview(self._map)[offset : offset + size]

    def populate(self, size: int) -> None:
        """Take the memory of the first `size` bytes now: the first save is as fast as a later one."""
        size = min(size, self.capacity) // mmap.PAGESIZE * mmap.PAGESIZE
        if size:
            try:
                self._map.madvise(MADV_POPULATE_WRITE, 0, size)
            except OSError:  # an older kernel, or no memory: the save takes what it needs
                return

    def free(self) -> None:
        """Give the memory back. No process reads it any more."""
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Forget the region; the mapping itself goes with this process, as a copy may still be read."""
        if self._is_owner and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def take(self, size: int) -> int | None:
        """Room for some bytes: where it is, or None if there is none."""
        offset = -(-self.used // ALIGNMENT) * ALIGNMENT
        if offset + size > self.capacity:
            return None
        self.used = offset + size
        return offset


def room() -> int:
    """Bytes that this process may still take, by the machine and by its cgroups, less a spare."""
    limits = [_field(PROC / "meminfo", "MemAvailable:") * 1024, *_cgroup_limits()]
    return max(0, min(limits) - SPARE)


def is_supported() -> bool:
    """Whether this system has anonymous shared memory."""
    try:
        os.close(os.memfd_create("cloudtrain-probe", os.MFD_CLOEXEC))
    except (AttributeError, OSError):  # macOS; a sandbox that refuses it
        return False
    return True


def _make(capacity: int) -> int:
    fd = os.memfd_create("cloudtrain-staging", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, capacity + JOB_SPACE)
    except OSError:
        os.close(fd)
        raise
    return fd


def _cgroup_limits() -> Iterator[int]:
    """What each limited cgroup of this process leaves, of both versions.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            home, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            home = CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A limit of a parent holds, too. In a container the path may be that of the host: then only the root is there.
        here = PurePosixPath(path.lstrip("/"))
        for folder in {home / here, *(home / parent for parent in here.parents), home}:
            yield from _left_in(folder, *names)


def _left_in(folder: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
        left = int((folder / limit).read_text()) - int((folder / used).read_text())
        yield left + _field(folder / "memory.stat", cache)


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return 0
