"""A back end in memory that fails as configured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.storage import client
from hf_cloudtrain.storage.client import Storage

if TYPE_CHECKING:
    import pytest


class FakeBackend:
    """Raises the given failures, then keeps objects in memory."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.objects: dict[str, bytes] = {}
        self.calls = 0

    def _fail(self) -> None:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)

    def read(self, path: str, limit: int) -> bytes:
        self._fail()
        return self.objects[path][:limit]

    def write(self, path: str, data: bytes) -> None:
        self._fail()
        self.objects[path] = data

    def create(self, path: str, data: bytes) -> None:
        if path in self.objects:
            self._fail()
            raise FileExistsError(path)
        self.write(path, data)

    def upload(self, source: Any, path: str, on_bytes: Callable[[int], None]) -> str:
        while block := source.read(10):
            self.objects[path] = self.objects.get(path, b"") + block
            on_bytes(len(block))
            if self.failures:
                self._fail()
        return "0" * 32

    def download(self, path: str, target: Any, size: int, on_bytes: Callable[[int], None]) -> str:
        for start in range(0, size, 10):
            target.write(self.objects[path][start : start + 10])
            on_bytes(len(self.objects[path][start : start + 10]))
            if self.failures:
                self._fail()
        return "0" * 32


def connected_to(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend, **options: Any) -> Storage:
    monkeypatch.setattr(client, "connect", lambda url, protocol, options: (backend, "bucket/run"))
    monkeypatch.setattr(client, "native_transfer", lambda protocol, root, options: None)
    return Storage("s3://bucket/run", options)
