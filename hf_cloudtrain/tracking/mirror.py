"""The records of a run in memory, so that pages are built from them again and again without a request."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from hf_cloudtrain.checkpoints.attempts import run_listing
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.paths import ACTIONS, ATTEMPTS, CHECKPOINTS, PROGRESS, STEPS
from hf_cloudtrain.errors import ObjectNotFoundError
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.backend import ObjectInfo
from hf_cloudtrain.storage.client import MAX_RECORD_READ, Storage
from hf_cloudtrain.storage.names import META

BEST = f"{META}/best.json"
NEWEST = 200
"""Checkpoints whose manifests a page about a run needs."""
READERS = 16
"""Records that are read at the same time when a page is opened."""


class Mirror(Storage):
    """A storage that is listed when asked to, and reads each object once, until a listing shows a different size of it.

    Args:
        parent: an open storage. A connection of its own for each of a thousand runs would take minutes.
        name: folder below the parent; "" is the parent itself.
        top: folder that is listed.
    """

    def __init__(self, parent: Storage, name: str = "", top: str = META) -> None:
        # Not `super().__init__`: what that looks up is that of the parent, and for a thousand runs it takes 0.2 s.
        vars(self).update(vars(parent))
        self.url = f"{parent.url.rstrip('/')}/{name}" if name else parent.url
        self._parent = parent
        self._below = f"{name}/" if name else ""
        self._top = top
        self._sizes: dict[str, int] = {}
        self._known: dict[str, bytes] = {}

    def refresh(self) -> bool:
        """List again; whether anything changed."""
        skip = len(self._below)
        return self.update(
            {info.path[skip:]: info.size for info in self._parent.list(f"{self._below}{self._top}")}
        )

    def update(self, sizes: Mapping[str, int]) -> bool:
        """The same from a listing that was made already."""
        if sizes == self._sizes:
            return False
        for path, data in list(self._known.items()):
            if sizes.get(path) != self._sizes.get(path) and sizes.get(path) != len(data):
                self._known.pop(path, None)
        self._known.pop(BEST, None)  # it may change without a new size, and never changes alone
        self._sizes = dict(sizes)
        return True

    def forget(self) -> None:
        """Drop what is in memory; it is read again when it is asked for."""
        self._known.clear()

    def save(self, file: Path) -> None:
        """Write what is in memory to a file of this machine, for the next process."""
        with zipfile.ZipFile(file, "w") as archive:
            for path, data in self._known.items():
                archive.writestr(path, data)

    def load(self, file: Path) -> None:
        """Read such a file; without one, or with a damaged one, the records are read again."""
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
            self._known = {name: archive.read(name) for name in archive.namelist()}
            self._sizes = {path: len(data) for path, data in self._known.items()}

    def fetch(self, path: str) -> bool:
        """Read an object again; whether it changed."""
        before = self._known.get(path)
        try:
            self._known[path] = data = self._parent.read(f"{self._below}{path}")
        except ObjectNotFoundError:
            self._sizes.pop(path, None)
            self._known.pop(path, None)
            return before is not None
        self._sizes[path] = len(data)
        return data != before

    def fetch_all(self, paths: Iterable[str]) -> None:
        """Read several, at the same time."""
        in_threads(self.fetch, (list(paths), READERS))

    def missing(self) -> list[str]:
        """Records that a page about the run needs, and that are not in memory."""
        wanted = [path for path in list(self._sizes) if path.startswith((ATTEMPTS, PROGRESS, STEPS, ACTIONS))]
        wanted += [BEST] if BEST in self._sizes else []
        keys = sorted(filter(None, map(CheckpointKey.named, self._names(CHECKPOINTS))))
        newest = {key.attempt: key for key in keys}.values()  # of each attempt
        wanted += [f"{CHECKPOINTS}/{key}.json" for key in {*keys[-NEWEST:], *newest}]
        return [path for path in wanted if path not in self._known]

    def read(self, path: str, max_bytes: int = MAX_RECORD_READ) -> bytes:
        """As of a storage, from memory where it can be."""
        if path not in self._sizes:
            raise ObjectNotFoundError(f"There is no {path!r} in {self.url!r}.")
        if path not in self._known:
            self.fetch(path)
        try:
            return self._known[path]
        except KeyError:
            raise ObjectNotFoundError(f"There is no {path!r} in {self.url!r} any more.") from None

    def list(self, prefix: str) -> list[ObjectInfo]:
        """As of a storage, by the last listing."""
        below = f"{prefix}/" if prefix else ""
        return [
            ObjectInfo(path, size) for path, size in sorted(self._sizes.items()) if path.startswith(below)
        ]

    def _names(self, folder: str) -> Iterable[str]:
        return (path[len(folder) + 1 : -5] for path in list(self._sizes) if path.startswith(f"{folder}/"))


def mirrors_below(storage: Storage) -> dict[str, tuple[Mirror, int]]:
    """A mirror of each run at or below a URL, by name, and the bytes that the run stores, from one listing."""
    found = {}
    for name, (sizes, size) in run_listing(storage).items():
        mirror = Mirror(storage, name)
        mirror.update(sizes)
        found[name] = mirror, size
    return found
