"""The contract of every storage for files and run URLs, with each client that can move the bytes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest

from hf_cloudtrain.errors import ObjectNotFoundError, ObjectTruncatedError, StorageError
from hf_cloudtrain.storage.backend import PART_SIZE, ObjectInfo
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.fsspec_backend import FsspecBackend
from tests.contract.conftest import Location, content, digest, obstore_of

# adlfs passes whole blocks to azure-storage-blob as bytes, and aiohttp warns about that.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")

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


class TestPages:
    """What a browser gets of a page."""

    def test_a_page_has_its_type_and_is_asked_for_again(self, location: Location, storage: Storage) -> None:
        html = b"<!doctype html><title>run</title>"
        for _ in range(2):  # a page is renewed
            storage.write("index.html", html, page="text/html; charset=utf-8")
        assert storage.read("index.html") == html
        if location.server is None:
            return  # a file has no type, and neither has memory
        store = obstore_of(location.server, location.server.bucket)
        attributes = obstore.get(
            store, location.url.partition("://")[2].partition("/")[2] + "/index.html"
        ).attributes
        assert attributes["Content-Type"] == "text/html; charset=utf-8"
        if location.exclusive:  # not rclone, which keeps no cache control
            assert attributes["Cache-Control"] == "no-cache"

    def test_gcs_is_told_the_type(self) -> None:
        """No server for it runs here: the names are those of gcsfs."""
        import inspect

        import gcsfs

        headers = FsspecBackend(gcsfs.GCSFileSystem, "bucket/run")._headers("text/html")
        taken = inspect.signature(gcsfs.GCSFileSystem._pipe_file).parameters
        assert set(headers) <= set(taken)
        assert headers["content_type"] == "text/html"


class TestCheck:
    def test_probe_leaves_nothing_behind(self, location: Location, storage: Storage) -> None:
        storage.check()
        assert storage.list("") == []

    @pytest.mark.parametrize("suffix", ["/50%25_100%", "/a run/läuft", "//runs/./x/"])
    def test_both_clients_name_an_object_alike_below_every_accepted_url(
        self, location: Location, suffix: str
    ) -> None:
        storage = Storage(location.url.removeprefix("file://") + suffix, location.options)
        storage.check()
        storage.write("record.json", b"x")
        assert [info.path for info in storage.list("")] == ["record.json"]

    def test_knows_whether_exclusive_create_is_honoured(self, location: Location, storage: Storage) -> None:
        assert storage.exclusive is None
        storage.check()
        assert storage.exclusive is location.exclusive

    def test_native_client_moves_the_bytes_if_there_is_one(
        self, location: Location, storage: Storage
    ) -> None:
        """Otherwise the suite would test one client twice."""
        storage.check()
        assert (storage._transfer is not None) is location.native

    def test_two_can_run_at_once(self, location: Location, storage: Storage) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: location.open().check(), range(2)))


class TestCopy:
    def test_a_copy_is_made_on_the_storage_and_outlives_its_source(
        self, location: Location, storage: Storage
    ) -> None:
        for name in NAMES:
            storage.write(f"first/{name}", name.encode())
        if location.name.startswith("azurite"):
            with pytest.raises(StorageError, match="cannot copy"):
                storage.copy("first/plain.bin", "second/plain.bin", 9)
            assert storage.list("second") == []
            return
        for name in NAMES * 2:  # once more, as after a lost answer
            storage.copy(f"first/{name}", f"second/{name}", len(name.encode()))
        storage.delete([f"first/{name}" for name in NAMES])
        assert storage.list("first") == []
        assert location.name != "file" or storage.incomplete() == []
        assert {info.path for info in storage.list("")} == {f"second/{name}" for name in NAMES}
        for name in NAMES:
            assert storage.read(f"second/{name}") == name.encode()

    def test_copy_of_a_missing_object_is_an_error(self, location: Location, storage: Storage) -> None:
        kind = StorageError if location.name.startswith("azurite") else ObjectNotFoundError
        with pytest.raises(kind):
            storage.copy("missing", "second", 1)
        assert storage.list("") == []


class TestFiles:
    @pytest.mark.parametrize(
        "size",
        [
            pytest.param(0, id="empty"),
            pytest.param(1, id="one"),
            pytest.param(PART_SIZE - 1, id="part-1", marks=pytest.mark.slow),
            pytest.param(PART_SIZE, id="part"),
            pytest.param(PART_SIZE + 1, id="part+1"),
            pytest.param(2 * PART_SIZE, id="two", marks=pytest.mark.slow),
            pytest.param(3 * PART_SIZE + 7, id="several", marks=pytest.mark.slow),
        ],
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

    def test_each_client_keeps_names_as_they_are(self, storage: Storage, tmp_path: Path) -> None:
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


EACH_SUFFIX = ("/a run", "/läuft-模型", "/#1", "/a?b", "/%41+")


class TestRunUrl:
    @pytest.mark.parametrize(
        "suffix", ["/läuft #1-模型?b %41+", *(pytest.param(s, marks=pytest.mark.slow) for s in EACH_SUFFIX)]
    )
    def test_is_taken_literally(self, location: Location, tmp_path: Path, suffix: str) -> None:
        storage = location.open(suffix)
        storage.check()
        source = tmp_path / "source"
        source.write_bytes(b"content")
        storage.upload(str(source), "checkpoint-1/model.bin")
        storage.write("record", b"x")
        names = [info.path for info in location.open().list("")]
        assert names == [f"{suffix[1:]}/checkpoint-1/model.bin", f"{suffix[1:]}/record"]
        assert storage.download("checkpoint-1/model.bin", str(tmp_path / "back"), 7) == digest(b"content")

    def test_trailing_slash_changes_nothing(self, location: Location, tmp_path: Path) -> None:
        with_slash, without = location.open("/"), location.open()
        assert with_slash.url == without.url
        source = tmp_path / "source"
        source.write_bytes(b"content")
        with_slash.upload(str(source), "checkpoint-1/model.bin")
        with_slash.write("record", b"x")
        names = [ObjectInfo("checkpoint-1/model.bin", 7), ObjectInfo("record", 1)]
        assert with_slash.list("") == without.list("") == names
        assert without.download("checkpoint-1/model.bin", str(tmp_path / "back"), 7) == digest(b"content")

    @pytest.mark.parametrize("location", ["file"], indirect=True)
    def test_plain_path_is_the_file_url(self, location: Location) -> None:
        path = location.url.removeprefix("file://")
        Storage(path).write("record", b"x")
        assert location.open().read("record") == b"x"

    @pytest.mark.parametrize("location", ["moto", "rclone", "azurite"], indirect=True)
    def test_bucket_itself_can_be_the_run(self, location: Location, tmp_path: Path) -> None:
        assert location.server is not None
        bucket = location.server.make_bucket(f"bare-{secrets.token_hex(4)}")
        storage = Storage(f"{location.url.partition('://')[0]}://{bucket}", location.options)
        storage.check()
        (tmp_path / "source").write_bytes(b"content")
        storage.upload(str(tmp_path / "source"), "checkpoint-1/model.bin")
        assert storage.list("") == [ObjectInfo("checkpoint-1/model.bin", 7)]
        assert storage.download("checkpoint-1/model.bin", str(tmp_path / "back"), 7) == digest(b"content")


def adder(total: list[int]) -> Callable[[int], None]:
    def add(count: int) -> None:
        total[0] += count

    return add


def no_retry(seconds: float) -> None:
    raise AssertionError(f"tried again after {seconds} s where a retry cannot help")
