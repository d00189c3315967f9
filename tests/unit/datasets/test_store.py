"""Datasets: versions that exist when they are committed, bytes that are sent once, and local copies that are shared."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import sender
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.datasets import cache
from hf_cloudtrain.datasets import store as datasets_module
from hf_cloudtrain.datasets.store import Dataset, DatasetStore, local_copy
from hf_cloudtrain.datasets.upload import Upload
from hf_cloudtrain.errors import (
    ConfigurationError,
    CorruptCheckpointError,
    ManifestError,
    NoDatasetError,
    NotCommittedError,
    StorageError,
    StorageUnavailableError,
)
from hf_cloudtrain.runtime import files as runtime_files
from hf_cloudtrain.runtime import threads as runtime_threads
from hf_cloudtrain.storage.backend import ObjectInfo
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.testing import FaultyStorage
from tests.servers import Server

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
    """Every request that anybody makes to a store, and faults."""
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


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> Iterator[None]:
    monkeypatch.setenv(env.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(env.STORE, str(tmp_path / "store"))
    yield
    for folder, _, _ in os.walk(tmp_path):
        os.chmod(folder, 0o700)


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DatasetStore]:
    if request.param == "file":
        yield DatasetStore()
        return
    yield DatasetStore("memory://store")
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    return fill(tmp_path / "glue", FILES)


def test_a_folder_becomes_version_1_and_comes_back_whole(store: DatasetStore, glue: Path) -> None:
    dataset, sent = store.create("glue", glue)
    assert (dataset.name, dataset.version, sent) == ("glue", 1, sum(map(len, FILES.values())))
    assert store.versions() == {"glue": [1]}
    found = store.find("glue")
    assert found == dataset
    assert found.manifest.origin["source"] == str(glue)
    assert contents(store.local_copy(found)) == FILES


def test_a_version_on_storage_is_the_folder_as_it_was(glue: Path, tmp_path: Path) -> None:
    DatasetStore().create("glue", glue)
    fill(glue, {"meta.json": b"[]"})
    DatasetStore().create("glue", glue)
    assert contents(tmp_path / "store" / "datasets" / "glue") == FILES
    assert contents(tmp_path / "store" / "datasets" / "glue.2") == {**FILES, "meta.json": b"[]"}


def test_what_has_not_changed_makes_no_new_version(store: DatasetStore, glue: Path) -> None:
    first, _ = store.create("glue", glue)
    again, sent = store.create("glue", shutil.copytree(glue, glue.with_name("elsewhere")))
    assert (again, sent) == (first, None)
    assert store.versions() == {"glue": [1]}


def test_only_what_is_new_is_sent_and_a_renamed_file_is_not(
    store: DatasetStore, glue: Path, tmp_path: Path
) -> None:
    first, _ = store.create("glue", glue)
    (glue / "meta.json").write_bytes(b"[]")  # of the same size as before
    (glue / "train" / "part-1.parquet").rename(glue / "last.parquet")
    (glue / "train" / "part-2.parquet").write_bytes(b"third")
    with requests_of(store) as seen:
        second, sent = DatasetStore(store.url).create("glue", glue)
    assert (second.version, sent) == (2, len(b"[]third"))
    assert {call.path for call in seen.calls if call.kind == "upload" and "probe" not in call.path} == {
        "glue.2/meta.json",
        "glue.2/train/part-2.parquet",
    }
    assert bytes_of(second, store, tmp_path / "2") == contents(glue)
    assert bytes_of(first, store, tmp_path / "1") == FILES


def test_a_version_outlives_the_one_that_its_files_were_copied_from(
    store: DatasetStore, glue: Path, tmp_path: Path
) -> None:
    store.create("glue", glue)
    second, _ = store.create("glue", fill(glue, {"more.json": b"1"}))
    store.delete("glue", 1)
    assert store.versions() == {"glue": [2]}
    assert bytes_of(second, store, tmp_path / "2") == {**FILES, "more.json": b"1"}


def test_where_the_storage_does_not_copy_the_bytes_are_sent(
    store: DatasetStore, glue: Path, tmp_path: Path
) -> None:
    store.create("glue", glue)
    fill(glue, {"more.json": b"1"})
    with requests_of(store) as script:
        script.fail("any", NotImplementedError("no copies here"), path="glue.2/train/part-0.parquet")
        second, sent = DatasetStore(store.url).create("glue", glue)
    assert sent == len(FILES["train/part-0.parquet"]) + 1
    assert bytes_of(second, store, tmp_path / "2") == {**FILES, "more.json": b"1"}


def test_a_version_that_lost_a_file_on_storage_is_healed_by_creating_it_again(
    store: DatasetStore, glue: Path
) -> None:
    first, _ = store.create("glue", glue)
    store.catalog.storage.delete(["glue/meta.json"])
    with pytest.raises(CorruptCheckpointError, match=r"meta\.json"):
        store.local_copy(first)
    second, sent = store.create("glue", glue)
    assert (second.version, sent) == (2, len(FILES["meta.json"]))
    assert contents(store.local_copy(second)) == FILES


def test_a_damaged_manifest_of_the_version_before_is_in_nobodys_way(store: DatasetStore, glue: Path) -> None:
    store.create("glue", glue)
    store.catalog.storage.write(".cloudtrain/folders/glue-000001.json", b"{")
    with pytest.raises(ManifestError, match="damaged"):
        store.find("glue")
    second, sent = store.create("glue", glue)
    assert (second.version, sent) == (2, second.manifest.size)
    assert contents(store.local_copy(store.find("glue"))) == FILES


def test_nothing_exists_when_the_upload_fails(glue: Path) -> None:
    store = DatasetStore()
    with requests_of(store) as script:
        script.fail("upload", StorageError("refused on purpose"), path="glue/train/*")
        with pytest.raises(StorageError, match="refused on purpose"):
            store.create("glue", glue)
    assert store.versions() == {}
    dataset, _ = store.create("glue", glue)
    assert contents(store.local_copy(dataset)) == FILES


def test_a_commit_that_was_damaged_on_its_way_or_taken_is_none(glue: Path) -> None:
    store = DatasetStore()
    with requests_of(store) as script:
        script.corrupt("create", path=".cloudtrain/folders/*")
        with pytest.raises(StorageUnavailableError, match="does not hold what was written"):
            store.create("glue", glue)
    with (
        mock.patch.object(NamedFolders, "commit", return_value=False),
        pytest.raises(NotCommittedError, match="'glue' was not committed: another process"),
    ):
        store.create("glue", glue)
    assert store.versions() == {}


def test_a_file_that_is_written_meanwhile_is_not_stored(glue: Path) -> None:
    store = DatasetStore()
    send = datasets_module.send_folder

    def late(*arguments: Any) -> Any:
        fill(glue, {"meta.json": b"[1, 2]"})
        return send(*arguments)

    with (
        mock.patch.object(datasets_module, "send_folder", late),
        pytest.raises(CorruptCheckpointError, match=r"glue' was written to meanwhile.*meta\.json"),
    ):
        store.create("glue", glue)
    assert store.versions() == {}


def test_an_upload_that_was_cut_off_goes_on_in_its_own_folder(
    store: DatasetStore, glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "SMALL_AT_ONCE", 1)
    with requests_of(store) as script:
        script.fail("upload", StorageError("refused on purpose"), path="glue/train/part-1*")
        with pytest.raises(StorageError, match="refused on purpose"):
            store.create("glue", glue)
    arrived = {info.path.partition("/")[2]: info.size for info in store.catalog.storage.list("glue")}
    assert set(arrived) == {"meta.json", "train/part-0.parquet"}
    assert store.versions() == {}
    with requests_of(store) as seen:
        dataset, sent = store.create("glue", glue)
    assert (dataset.version, sent) == (1, sum(map(len, FILES.values())) - sum(arrived.values()))
    assert seen.count("copy") == 0, "S3 copies no object onto itself"
    assert contents(store.local_copy(dataset)) == FILES


def test_of_an_upload_that_was_cut_off_an_object_that_is_not_whole_is_sent_again(
    glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "SMALL_AT_ONCE", 1)
    store = DatasetStore()
    with requests_of(store) as script:
        script.fail("upload", StorageError("refused on purpose"), path="glue/train/part-1*")
        with pytest.raises(StorageError, match="refused on purpose"):
            store.create("glue", glue)
    store.catalog.storage.write("glue/meta.json", b"{")
    dataset, _ = store.create("glue", glue)
    assert contents(store.local_copy(dataset)) == FILES


def test_of_an_upload_that_was_cut_off_nothing_is_left_once_the_files_are_others(
    glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "SMALL_AT_ONCE", 1)
    store = DatasetStore()
    with requests_of(store) as script:
        script.fail("upload", StorageError("refused on purpose"), path="glue/train/part-1*")
        with pytest.raises(StorageError, match="refused on purpose"):
            store.create("glue", glue)
    assert store.catalog.storage.list("glue") != []
    dataset, sent = store.create("glue", fill(glue, {"meta.json": b"[]"}))
    assert (dataset.version, sent) == (2, dataset.manifest.size)
    assert store.catalog.storage.list("glue") == []
    assert list((tmp_path / "cache" / "sending").glob("*.json")) == []


def test_what_was_committed_just_before_the_process_was_killed_stays(glue: Path) -> None:
    store = DatasetStore()
    with mock.patch.object(Upload, "forget"):
        first, _ = store.create("glue", glue)
    store.create("glue", fill(glue, {"meta.json": b"[]"}))
    assert store.versions() == {"glue": [1, 2]}
    assert contents(store.local_copy(first)) == FILES
    with mock.patch.object(Upload, "forget"):
        third, _ = store.create("glue", fill(glue, {"meta.json": b"{ }"}))
    elsewhere = fill(glue.with_name("elsewhere"), {"a": b"a"})
    with mock.patch.object(env, "cache", return_value=str(glue.with_name("other-machine"))):
        store.create("glue", elsewhere)
    assert store.create("glue", glue)[0] == third, "although a newer one is there"
    assert store.versions() == {"glue": [1, 2, 3, 4]}


def test_two_machines_that_create_one_dataset_at_once_make_two_versions(
    glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "cache", lambda argument: str(tmp_path / threading.current_thread().name))
    other = fill(tmp_path / "other", {"meta.json": b"[]"})
    go_on = threading.Event()
    with requests_of(DatasetStore()) as script:
        script.hold("upload", go_on, path="glue*")
        threads = [
            threading.Thread(target=DatasetStore().create, args=("glue", folder), daemon=True)
            for folder in (glue, other)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: script.count("upload", "glue/*") > 0 and script.count("upload", "glue.2/*") > 0)
        go_on.set()
        for thread in threads:
            thread.join(30)
    assert DatasetStore().versions() == {"glue": [1, 2]}
    found = [contents(local_copy("glue", version)) for version in (1, 2)]
    assert sorted(found, key=len) == [{"meta.json": b"[]"}, FILES]


def test_one_file_is_a_dataset_and_links_are_followed(glue: Path, tmp_path: Path) -> None:
    store = DatasetStore()
    dataset, _ = store.create("one", glue / "meta.json")
    assert contents(store.local_copy(dataset)) == {"meta.json": b"{}"}
    links = tmp_path / "links"
    links.mkdir()
    (links / "train").symlink_to(glue / "train")
    (links / "meta.json").symlink_to(glue / "meta.json")
    dataset, _ = store.create("links", links)
    copy = store.local_copy(dataset)
    assert contents(copy) == FILES
    assert not any(path.is_symlink() for path in copy.rglob("*"))


def test_a_source_may_be_a_url_of_a_folder_or_of_one_object(
    glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DatasetStore()
    source = Storage("memory://corpora/glue")
    for path in FILES:
        source.upload(str(glue / path), path)
    source.write(".cloudtrain/run.json", b"{}")
    try:
        dataset, _ = store.create("glue", "memory://corpora/glue")
        assert contents(store.local_copy(dataset)) == FILES
        assert dataset.manifest.origin["source"] == "memory://corpora/glue"
        dataset, _ = store.create("one", "memory://corpora/glue/train/part-0.parquet")
        assert contents(store.local_copy(dataset)) == {"part-0.parquet": FILES["train/part-0.parquet"]}
        with pytest.raises(ConfigurationError, match="no file at 'memory://corpora/sst2'"):
            store.create("sst2", "memory://corpora/sst2")
        with (
            grown_after_the_listing(source, "meta.json"),
            pytest.raises(CorruptCheckpointError, match="was written to meanwhile"),
        ):
            store.create("torn", "memory://corpora/glue")
        listing = Storage.list
        with (
            monkeypatch.context() as patched
        ):  # S3 has keys like these; fsspec's memory hides one of them before 2025.10
            patched.setattr(Storage, "list", lambda *given: [*listing(*given), ObjectInfo("train", 0)])
            with pytest.raises(ManifestError, match="as a file and as a folder"):
                store.create("both", "memory://corpora/glue")
        source.write("../outside", b"")
        source.write("a\\b", b"")
        with pytest.raises(ManifestError, match="not a clean relative path"):
            store.create("hostile", "memory://corpora/glue")
    finally:
        fsspec.filesystem("memory").store.clear()
    assert list((tmp_path / "cache" / "fetched").iterdir()) == [], "what was fetched is gone again"


def test_what_comes_from_a_url_needs_space_and_of_a_killed_process_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = fill(tmp_path / "cache" / "fetched" / f"fetch-{os.getpid()}-00000000", {"half": b"h"})
    mine = fill(tmp_path / "cache" / "fetched" / f"fetch-{os.getppid()}-00000000", {"half": b"h"})
    Storage("memory://corpora/glue").write("meta.json", b"{}")
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=1_000_000))
    try:
        with pytest.raises(StorageError, match=r"only 0\.00 GB are free"):
            DatasetStore().create("glue", "memory://corpora/glue")
    finally:
        fsspec.filesystem("memory").store.clear()
    assert not left.exists()
    assert mine.exists(), "its process lives"
    assert DatasetStore().versions() == {}


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("no/slash", "glue", "'no/slash' cannot name a dataset"),
        ("..", "glue", "cannot name a dataset"),
        ("checkpoint-5", "glue", "cannot name a dataset"),
        ("glue", "missing", "neither a folder nor a file"),
        ("glue", "empty", "holds no file"),
        ("glue", ".", "holds the store"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    name: str, source: str, words: str, tmp_path: Path, glue: Path
) -> None:
    (tmp_path / "empty").mkdir()
    store = DatasetStore()
    with pytest.raises(ConfigurationError, match=words):
        store.create(name, tmp_path / source)
    assert store.versions() == {}


def test_more_files_than_a_manifest_may_name_are_refused_before_any_is_sent(
    glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets_module, "MAX_FILES", 2)
    (glue / "circle").symlink_to(glue)
    with pytest.raises(ConfigurationError, match="more than the 2 files"):
        DatasetStore().create("glue", glue)


def test_an_unknown_dataset_or_version_is_told_with_what_there_is(store: DatasetStore, glue: Path) -> None:
    store.create("glue", glue)
    with pytest.raises(
        NoDatasetError, match=r"no dataset 'glu'.*nearest name is 'glue'.*cloudtrain data list"
    ):
        store.find("glu")
    with pytest.raises(NoDatasetError, match=r"no version 7 of the dataset 'glue'.*There is: 1\."):
        store.find("glue", 7)
    with pytest.raises(NoDatasetError):
        store.delete("glue", 2)


def test_a_delete_takes_the_manifest_first_and_can_be_finished(store: DatasetStore, glue: Path) -> None:
    store.create("glue", glue)
    with requests_of(store) as script:
        script.fail("delete", StorageError("refused on purpose"), path="glue/*", times=10)
        with pytest.raises(StorageError, match="refused on purpose"):
            DatasetStore(store.url).delete("glue", 1)
    assert store.versions() == {}, "a half deleted one is none"
    assert store.half_deleted("glue") == [1]
    store.delete("glue", 1)
    assert store.half_deleted("glue") == []
    assert store.catalog.storage.list("glue") == []
    dataset, _ = store.create("glue", glue)
    assert dataset.version == 2, "no version is given twice"


def test_a_name_that_looks_like_a_version_of_another_one_is_its_own(store: DatasetStore, glue: Path) -> None:
    store.create("glue.2", fill(glue.with_name("other"), {"a": b"a"}))
    store.create("glue", glue)
    second, _ = store.create("glue", fill(glue, {"more.json": b"1"}))
    assert contents(store.local_copy(store.find("glue.2"))) == {"a": b"a"}
    assert contents(store.local_copy(second)) == {**FILES, "more.json": b"1"}


class TestLocalCopy:
    """What a job reads: it must be the version, and nothing may be downloaded twice."""

    def test_it_is_read_only_and_the_second_one_costs_no_download(self, glue: Path) -> None:
        DatasetStore().create("glue", glue)
        first = local_copy("glue")
        assert is_read_only(first)
        nobody = mock.Mock(side_effect=AssertionError("somebody may hold it for an hour"))
        with requests_of(DatasetStore()) as seen, mock.patch.object(cache, "locked", nobody):
            assert local_copy("glue", 1) == first
        assert seen.count("download") == 0

    def test_load_dataset_sees_the_parquet_files_although_the_cache_is_hidden_and_read_only(
        self, tmp_path: Path
    ) -> None:
        import datasets as hub
        import pyarrow
        from pyarrow import parquet

        (tmp_path / "mrpc").mkdir()
        for split, rows in (("train", 3), ("test", 2)):
            table = pyarrow.table({"label": list(range(rows))})
            parquet.write_table(table, tmp_path / "mrpc" / f"{split}.parquet")
        dataset, _ = DatasetStore().create("mrpc", tmp_path / "mrpc")
        copy = DatasetStore().local_copy(dataset, cache=tmp_path / ".cache")
        found = hub.load_dataset(str(copy), cache_dir=str(tmp_path / "hf"))
        assert {split: list(found[split]["label"]) for split in found} == {"train": [0, 1, 2], "test": [0, 1]}

    def test_versions_and_stores_have_copies_of_their_own(self, glue: Path, tmp_path: Path) -> None:
        DatasetStore().create("glue", glue)
        DatasetStore(str(tmp_path / "other")).create("glue", fill(glue, {"meta.json": b"[]"}))
        DatasetStore().create("glue", glue)
        found = [local_copy("glue", 1), local_copy("glue"), local_copy("glue", store=str(tmp_path / "other"))]
        assert [contents(folder)["meta.json"] for folder in found] == [b"{}", b"[]", b"[]"]
        assert len(set(found)) == 3

    def test_a_dataset_of_the_same_name_in_a_store_made_anew_is_not_taken_for_the_old_one(
        self, glue: Path, tmp_path: Path
    ) -> None:
        DatasetStore().create("glue", glue)
        assert contents(local_copy("glue")) == FILES
        shutil.rmtree(tmp_path / "store")
        DatasetStore().create("glue", fill(glue, {"meta.json": b"[]"}))
        assert contents(local_copy("glue"))["meta.json"] == b"[]"

    @pytest.mark.parametrize("change", ["written", "gone", "added", "record"])
    def test_one_that_was_changed_is_made_right(
        self, glue: Path, change: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        DatasetStore().create("glue", glue)
        folder = local_copy("glue")
        os.chmod(folder, 0o755)
        file = folder / "meta.json"
        if change == "written":
            os.chmod(file, 0o644)
            file.write_bytes(b"[]")
        elif change == "gone":
            file.unlink()
        elif change == "added":
            (folder / "more.parquet").write_bytes(b"")
        else:
            (folder.parent / "copy.json").write_bytes(b"{")
        with requests_of(DatasetStore()) as seen:
            assert local_copy("glue") == folder
        assert contents(folder) == FILES
        assert is_read_only(folder)
        assert ("was changed" in caplog.text) == (change != "record")
        assert bool(seen.count("download")) == (change != "record"), (
            "the digests tell that the files are right"
        )

    def test_a_link_that_somebody_put_into_it_goes_and_what_it_leads_to_stays_as_it_is(
        self, glue: Path, tmp_path: Path
    ) -> None:
        DatasetStore().create("glue", glue)
        folder = local_copy("glue")
        outside = fill(tmp_path / "outside", {"file": b"mine"})
        os.chmod(outside / "file", 0o604)
        os.chmod(folder, 0o755)
        for name in ("", "file"):
            (folder / f"link{name}").symlink_to(outside / name)
        assert contents(local_copy("glue")) == FILES
        assert (outside / "file").read_bytes() == b"mine"
        assert (outside / "file").stat().st_mode & 0o777 == 0o604

    def test_the_documented_command_takes_away_what_nobody_has_asked_for(
        self, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = (Path(__file__).resolve().parents[3] / "docs" / "datasets.md").read_text()
        (command,) = re.findall(r"^\$ (find .*)$", text, re.MULTILINE)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.delenv(env.CACHE)
        first, second = DatasetStore().create("glue", glue)[0], DatasetStore().create("nsmc", glue)[0]
        copies = [DatasetStore().local_copy(dataset) for dataset in (first, second, first)]
        for copy in copies[:2]:
            os.utime(copy.parent / "copy.json", (0, 0))
        local_copy("nsmc")
        assert subprocess.run(["sh", "-c", command], check=False, capture_output=True).stderr == b""
        assert [copy.is_dir() for copy in copies] == [False, True, False]
        assert contents(local_copy("glue")) == FILES

    def test_nothing_is_there_before_all_is_verified(self, glue: Path, tmp_path: Path) -> None:
        DatasetStore().create("glue", glue)
        with requests_of(DatasetStore()) as script:
            script.corrupt("download", path="glue/meta.json", times=2)
            with pytest.raises(CorruptCheckpointError, match=r"meta\.json"):
                local_copy("glue")
        assert not list((tmp_path / "cache").rglob("part-*"))
        assert contents(local_copy("glue")) == FILES

    def test_one_downloads_and_the_others_wait(
        self, glue: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(cache, "SAY_AFTER", 0.0)
        monkeypatch.setattr(runtime_threads, "TURN", 0.01)
        DatasetStore().create("glue", glue)
        go_on = threading.Event()
        found: list[Path] = []
        with requests_of(DatasetStore()) as script:
            script.hold("download", go_on)
            threads = [
                threading.Thread(target=lambda: found.append(local_copy("glue")), daemon=True)
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            wait_until(lambda: caplog.text.count("Waiting for another process") == 3)
            go_on.set()
            for thread in threads:
                thread.join(30)
        assert len(found) == 4
        assert len(set(found)) == 1
        assert script.count("download", "glue/*") == len(FILES)

    def test_a_killed_one_is_waited_for_no_more_and_its_half_is_taken_away(
        self, glue: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        DatasetStore().create("glue", glue)
        home = local_copy("glue").parent
        cache._remove(home)
        left = home / ".cloudtrain" / "restore-1-00000000"
        fill(left, {"half": b"h"})
        code = (
            "import pathlib, sys, time\nfrom hf_cloudtrain.runtime.files import locked\n"
            "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"
        )
        arguments = [sys.executable, "-c", code, str(home / "lock")]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            try:
                assert holder.stdout.readline() == "held\n"
                with pytest.raises(BlockingIOError), runtime_files.locked(home / "lock"):
                    pass
            finally:
                os.kill(holder.pid, signal.SIGKILL)
        with caplog.at_level(logging.WARNING):
            assert contents(local_copy("glue")) == FILES
        assert caplog.text == ""
        assert not left.exists()

    def test_a_cache_that_cannot_be_written_to_is_told(
        self, glue: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        DatasetStore().create("glue", glue)
        refused = PermissionError(13, "Permission denied", "/cache/lock")
        monkeypatch.setattr(cache, "locked", mock.Mock(side_effect=refused))
        with pytest.raises(
            ConfigurationError, match=r"'/cache/lock' cannot be written to.*HF_CLOUDTRAIN_CACHE"
        ):
            local_copy("glue")


def test_on_s3_an_unchanged_file_is_copied_by_the_server(
    moto: Server, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DatasetStore(f"s3://{moto.bucket}/datasets-store", storage_options=moto.storage_options)
    first, _ = store.create("glue", glue)
    fill(glue, {"more.json": b"1"})
    second, sent = store.create("glue", glue)
    assert (second.version, sent) == (2, 1)
    assert bytes_of(second, store, tmp_path / "2") == {**FILES, "more.json": b"1"}
    store.delete("glue", 1)
    assert store.versions() == {"glue": [2]}
    assert [info.path for info in store.catalog.storage.list("glue")] == []
    assert first.manifest.origin["source"] == str(glue)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    nudge = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        nudge.wait(0.01)
    raise AssertionError("it did not come to pass")
