"""The zip archive of a `torch.save`, written without torch: the writer process then needs a tenth of the memory, and starts at once.

The bytes are those of torch's own writer. The training compares both on a small archive before it relies on this; archives of 4 GiB
and more, which have longer fields, are written by torch. https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import functools
import io
import os
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

Record = tuple[str, Any, int]
"""Name, bytes and their number."""

LIMIT = 2**32 - 2**24
"""Bytes of an archive: fields of 4 bytes hold sizes and offsets below 4 GiB."""
MOST_RECORDS = 2**16 - 2

_VERSION = b"3\n"
_LOCAL = struct.Struct("<4s5H3L2H")
_AFTER_ID = b"PK\7\10"
_AFTER = struct.Struct("<4s3L")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4sQ2H2L4Q" + "4sLQL" + "4s4H2LH")
_UTF8, _SIZES_AFTER = 0x0800, 0x0008
_WORD = 2**64 - 1


def write_archive(path: Path, records: Iterable[Record], names: str, alignment: int) -> None:
    """Write an archive, with the two records that torch adds.

    Args:
        names: what torch makes of the names of all records, see `names_of`.
        alignment: bytes; of each record's data in the file.
    """
    with open(path, "wb", buffering=2**20) as file:
        _Archive(file, path.name.rpartition(".")[0] or path.name, alignment).write(records, names)


def suits(path: str, sizes: list[int], options: dict[str, Any]) -> bool:
    """Whether `write_archive` can write an archive. It is asked in the training, where torch is loaded."""
    name, alignment = os.path.basename(path), options.get("alignment", 0)
    return (
        bool(options["crc32"])
        and alignment > 0
        and re.fullmatch(r"\w[\w-]*(\.[\w-]+)*", name, re.ASCII) is not None
        and len(sizes) < MOST_RECORDS
        and sum(sizes) + (512 + alignment) * len(sizes) < LIMIT
        and _is_as_torch(alignment)
    )


@functools.lru_cache(maxsize=16)
def names_of(records: tuple[str, ...]) -> str:
    """What torch makes of the names of records, for the identity that is in an archive. It depends on the order of a C++ set."""
    return _of_torch([(name, b"", 0) for name in records], io.BytesIO(), 64)[:20]


@functools.cache
def _is_as_torch(alignment: int) -> bool:
    """Whether this release of torch writes archives as it is done here."""
    sample = [(name, bytes(size), size) for name, size in (("data.pkl", 77), ("byteorder", 6), ("data/0", 0))]
    sample += [(f"data/{at}", _AFTER_ID + bytes(range(at)) * 300, 4 + at * 300) for at in range(1, 5)]
    theirs, ours = io.BytesIO(), io.BytesIO()
    try:
        _of_torch(sample, theirs, alignment)
        _Archive(ours, "archive", alignment).write(sample, names_of(tuple(name for name, _, _ in sample)))
    except (AttributeError, TypeError, RuntimeError):
        return False
    return ours.getvalue() == theirs.getvalue()


def _of_torch(records: Iterable[Record], file: IO[bytes], alignment: int) -> str:
    """Write an archive as torch does; returns its identity."""
    import torch

    archive = torch._C.PyTorchFileWriter(file, True, alignment)
    for record in records:
        archive.write_record(*record)
    archive.write_end_of_file()
    return str(archive.serialization_id())


class _Archive:
    """An archive that is being written."""

    def __init__(self, file: IO[bytes], prefix: str, alignment: int) -> None:
        self._file = file
        self._prefix = prefix
        self._alignment = alignment
        self._at = 0
        self._count = 0
        self._central: list[bytes] = []
        self._sums = 0
        """The checksums of all records, as torch combines them."""

    def write(self, records: Iterable[Record], names: str) -> None:
        for record in records:
            self._add(*record)
        self._add("version", _VERSION, len(_VERSION))
        identity = f"{names}{self._sums:020d}".encode()
        self._add(".data/serialization_id", identity, len(identity))
        self._end()

    def _add(self, record: str, data: Any, size: int) -> None:
        name = f"{self._prefix}/{record}".encode()
        start = self._at + _LOCAL.size + len(name) + 4
        padding = -start % self._alignment
        checksum = zlib.crc32(data)
        flags = _UTF8 | (_SIZES_AFTER if size else 0)
        local = _LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(name), 4 + padding)
        offset = self._at
        self._put(local + name + b"FB" + padding.to_bytes(2, "little") + b"Z" * padding)
        if size:
            self._put(data, size)
            self._put(_AFTER.pack(_AFTER_ID, checksum, size, size))
        fields = (checksum, size, size, len(name), 0, 0, 0, 0, 0, offset)
        self._central.append(_CENTRAL.pack(b"PK\1\2", 0, 0, flags, 0, 0, 0, *fields) + name)

    def _end(self) -> None:
        start, count = self._at, len(self._central)
        for entry in self._central:
            self._put(entry)
        size = self._at - start
        long = (b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, start)
        self._put(_END.pack(*long, b"PK\6\7", 0, self._at, 1, b"PK\5\6", 0, 0, count, count, size, start, 0))

    def _put(self, data: Any, size: int | None = None) -> None:
        size = len(data) if size is None else size
        if size >= 8 and data[:4] == _AFTER_ID:  # torch looks for it in all that it writes
            checksum = int.from_bytes(data[4:8], "little")
            self._sums ^= (checksum + 0x9E3779B9 + (self._sums << 6) + (self._sums >> 2)) & _WORD
        self._file.write(data)
        self._at += size
