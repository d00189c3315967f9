"""An upload of a dataset that is interrupted, or meets a second one."""

from __future__ import annotations

import threading
from pathlib import Path
from unittest import mock

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import sender
from hf_cloudtrain.datasets.store import DatasetStore, local_copy
from hf_cloudtrain.datasets.upload import Upload
from hf_cloudtrain.errors import (
    StorageError,
)
from tests.unit.datasets._stores import (
    FILES,
    contents,
    fill,
    requests_of,
    wait_until,
)


def test_an_interrupted_upload_continues_in_its_own_folder(
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


def test_an_interrupted_upload_uploads_an_incomplete_object_again(
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


def test_an_interrupted_upload_is_deleted_if_the_files_have_changed(
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


def test_a_version_that_was_committed_just_before_a_kill_stays(glue: Path) -> None:
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
    release = threading.Event()
    with requests_of(DatasetStore()) as script:
        script.hold("upload", release, path="glue*")
        threads = [
            threading.Thread(target=DatasetStore().create, args=("glue", folder), daemon=True)
            for folder in (glue, other)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: script.count("upload", "glue/*") > 0 and script.count("upload", "glue.2/*") > 0)
        release.set()
        for thread in threads:
            thread.join(30)
    assert DatasetStore().versions() == {"glue": [1, 2]}
    found = [contents(local_copy("glue", version)) for version in (1, 2)]
    assert sorted(found, key=len) == [{"meta.json": b"[]"}, FILES]
