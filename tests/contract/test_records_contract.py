"""The contract of every storage for small records: read, write, delete, exclusive create, list."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_cloudtrain.errors import ObjectNotFoundError, StorageError
from hf_cloudtrain.storage.backend import ObjectInfo
from hf_cloudtrain.storage.client import Storage
from tests.contract.conftest import EVERY_SERVER, EXCLUSIVE, Location, content, new_location


@pytest.fixture(params=EVERY_SERVER)
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    """fsspec moves the records everywhere, so the native client makes no difference."""
    yield from new_location(request, tmp_path)


class TestRecords:
    def test_write_overwrites(self, storage: Storage) -> None:
        storage.write("last.json", b"a longer first version")
        storage.write("last.json", b"second")
        assert storage.read("last.json") == b"second"

    @pytest.mark.parametrize("size", [0, 1, 100_000])
    def test_read_returns_the_written_bytes(self, storage: Storage, size: int) -> None:
        data = content(size)
        storage.write("record", data)
        assert storage.read("record") == data

    def test_read_of_a_missing_object_names_it(self, storage: Storage) -> None:
        with pytest.raises(ObjectNotFoundError, match=r"'\S*/gone\.json'"):
            storage.read("gone.json")

    def test_read_stops_at_the_limit(self, storage: Storage) -> None:
        storage.write("record", b"0123456789")
        assert storage.read("record", max_bytes=10) == b"0123456789"
        for limit in (9, 3):
            with pytest.raises(StorageError, match=rf"'\S*/record' is larger than {limit} bytes"):
                storage.read("record", max_bytes=limit)

    def test_delete_takes_many_paths_and_ignores_missing_objects(self, storage: Storage) -> None:
        names = [f"checkpoint-1/{number}" for number in range(20)]
        for name in names:
            storage.write(name, b"x")
        storage.write("checkpoint-2/kept", b"x")
        storage.delete([*names, "gone", "no-folder/gone", names[0]])
        assert storage.list("") == [ObjectInfo("checkpoint-2/kept", 1)]
        storage.delete([])

    def test_deleted_object_is_missing_for_every_request(self, storage: Storage, tmp_path: Path) -> None:
        storage.write("checkpoint-1/a", b"x")
        assert storage.list("checkpoint-1")
        storage.delete(["checkpoint-1/a"])
        assert storage.list("checkpoint-1") == []
        with pytest.raises(ObjectNotFoundError):
            storage.read("checkpoint-1/a")
        with pytest.raises(ObjectNotFoundError):
            storage.download("checkpoint-1/a", str(tmp_path / "a"), 1)


class TestExclusiveCreate:
    def test_second_create_is_refused_and_changes_nothing(self, storage: Storage) -> None:
        """If the store ignores the condition, a read before the write detects the object, unless two writers race."""
        storage.check()
        assert storage.create("claims/checkpoint-1.json", b"attempt 1") is True
        assert storage.create("claims/checkpoint-1.json", b"attempt 2") is False
        assert storage.create("claims/checkpoint-1.json", b"attempt 1 and more") is False
        assert storage.create("claims/checkpoint-1.json", b"attempt") is False
        assert storage.read("claims/checkpoint-1.json") == b"attempt 1"

    def test_creating_the_same_bytes_again_is_success(self, storage: Storage) -> None:
        storage.check()
        assert storage.create("claim", b"nonce 1") is True
        assert storage.create("claim", b"nonce 1") is True

    def test_created_object_can_be_created_again_once_deleted(self, storage: Storage) -> None:
        storage.check()
        assert storage.create("claim", b"1") is True
        storage.delete(["claim"])
        assert storage.create("claim", b"2") is True
        assert storage.read("claim") == b"2"

    @pytest.mark.parametrize("location", EXCLUSIVE, indirect=True)
    def test_holds_before_the_probe_too(self, storage: Storage) -> None:
        assert storage.create("claim", b"1") is True
        assert storage.create("claim", b"2") is False
        assert storage.read("claim") == b"1"

    def test_stored_with_a_lost_answer_is_success(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage.check()
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        backend = storage._connected()
        name = "create" if storage.exclusive else "write"
        store, lost = getattr(backend, name), []

        def lose_the_first_answer(path: str, data: bytes) -> None:
            store(path, data)
            if not lost:
                lost.append(path)
                raise ConnectionResetError("the answer is lost")

        monkeypatch.setattr(backend, name, lose_the_first_answer)
        assert storage.create("claim", b"nonce 1") is True
        assert storage.create("claim", b"nonce 2") is False
        assert lost == ["claim"]
        assert storage.read("claim") == b"nonce 1"

    @pytest.mark.parametrize("location", EXCLUSIVE, indirect=True)
    @pytest.mark.parametrize("shared", [True, False], ids=["one-storage", "storage-each"])
    def test_of_racing_creators_exactly_one_wins(self, location: Location, shared: bool) -> None:
        racers, rounds = 6, 5
        storages = [location.open()] * racers if shared else [location.open() for _ in range(racers)]
        storages[0].check()
        start = threading.Barrier(racers)

        def race(number: int) -> list[bool]:
            won = []
            for turn in range(rounds):
                start.wait(60)
                won.append(storages[number].create(f"claims/{turn}", b"racer %d" % number))
            return won

        with ThreadPoolExecutor(racers) as pool:
            results = list(pool.map(race, range(racers)))

        for turn in range(rounds):
            winners = [number for number in range(racers) if results[number][turn]]
            assert len(winners) == 1
            assert storages[0].read(f"claims/{turn}") == b"racer %d" % winners[0]


class TestList:
    @pytest.mark.slow
    def test_all_pages_of_2500_keys_in_order(self, location: Location, storage: Storage) -> None:
        names = [f"checkpoint-1/{number:04d}.bin" for number in range(2500)]
        location.fill(names)
        assert storage.list("checkpoint-1") == [ObjectInfo(name, 1) for name in names]
        assert len(storage.list("")) == 2500

    def test_of_a_missing_folder_is_empty(self, storage: Storage) -> None:
        assert storage.list("") == []
        assert storage.list("checkpoint-1") == []
        storage.write("checkpoint-10/a", b"x")
        assert storage.list("checkpoint-1") == []

    def test_is_of_a_folder_and_not_of_a_prefix(self, storage: Storage) -> None:
        for name in ("checkpoint-1/a", "checkpoint-10/a", "checkpoint-1.a2/a", "checkpoint-1-x"):
            storage.write(name, b"x")
        assert storage.list("checkpoint-1") == [ObjectInfo("checkpoint-1/a", 1)]
        assert storage.list("checkpoint-1/") == [ObjectInfo("checkpoint-1/a", 1)]

    def test_is_recursive_sorted_and_relative_to_the_run(self, storage: Storage) -> None:
        names = ["b/2", "b/10", "b/1/deep/er", "a", ".cloudtrain/run.json"]
        for name in names:
            storage.write(name, name.encode())
        assert storage.list("") == [ObjectInfo(name, len(name)) for name in sorted(names)]
        assert [info.path for info in storage.list("b")] == ["b/1/deep/er", "b/10", "b/2"]

    def test_shows_what_a_different_client_has_written(self, location: Location, storage: Storage) -> None:
        other = location.open()
        assert storage.list("checkpoints") == []
        other.write("checkpoints/1", b"x")
        assert len(storage.list("checkpoints")) == 1
        other.write("checkpoints/2", b"x")
        assert len(storage.list("checkpoints")) == 2
        other.delete(["checkpoints/1"])
        assert storage.list("checkpoints") == [ObjectInfo("checkpoints/2", 1)]

    def test_does_not_show_other_runs(self, location: Location, storage: Storage) -> None:
        location.open("-2").write("a", b"x")
        location.open("/nested").write("b", b"x")
        assert storage.list("") == [ObjectInfo("nested/b", 1)]
