"""Bytes of the native client: on disk, and in the digest. The store is in memory."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from io import FileIO
from pathlib import Path
from typing import Any

import obstore
import pytest
import xxhash
from obstore.store import MemoryStore

from hf_cloudtrain.storage import native
from hf_cloudtrain.storage.backend import PART_SIZE
from hf_cloudtrain.storage.native import NativeTransfer, native_transfer

CONTENT = os.urandom(2 * PART_SIZE + 5)


@pytest.fixture
def transfer() -> NativeTransfer:
    store = MemoryStore()
    obstore.put(store, "large.bin", CONTENT)
    return NativeTransfer(store, "")


def _fetch(transfer: NativeTransfer, target: Path) -> str:
    with open(target, "w+b", buffering=0) as file:
        return transfer.download("large.bin", file, len(CONTENT), lambda count: None)


def test_digest_of_parallel_ranges_is_that_of_the_file_on_disk(
    transfer: NativeTransfer, tmp_path: Path
) -> None:
    assert _fetch(transfer, tmp_path / "got") == f"xxh3-128:{xxhash.xxh3_128_hexdigest(CONTENT)}"
    assert (tmp_path / "got").read_bytes() == CONTENT


def test_digest_is_the_same_without_memory_mapping(
    transfer: NativeTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(*_: Any, **options: Any) -> None:
        asked.append(options["offset"])
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert _fetch(transfer, tmp_path / "got") == f"xxh3-128:{xxhash.xxh3_128_hexdigest(CONTENT)}"
    assert asked == [0, PART_SIZE, 2 * PART_SIZE]


def test_file_that_is_truncated_during_the_download_is_an_error(
    transfer: NativeTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(file: FileIO, block: bytes, position: int) -> int:
        return position + len(block)

    monkeypatch.setattr(native, "_write_at", lose)
    with pytest.raises(OSError, match="was truncated during the download"):
        _fetch(transfer, tmp_path / "got")


def test_missing_native_client_leaves_the_bytes_to_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    options = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9"}
    assert native_transfer("s3", "bucket/run", options) is None
