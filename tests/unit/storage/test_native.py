"""How a native client's bytes get to disk and under the digest, with a store in memory."""

from __future__ import annotations

import errno
import mmap
import os
from io import FileIO
from pathlib import Path
from typing import Any

import obstore
import pytest
import xxhash
from obstore.store import MemoryStore

from hf_cloudtrain.storage import native
from hf_cloudtrain.storage.backend import PART_SIZE
from hf_cloudtrain.storage.native import NativeTransfer

CONTENT = os.urandom(2 * PART_SIZE + 5)


@pytest.fixture
def transfer() -> NativeTransfer:
    store = MemoryStore()
    obstore.put(store, "large.bin", CONTENT)
    return NativeTransfer(store, "")


def _fetch(transfer: NativeTransfer, target: Path) -> str:
    with open(target, "w+b", buffering=0) as file:
        return transfer.download("large.bin", file, len(CONTENT), lambda count: None)


def test_ranges_are_under_the_digest_as_they_lie_on_disk(transfer: NativeTransfer, tmp_path: Path) -> None:
    assert _fetch(transfer, tmp_path / "got") == f"xxh3-128:{xxhash.xxh3_128_hexdigest(CONTENT)}"
    assert (tmp_path / "got").read_bytes() == CONTENT


def test_digest_is_the_same_where_the_file_system_maps_nothing(
    transfer: NativeTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(*_: Any, **options: Any) -> None:
        asked.append(options["offset"])
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert _fetch(transfer, tmp_path / "got") == f"xxh3-128:{xxhash.xxh3_128_hexdigest(CONTENT)}"
    assert asked == [0, PART_SIZE, 2 * PART_SIZE]


def test_file_that_somebody_cuts_is_an_error_and_no_other_digest(
    transfer: NativeTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(file: FileIO, block: bytes, position: int) -> int:
        return position + len(block)

    monkeypatch.setattr(native, "_write_at", lose)
    with pytest.raises(OSError, match="lost what was written to it"):
        _fetch(transfer, tmp_path / "got")
