"""What `Storage` does by itself. What it does to a store is in tests/contract."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from obstore.store import MemoryStore

from hf_cloudtrain import errors
from hf_cloudtrain.storage import client
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.fsspec_backend import connect
from hf_cloudtrain.storage.native import NativeTransfer
from hf_cloudtrain.testing import FaultyStorage
from tests.unit.storage.fake_backend import FakeBackend, connected_to


class TestCheck:
    """Each client finds what the other wrote, and so does a listing: else a check passes, and no commit is ever found."""

    @pytest.fixture
    def storage(self) -> Iterator[FaultyStorage]:
        storage = FaultyStorage("memory://check")
        with storage.everywhere():
            yield storage

    def test_an_object_that_is_listed_late_is_waited_for(
        self, storage: FaultyStorage, pauses: list[float]
    ) -> None:
        storage.lie("missing", "list", times=2)
        Storage(storage.url).check()
        assert pauses == [1.0, 4.0]
        assert storage.list("") == [], "the probe is deleted"

    def test_an_object_that_is_never_listed_is_an_error(
        self, storage: FaultyStorage, pauses: list[float]
    ) -> None:
        storage.lie("missing", "list", times=100)
        with pytest.raises(errors.StorageError, match=r"'memory://check' does not list an object"):
            Storage(storage.url).check()

    def test_an_object_that_is_listed_with_a_different_size_is_an_error(
        self, storage: FaultyStorage, pauses: list[float]
    ) -> None:
        storage.lie("size", "list", times=100)
        with pytest.raises(errors.StorageError, match="does not list an object"):
            Storage(storage.url).check()

    def test_native_client_that_looks_elsewhere_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch, no_pauses: None
    ) -> None:
        """It finds what it wrote itself, as it did before s3:///bucket/run was refused."""
        elsewhere = NativeTransfer(MemoryStore(), "run")
        monkeypatch.setattr(client, "native_transfer", lambda protocol, root, options: elsewhere)
        with pytest.raises(errors.StorageError, match=r"'memory://check', and then: Could not download"):
            Storage("memory://check").check()

    def test_native_client_that_writes_elsewhere_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Misplacing(FakeTransfer):
            def upload(self, source: IO[bytes], size: int, path: str, on_bytes: Callable[[int], None]) -> str:
                return self.backend.upload(source, f"{path}-elsewhere", on_bytes)

        monkeypatch.setattr(client, "native_transfer", lambda protocol, root, options: Misplacing("check"))
        with pytest.raises(errors.StorageError, match="different bytes"):
            Storage("memory://check").check()

    @pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
    def test_a_file_system_without_hard_links_is_used_without_exclusive_create(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        def no_link(source: str, target: str) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", no_link)
        storage = Storage(tmp_path / "run")
        with pytest.raises(errors.StorageError, match="this file system has no hard links"):
            storage.create("a", b"1")
        storage.check()
        assert storage.exclusive is False
        assert storage.create("a", b"1")
        assert not storage.create("a", b"2")


class FakeTransfer:
    """A native client that is the file system of fsspec once more."""

    def __init__(self, root: str) -> None:
        self.backend = connect(f"memory://{root}", "memory", {})[0]

    def upload(self, source: IO[bytes], size: int, path: str, on_bytes: Callable[[int], None]) -> str:
        return self.backend.upload(source, path, on_bytes)

    def download(self, path: str, target: IO[bytes], size: int, on_bytes: Callable[[int], None]) -> str:
        return self.backend.download(path, target, size, on_bytes)


class TestConnection:
    def test_is_connected_to_at_the_first_call_only(self) -> None:
        Storage("s3://bucket/run", {"endpoint_url": "http://127.0.0.1:9"})

    def test_forked_child_makes_its_own_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[int] = []

        def connect(url: str, protocol: str, options: dict[str, Any]) -> tuple[FakeBackend, str]:
            made.append(os.getpid())
            return FakeBackend(), "bucket/run"

        monkeypatch.setattr(client, "connect", connect)
        monkeypatch.setattr(client, "native_transfer", lambda protocol, root, options: None)
        used = Storage("s3://bucket/run")
        used.write("a", b"x")
        used.write("b", b"x")
        assert len(made) == 1
        monkeypatch.setattr(os, "getpid", lambda: -1)
        used.write("c", b"x")
        assert made[1:] == [-1]

    def test_closed_storage_connects_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = FakeBackend()
        used = connected_to(monkeypatch, backend)
        used.write("a", b"x")
        used.close()
        assert used.read("a") == b"x"

    def test_are_not_in_the_repr(self) -> None:
        assert "secret-value" not in repr(Storage("s3://bucket/run", {"secret": "secret-value"}))


class TestCreate:
    def test_that_finds_its_own_bytes_is_a_success(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = FakeBackend()
        storage = connected_to(monkeypatch, backend)
        backend.objects["claim"] = b"mine"
        assert storage.create("claim", b"mine") is True
        assert storage.create("claim", b"yours") is False

    def test_that_both_exists_and_does_not_exist_is_tried_again(
        self, tmp_path: Path, pauses: list[float]
    ) -> None:
        faulty = FaultyStorage(f"file://{tmp_path}")
        faulty.lie("exists", "create")
        assert faulty.create("claim", b"mine") is True
        assert faulty.count("create") == 2


class TestFiles:
    def test_missing_local_file_is_not_a_missing_object(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        with pytest.raises(FileNotFoundError) as raised:
            connected_to(monkeypatch, FakeBackend()).upload(str(tmp_path / "gone"), "model.bin")
        assert not isinstance(raised.value, errors.CloudTrainError)

    def test_object_of_a_smaller_size_is_truncated(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        backend = FakeBackend()
        backend.objects["model.bin"] = bytes(7)
        with pytest.raises(
            errors.ObjectTruncatedError, match=r"'s3://bucket/run/model\.bin' has 7 bytes, not 10"
        ):
            connected_to(monkeypatch, backend).download("model.bin", str(tmp_path / "target"), 10)
