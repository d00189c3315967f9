"""Small folders, stores with faults, and what a copy contains."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from hf_cloudtrain.datasets.store import Dataset, DatasetStore
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.testing import FaultyStorage

FILES = {"train/part-0.parquet": b"first" * 100, "train/part-1.parquet": b"second" * 99, "meta.json": b"{}"}


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_read_only(folder: Path) -> bool:
    return all(not path.stat().st_mode & 0o222 for path in (folder, *folder.rglob("*")))


def bytes_of(dataset: Dataset, store: DatasetStore, to: Path) -> dict[str, bytes]:
    return contents(store.local_copy(dataset, cache=to))


@contextlib.contextmanager
def requests_of(store: DatasetStore) -> Iterator[FaultyStorage]:
    """Every request to a store, and faults."""
    with FaultyStorage(store.catalog.storage.url).everywhere() as script:
        yield script


@contextlib.contextmanager
def grown_after_the_listing(source: Storage, path: str) -> Iterator[None]:
    download = Storage.download

    def late(storage: Storage, wanted: str, *arguments: Any, **more: Any) -> str:
        if storage.url == source.url and wanted == path:
            source.write(path, source.read(path) + b"more")
        return download(storage, wanted, *arguments, **more)

    with mock.patch.object(Storage, "download", late):
        yield


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    nudge = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        nudge.wait(0.01)
    raise AssertionError("the condition did not become true")
