"""What every storage must do, whoever keeps the bytes and whichever way they take."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from hf_cloudtrain.errors import ObjectNotFoundError, ObjectTruncatedError, StorageError
from hf_cloudtrain.native import PART_SIZE
from hf_cloudtrain.storage import ObjectInfo, Storage
from tests.contract.conftest import Place

# adlfs hands azure-storage-blob whole blocks as bytes, which aiohttp would rather have as files.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")

EXCLUSIVE = ("file", "memory", "moto", "azurite")
EVERY_KIND = ("file", "memory", "moto", "rclone", "azurite")
"""For what does not depend on the way that the bytes of files take."""
NAMES = (
    "plain.bin",
    "with space.bin",
    "naïve-模型-😀.bin",
    "e\N{COMBINING ACUTE ACCENT}.bin",
    "hash#tag.bin",
    "question?mark=1.bin",
    "percent%41.bin",
    "percent%2Fslash.bin",
    "plus+plus.bin",
    "amp&equals=.bin",
    "[brackets]*.bin",
    "quote'and\"quote.bin",
    "~tilde;semi,comma@at:colon!.bin",
    "a folder/with é/nested file.bin",
    ".hidden/.file",
)


@pytest.fixture
def storage(place: Place) -> Iterator[Storage]:
    storage = place.open()
    yield storage
    storage.close()


def content(size: int) -> bytes:
    """Bytes that differ in every part, made quickly."""
    block = os.urandom(min(size, 2**16))
    numbered = (number.to_bytes(8, "big") + block for number in range(size // 2**16 + 1))
    return b"".join(numbered)[:size]


def digest(data: bytes) -> str:
    return "xxh3-128:" + xxhash.xxh3_128(data).hexdigest()


class TestCheck:
    def test_probe_leaves_nothing_behind(self, place: Place, storage: Storage) -> None:
        storage.check()
        assert storage.list("") == []

    def test_knows_whether_exclusive_create_is_honoured(self, place: Place, storage: Storage) -> None:
        assert storage.exclusive is None
        storage.check()
        assert storage.exclusive is place.exclusive

    def test_bytes_take_the_native_way_where_there_is_one(self, place: Place, storage: Storage) -> None:
        """Else the suite would test one way twice."""
        storage.check()
        assert (storage._transfer is not None) is place.native

    def test_can_be_repeated_beside_another(self, place: Place, storage: Storage) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: place.open().check(), range(2)))


class TestFiles:
    @pytest.mark.parametrize(
        "size",
        [0, 1, PART_SIZE - 1, PART_SIZE, PART_SIZE + 1, 2 * PART_SIZE, 3 * PART_SIZE + 7],
        ids=["empty", "one", "part-1", "part", "part+1", "two", "several"],
    )
    def test_file_comes_back_whole_with_the_digest_of_its_content(
        self, storage: Storage, tmp_path: Path, size: int
    ) -> None:
        data = content(size)
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(data)
        sent, got = [0], [0]

        assert storage.upload(str(source), "checkpoint-1/model.bin", on_bytes=adder(sent)) == digest(data)
        assert storage.list("checkpoint-1") == [ObjectInfo("checkpoint-1/model.bin", size)]
        fetched = storage.download("checkpoint-1/model.bin", str(target), size, on_bytes=adder(got))

        assert fetched == digest(data)
        assert target.read_bytes() == data
        assert sent == got == [size]

    def test_many_small_files(self, storage: Storage, tmp_path: Path) -> None:
        files = {f"checkpoint-1/shard-{number:03d}.json": content(number * 37) for number in range(100)}
        for name, data in files.items():
            (tmp_path / os.path.basename(name)).write_bytes(data)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: storage.upload(str(tmp_path / os.path.basename(name)), name), files))

        assert storage.list("checkpoint-1") == [ObjectInfo(name, len(data)) for name, data in files.items()]
        for name, data in list(files.items())[::10]:
            assert storage.download(name, str(tmp_path / "back"), len(data)) == digest(data)
            assert (tmp_path / "back").read_bytes() == data

    def test_names_are_kept_as_they_are_every_way(self, storage: Storage, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(b"content")
        paths = sorted(f"checkpoint-1/{name}" for name in NAMES)

        for path in paths:
            storage.upload(str(source), path)
        assert [info.path for info in storage.list("")] == paths
        for path in paths:
            assert storage.read(path) == b"content", path
            assert storage.download(path, str(target), 7) == digest(b"content"), path
            storage.write(path, path.encode())
        for path in paths:
            assert storage.download(path, str(target), len(path.encode())) == digest(path.encode()), path
        storage.delete(paths)
        assert storage.list("") == []
        for path in paths:
            assert storage.create(path, b"first") is True, path
            assert storage.create(path, b"first") is True, path

    def test_similar_names_are_different_objects(self, storage: Storage) -> None:
        names = ["a%41", "aA", "a+b", "a b", "a%20b", "\u00e9", "e\u0301", "x", "X"]
        for name in names:
            storage.write(f"checkpoint-1/{name}", name.encode())
        assert {info.path for info in storage.list("checkpoint-1")} == {
            f"checkpoint-1/{name}" for name in names
        }
        assert [storage.read(f"checkpoint-1/{name}").decode() for name in names] == names

    def test_upload_replaces_a_longer_object(self, storage: Storage, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(content(PART_SIZE + 5))
        storage.upload(str(source), "model.bin")
        source.write_bytes(b"short")
        storage.upload(str(source), "model.bin")
        assert storage.list("") == [ObjectInfo("model.bin", 5)]
        assert storage.download("model.bin", str(target), 5) == digest(b"short")

    def test_download_replaces_a_longer_local_file(self, storage: Storage, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_bytes(b"something much longer")
        storage.write("model.bin", b"short")
        storage.download("model.bin", str(target), 5)
        assert target.read_bytes() == b"short"

    @pytest.mark.parametrize("size", [0, PART_SIZE + 1])
    def test_download_of_a_missing_object_names_it(self, storage: Storage, tmp_path: Path, size: int) -> None:
        with pytest.raises(ObjectNotFoundError, match=r"'\S*/checkpoint-1/gone\.bin'"):
            storage.download("checkpoint-1/gone.bin", str(tmp_path / "target"), size)

    @pytest.mark.parametrize("size", [6, 2 * PART_SIZE + 1])
    def test_download_of_a_truncated_object_says_so_at_once(
        self, storage: Storage, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("time.sleep", no_retry)
        storage.write("checkpoint-1/cut.bin", b"12345")
        with pytest.raises(ObjectTruncatedError, match=r"/checkpoint-1/cut\.bin'"):
            storage.download("checkpoint-1/cut.bin", str(tmp_path / "target"), size)

    def test_missing_local_file_is_not_a_missing_object(self, storage: Storage, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="gone") as raised:
            storage.upload(str(tmp_path / "gone"), "model.bin")
        assert not isinstance(raised.value, ObjectNotFoundError)


class TestRecords:
    def test_write_overwrites(self, storage: Storage) -> None:
        storage.write("last.json", b"a longer first version")
        storage.write("last.json", b"second")
        assert storage.read("last.json") == b"second"

    @pytest.mark.parametrize("size", [0, 1, 100_000])
    def test_read_gives_what_was_written(self, storage: Storage, size: int) -> None:
        data = content(size)
        storage.write("record", data)
        assert storage.read("record") == data

    def test_read_of_nothing_names_it(self, storage: Storage) -> None:
        with pytest.raises(ObjectNotFoundError, match=r"'\S*/gone\.json'"):
            storage.read("gone.json")

    def test_read_stops_at_the_limit(self, storage: Storage) -> None:
        storage.write("record", b"0123456789")
        assert storage.read("record", max_bytes=10) == b"0123456789"
        with pytest.raises(StorageError, match=r"'\S*/record' is larger than the 9 bytes"):
            storage.read("record", max_bytes=9)

    def test_delete_takes_many_and_minds_none_that_is_missing(self, storage: Storage) -> None:
        names = [f"checkpoint-1/{number}" for number in range(20)]
        for name in names:
            storage.write(name, b"x")
        storage.write("checkpoint-2/kept", b"x")
        storage.delete([*names, "gone", "no-folder/gone", names[0]])
        assert storage.list("") == [ObjectInfo("checkpoint-2/kept", 1)]
        storage.delete([])

    def test_deleted_object_is_gone_for_every_question(self, storage: Storage, tmp_path: Path) -> None:
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
        """Where the store ignores the condition, a look beforehand does it when nobody else is at work."""
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

    @pytest.mark.parametrize("place", EXCLUSIVE, indirect=True)
    def test_holds_before_the_probe_too(self, storage: Storage) -> None:
        assert storage.create("claim", b"1") is True
        assert storage.create("claim", b"2") is False
        assert storage.read("claim") == b"1"

    def test_stored_but_the_answer_lost_is_success(
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

    @pytest.mark.parametrize("place", EXCLUSIVE, indirect=True)
    @pytest.mark.parametrize("shared", [True, False], ids=["one-storage", "storage-each"])
    def test_of_racing_creators_exactly_one_wins(self, place: Place, shared: bool) -> None:
        racers, rounds = 6, 5
        storages = [place.open()] * racers if shared else [place.open() for _ in range(racers)]
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
    @pytest.mark.parametrize("place", EVERY_KIND, indirect=True)
    def test_all_pages_of_2500_keys_in_order(self, place: Place, storage: Storage) -> None:
        names = [f"checkpoint-1/{number:04d}.bin" for number in range(2500)]
        place.fill(names)
        assert storage.list("checkpoint-1") == [ObjectInfo(name, 1) for name in names]
        assert len(storage.list("")) == 2500

    def test_of_nothing_is_empty(self, storage: Storage) -> None:
        assert storage.list("") == []
        assert storage.list("checkpoint-1") == []
        storage.write("checkpoint-10/a", b"x")
        assert storage.list("checkpoint-1") == []

    def test_is_of_a_folder_not_of_a_beginning(self, storage: Storage) -> None:
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

    def test_sees_what_another_wrote_meanwhile(self, place: Place, storage: Storage) -> None:
        other = place.open()
        assert storage.list("checkpoints") == []
        other.write("checkpoints/1", b"x")
        assert len(storage.list("checkpoints")) == 1
        other.write("checkpoints/2", b"x")
        assert len(storage.list("checkpoints")) == 2
        other.delete(["checkpoints/1"])
        assert storage.list("checkpoints") == [ObjectInfo("checkpoints/2", 1)]

    def test_other_runs_beside_are_not_seen(self, place: Place, storage: Storage) -> None:
        place.open("-2").write("a", b"x")
        place.open("/nested").write("b", b"x")
        assert storage.list("") == [ObjectInfo("nested/b", 1)]


class TestRunUrl:
    @pytest.mark.parametrize("suffix", ["/a run", "/läuft-模型", "/#1", "/a?b", "/%41+"])
    def test_is_taken_literally(self, place: Place, tmp_path: Path, suffix: str) -> None:
        storage = place.open(suffix)
        storage.check()
        source = tmp_path / "source"
        source.write_bytes(b"content")
        storage.upload(str(source), "checkpoint-1/model.bin")
        storage.write("record", b"x")
        names = [info.path for info in place.open().list("")]
        assert names == [f"{suffix[1:]}/checkpoint-1/model.bin", f"{suffix[1:]}/record"]
        assert storage.download("checkpoint-1/model.bin", str(tmp_path / "back"), 7) == digest(b"content")

    def test_trailing_slash_changes_nothing(self, place: Place, tmp_path: Path) -> None:
        with_slash, without = place.open("/"), place.open()
        assert with_slash.url == without.url
        source = tmp_path / "source"
        source.write_bytes(b"content")
        with_slash.upload(str(source), "checkpoint-1/model.bin")
        with_slash.write("record", b"x")
        names = [ObjectInfo("checkpoint-1/model.bin", 7), ObjectInfo("record", 1)]
        assert with_slash.list("") == without.list("") == names
        assert without.download("checkpoint-1/model.bin", str(tmp_path / "back"), 7) == digest(b"content")

    @pytest.mark.parametrize("place", ["file"], indirect=True)
    def test_plain_path_is_the_file_url(self, place: Place) -> None:
        path = place.url.removeprefix("file://")
        Storage(path).write("record", b"x")
        assert place.open().read("record") == b"x"

    @pytest.mark.parametrize("place", ["moto", "rclone", "azurite"], indirect=True)
    def test_bucket_itself_can_be_the_run(self, place: Place, tmp_path: Path) -> None:
        assert place.server is not None
        bucket = place.server.make_bucket(f"bare-{secrets.token_hex(4)}")
        storage = Storage(f"{place.url.partition('://')[0]}://{bucket}", place.options)
        storage.check()
        (tmp_path / "source").write_bytes(b"content")
        storage.upload(str(tmp_path / "source"), "checkpoint-1/model.bin")
        assert storage.list("") == [ObjectInfo("checkpoint-1/model.bin", 7)]
        assert storage.download("checkpoint-1/model.bin", str(tmp_path / "back"), 7) == digest(b"content")


def adder(total: list[int]) -> object:
    def add(count: int) -> None:
        total[0] += count

    return add


def no_retry(seconds: float) -> None:
    raise AssertionError(f"tried again after {seconds} s where a retry cannot help")
