"""DatasetStore: a version exists once it is committed, and its bytes are uploaded once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest

from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.datasets import store as datasets_module
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.errors import (
    ConfigurationError,
    CorruptCheckpointError,
    ManifestError,
    NoDatasetError,
    NotCommittedError,
    StorageError,
    StorageUnavailableError,
)
from hf_cloudtrain.storage.backend import ObjectInfo
from hf_cloudtrain.storage.client import Storage
from tests.servers import Server
from tests.unit.datasets._stores import (
    FILES,
    bytes_of,
    contents,
    fill,
    grown_after_the_listing,
    requests_of,
)


def test_a_folder_becomes_version_1_and_is_downloaded_complete(store: DatasetStore, glue: Path) -> None:
    dataset, sent = store.create("glue", glue)
    assert (dataset.name, dataset.version, sent) == ("glue", 1, sum(map(len, FILES.values())))
    assert store.versions() == {"glue": [1]}
    found = store.find("glue")
    assert found == dataset
    assert found.manifest.origin["source"] == str(glue)
    assert contents(store.local_copy(found)) == FILES


def test_a_version_on_storage_is_an_unchanged_folder(glue: Path, tmp_path: Path) -> None:
    DatasetStore().create("glue", glue)
    fill(glue, {"meta.json": b"[]"})
    DatasetStore().create("glue", glue)
    assert contents(tmp_path / "store" / "datasets" / "glue") == FILES
    assert contents(tmp_path / "store" / "datasets" / "glue.2") == {**FILES, "meta.json": b"[]"}


def test_an_unchanged_folder_is_not_a_new_version(store: DatasetStore, glue: Path) -> None:
    first, _ = store.create("glue", glue)
    again, sent = store.create("glue", shutil.copytree(glue, glue.with_name("elsewhere")))
    assert (again, sent) == (first, None)
    assert store.versions() == {"glue": [1]}


def test_only_new_bytes_are_uploaded_and_not_those_of_a_renamed_file(
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


def test_a_version_stays_complete_when_the_one_it_was_copied_from_is_deleted(
    store: DatasetStore, glue: Path, tmp_path: Path
) -> None:
    store.create("glue", glue)
    second, _ = store.create("glue", fill(glue, {"more.json": b"1"}))
    store.delete("glue", 1)
    assert store.versions() == {"glue": [2]}
    assert bytes_of(second, store, tmp_path / "2") == {**FILES, "more.json": b"1"}


def test_bytes_are_uploaded_if_the_storage_cannot_copy(
    store: DatasetStore, glue: Path, tmp_path: Path
) -> None:
    store.create("glue", glue)
    fill(glue, {"more.json": b"1"})
    with requests_of(store) as script:
        script.fail("any", NotImplementedError("no copies here"), path="glue.2/train/part-0.parquet")
        second, sent = DatasetStore(store.url).create("glue", glue)
    assert sent == len(FILES["train/part-0.parquet"]) + 1
    assert bytes_of(second, store, tmp_path / "2") == {**FILES, "more.json": b"1"}


def test_creating_a_dataset_again_repairs_a_version_that_lost_a_file(store: DatasetStore, glue: Path) -> None:
    first, _ = store.create("glue", glue)
    store.catalog.storage.delete(["glue/meta.json"])
    with pytest.raises(CorruptCheckpointError, match=r"meta\.json"):
        store.local_copy(first)
    second, sent = store.create("glue", glue)
    assert (second.version, sent) == (2, len(FILES["meta.json"]))
    assert contents(store.local_copy(second)) == FILES


def test_a_damaged_manifest_does_not_prevent_a_new_version(store: DatasetStore, glue: Path) -> None:
    store.create("glue", glue)
    store.catalog.storage.write(".cloudtrain/folders/glue-000001.json", b"{")
    with pytest.raises(ManifestError, match="damaged"):
        store.find("glue")
    second, sent = store.create("glue", glue)
    assert (second.version, sent) == (2, second.manifest.size)
    assert contents(store.local_copy(store.find("glue"))) == FILES


def test_a_failed_upload_is_not_a_version(glue: Path) -> None:
    store = DatasetStore()
    with requests_of(store) as script:
        script.fail("upload", StorageError("refused on purpose"), path="glue/train/*")
        with pytest.raises(StorageError, match="refused on purpose"):
            store.create("glue", glue)
    assert store.versions() == {}
    dataset, _ = store.create("glue", glue)
    assert contents(store.local_copy(dataset)) == FILES


def test_a_commit_that_was_damaged_or_lost_is_not_a_version(glue: Path) -> None:
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


def test_a_file_that_changes_during_the_upload_is_an_error(glue: Path) -> None:
    store = DatasetStore()
    send = datasets_module.send_folder

    def late(*arguments: Any) -> Any:
        fill(glue, {"meta.json": b"[1, 2]"})
        return send(*arguments)

    with (
        mock.patch.object(datasets_module, "send_folder", late),
        pytest.raises(
            CorruptCheckpointError, match=r"glue' changed during the upload; nothing was stored.*meta\.json"
        ),
    ):
        store.create("glue", glue)
    assert store.versions() == {}


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


def test_a_source_may_be_the_url_of_a_folder_or_of_an_object(
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
        with pytest.raises(ConfigurationError, match="No files found at 'memory://corpora/sst2'"):
            store.create("sst2", "memory://corpora/sst2")
        with (
            grown_after_the_listing(source, "meta.json"),
            pytest.raises(CorruptCheckpointError, match="changed during the upload; nothing was stored"),
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
    assert list((tmp_path / "cache" / "fetched").iterdir()) == [], "what was fetched is deleted"


def test_a_fetch_checks_the_free_space_and_deletes_what_a_killed_process_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = fill(tmp_path / "cache" / "fetched" / f"fetch-{os.getpid()}-00000000", {"half": b"h"})
    mine = fill(tmp_path / "cache" / "fetched" / f"fetch-{os.getppid()}-00000000", {"half": b"h"})
    Storage("memory://corpora/glue").write("meta.json", b"{}")
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=1_000_000))
    try:
        with pytest.raises(StorageError, match=r"only 1\.0 MB are free"):
            DatasetStore().create("glue", "memory://corpora/glue")
    finally:
        fsspec.filesystem("memory").store.clear()
    assert not left.exists()
    assert mine.exists(), "its process is alive"
    assert DatasetStore().versions() == {}


@pytest.mark.parametrize(
    ("name", "source", "text"),
    [
        ("no/slash", "glue", "'no/slash' is not a valid dataset name"),
        ("..", "glue", "is not a valid dataset name"),
        ("checkpoint-5", "glue", "is not a valid dataset name"),
        ("glue", "missing", "neither a folder nor a file"),
        ("glue", "empty", "contains no files"),
        ("glue", ".", "contains the store"),
    ],
)
def test_a_name_or_source_that_cannot_be_stored_is_an_error(
    name: str, source: str, text: str, tmp_path: Path, glue: Path
) -> None:
    (tmp_path / "empty").mkdir()
    store = DatasetStore()
    with pytest.raises(ConfigurationError, match=text):
        store.create(name, tmp_path / source)
    assert store.versions() == {}


def test_more_files_than_a_manifest_may_have_are_an_error_before_any_upload(
    glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets_module, "MAX_FILES", 2)
    (glue / "circle").symlink_to(glue)
    with pytest.raises(ConfigurationError, match="more than 2 files"):
        DatasetStore().create("glue", glue)


def test_an_unknown_dataset_or_version_is_an_error_that_names_known_ones(
    store: DatasetStore, glue: Path
) -> None:
    store.create("glue", glue)
    with pytest.raises(
        NoDatasetError, match=r"Dataset 'glu' does not exist in .*Did you mean 'glue'\?.*cloudtrain data list"
    ):
        store.find("glu")
    with pytest.raises(NoDatasetError, match=r"Dataset 'glue' in .* has no version 7\. Choose one of: 1\."):
        store.find("glue", 7)
    with pytest.raises(NoDatasetError):
        store.delete("glue", 2)


def test_delete_removes_the_manifest_first_and_can_be_completed(store: DatasetStore, glue: Path) -> None:
    store.create("glue", glue)
    with requests_of(store) as script:
        script.fail("delete", StorageError("refused on purpose"), path="glue/*", times=10)
        with pytest.raises(StorageError, match="refused on purpose"):
            DatasetStore(store.url).delete("glue", 1)
    assert store.versions() == {}, "a half-deleted version does not exist"
    assert store.half_deleted("glue") == [1]
    store.delete("glue", 1)
    assert store.half_deleted("glue") == []
    assert store.catalog.storage.list("glue") == []
    dataset, _ = store.create("glue", glue)
    assert dataset.version == 2, "a version number is not used twice"


def test_a_name_that_looks_like_a_version_of_another_dataset_is_separate(
    store: DatasetStore, glue: Path
) -> None:
    store.create("glue.2", fill(glue.with_name("other"), {"a": b"a"}))
    store.create("glue", glue)
    second, _ = store.create("glue", fill(glue, {"more.json": b"1"}))
    assert contents(store.local_copy(store.find("glue.2"))) == {"a": b"a"}
    assert contents(store.local_copy(second)) == {**FILES, "more.json": b"1"}


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
