"""The local copy of a dataset that a job reads: it must equal the version, and must not be downloaded twice."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.datasets import cache
from hf_cloudtrain.datasets.store import DatasetStore, local_copy
from hf_cloudtrain.errors import (
    ConfigurationError,
    CorruptCheckpointError,
)
from hf_cloudtrain.runtime import files as runtime_files
from hf_cloudtrain.runtime import threads as runtime_threads
from tests.unit.datasets._stores import (
    FILES,
    contents,
    fill,
    is_read_only,
    requests_of,
    wait_until,
)


def test_it_is_read_only_and_downloaded_once(glue: Path) -> None:
    DatasetStore().create("glue", glue)
    first = local_copy("glue")
    assert is_read_only(first)
    no_lock = mock.Mock(side_effect=AssertionError("another process may hold the lock for an hour"))
    with requests_of(DatasetStore()) as seen, mock.patch.object(cache, "locked", no_lock):
        assert local_copy("glue", 1) == first
    assert seen.count("download") == 0


def test_load_dataset_reads_parquet_files_in_a_hidden_read_only_cache(tmp_path: Path) -> None:
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


def test_each_version_of_each_store_has_its_own_copy(glue: Path, tmp_path: Path) -> None:
    DatasetStore().create("glue", glue)
    DatasetStore(str(tmp_path / "other")).create("glue", fill(glue, {"meta.json": b"[]"}))
    DatasetStore().create("glue", glue)
    found = [local_copy("glue", 1), local_copy("glue"), local_copy("glue", store=str(tmp_path / "other"))]
    assert [contents(folder)["meta.json"] for folder in found] == [b"{}", b"[]", b"[]"]
    assert len(set(found)) == 3


def test_a_dataset_of_the_same_name_in_a_recreated_store_is_downloaded(glue: Path, tmp_path: Path) -> None:
    DatasetStore().create("glue", glue)
    assert contents(local_copy("glue")) == FILES
    shutil.rmtree(tmp_path / "store")
    DatasetStore().create("glue", fill(glue, {"meta.json": b"[]"}))
    assert contents(local_copy("glue"))["meta.json"] == b"[]"


@pytest.mark.parametrize("change", ["written", "gone", "added", "record"])
def test_a_copy_that_was_changed_is_repaired(
    glue: Path, change: str, caplog: pytest.LogCaptureFixture
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
    assert bool(seen.count("download")) == (change != "record"), "the digests show that the files are intact"


def test_a_link_in_a_copy_is_removed_and_its_target_is_not_changed(glue: Path, tmp_path: Path) -> None:
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


def test_the_documented_command_deletes_copies_that_were_not_used(
    glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_the_folder_appears_only_when_every_file_is_verified(glue: Path, tmp_path: Path) -> None:
    DatasetStore().create("glue", glue)
    with requests_of(DatasetStore()) as script:
        script.corrupt("download", path="glue/meta.json", times=2)
        with pytest.raises(CorruptCheckpointError, match=r"meta\.json"):
            local_copy("glue")
    assert not list((tmp_path / "cache").rglob("part-*"))
    assert contents(local_copy("glue")) == FILES


def test_one_process_downloads_and_the_others_wait(
    glue: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "SAY_AFTER", 0.0)
    monkeypatch.setattr(runtime_threads, "TURN", 0.01)
    DatasetStore().create("glue", glue)
    release = threading.Event()
    found: list[Path] = []
    with requests_of(DatasetStore()) as script:
        script.hold("download", release)
        threads = [
            threading.Thread(target=lambda: found.append(local_copy("glue")), daemon=True) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: caplog.text.count("Waiting for another process") == 3)
        release.set()
        for thread in threads:
            thread.join(30)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert script.count("download", "glue/*") == len(FILES)


def test_the_lock_of_a_killed_process_is_released_and_its_partial_download_deleted(
    glue: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DatasetStore().create("glue", glue)
    home = local_copy("glue").parent
    cache._remove(home)
    left = home / "_cloudtrain" / "restore-1-00000000"
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


def test_a_cache_that_is_not_writable_is_an_error(glue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DatasetStore().create("glue", glue)
    refused = PermissionError(13, "Permission denied", "/cache/lock")
    monkeypatch.setattr(cache, "locked", mock.Mock(side_effect=refused))
    with pytest.raises(ConfigurationError, match=r"Cannot write to '/cache/lock'.*HF_CLOUDTRAIN_CACHE"):
        local_copy("glue")
