"""`cloudtrain checkpoint flush`."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cloudtrain.checkpoints import flush
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.storage import retries
from hf_cloudtrain.storage.local_backend import LocalBackend
from hf_cloudtrain.testing import FaultyStorage
from tests.unit.cli.terminal import Run, answer, cloudtrain, sentence

if TYPE_CHECKING:
    import pytest


class TestFlush:
    def test_finishes_after_an_outage_what_failed_during_it(
        self, empty: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retries, "PAUSES", (0.0,))
        attempt = empty.begin()
        empty.accept(attempt, 100)
        empty.accept(attempt, 200)
        faulty = FaultyStorage(empty.url)
        with faulty.everywhere():
            faulty.fail("upload", times=10**6, path="checkpoint-*")
            during = cloudtrain("checkpoint", "flush", str(empty.work), "--json", code=1)
        assert {item["state"] for item in json.loads(during.stdout)["entries"]} == {"kept"}
        assert "checkpoint-200 (kept)" in during.stderr
        after = answer("checkpoint", "flush", str(empty.work))
        assert [(item["title"], item["state"]) for item in after["entries"]] == [
            ("checkpoint-200", "committed"),
            ("checkpoint-100", "committed"),
        ]
        assert empty.committed() == ["000001-0000000100", "000001-0000000200"]

    def test_continues_with_the_next_run_if_one_cannot_be_reached(
        self, empty: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retries, "PAUSES", (0.0,))
        gone = FaultyStorage(f"file://{tmp_path}/runs/gone")
        gone.fail("any", times=10**6)
        empty.accept(empty.begin(), 100)
        empty.accept(5, 100, run_url=gone.url)
        with gone.everywhere():
            report = answer("checkpoint", "flush", str(empty.work), code=1)
        assert {item["run_url"]: item["state"] for item in report["entries"]} == {
            empty.url: "committed",
            gone.url: "kept",
        }
        assert empty.committed() == ["000001-0000000100"]

    def test_commits_folders_that_were_saved_by_name(self, empty: Run) -> None:
        empty.accept(empty.begin(), 100, name="final")
        assert "final" in cloudtrain("checkpoint", "flush", str(empty.work)).stdout
        assert NamedFolders(empty.catalog).keys() == ["final-000001"]

    def test_overwrites_nothing_on_a_storage_that_ignores_exclusive_create(
        self, empty: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LocalBackend, "create", LocalBackend.write)
        for content in (b"first", b"second"):
            empty.accept(1, 100, {"model.safetensors": content}, name="final")
            cloudtrain("checkpoint", "flush", str(empty.work))
        assert (empty.folder / "final/model.safetensors").read_bytes() == b"first"
        assert (empty.folder / "final.2/model.safetensors").read_bytes() == b"second"

    def test_names_what_is_lost(self, empty: Run) -> None:
        entry = empty.accept(empty.begin(), 100)
        entry.local_path(entry.files[0]).write_text("written again")
        result = cloudtrain("checkpoint", "flush", str(empty.work), "--json", code=1)
        assert [item["state"] for item in json.loads(result.stdout)["entries"]] == ["lost"]
        assert f"{entry.files[0].path!r} of checkpoint-100" in result.stderr

    def test_fails_while_an_entry_cannot_be_read(self, empty: Run) -> None:
        entry = empty.accept(empty.begin(), 100)
        (entry.home / "entry.json").write_text("{}")
        report = answer("checkpoint", "flush", str(empty.work), code=1)
        assert report["unreadable"] == [str(entry.home)]

    def test_reports_that_other_hosts_have_not_uploaded(self, empty: Run) -> None:
        empty.accept(empty.begin(), 100, host=0, hosts=2)
        result = cloudtrain("checkpoint", "flush", str(empty.work))
        assert "waiting" in result.stdout
        assert "other hosts" in result.stderr
        assert empty.committed() == []

    def test_keeps_everything_while_another_process_uploads(
        self, empty: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(flush, "LOCK_PATIENCE", 0.0)
        empty.accept(empty.begin(), 100)
        with open(empty.work / "_cloudtrain/outbox.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            result = cloudtrain("checkpoint", "flush", str(empty.work), code=1)
        assert "Another process is uploading" in result.stderr
        assert len(empty.outbox.entries()) == 1

    def test_of_an_empty_outbox_succeeds(self, tmp_path: Path) -> None:
        result = cloudtrain("checkpoint", "flush", str(tmp_path), "--json")
        assert json.loads(result.stdout) == {"directory": str(tmp_path), "entries": [], "unreadable": []}
        assert "No pending uploads" in result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_folder_is_an_error(self, tmp_path: Path) -> None:
        assert "output_dir" in sentence("checkpoint", "flush", str(tmp_path / "nowhere"))
