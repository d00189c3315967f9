"""What is left over of a run, and that it stays as long as an attempt may still own it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import leftovers
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import retire, retiring
from hf_cloudtrain.checkpoints.flush import flush
from hf_cloudtrain.checkpoints.host_parts import HostParts
from hf_cloudtrain.checkpoints.leftovers import LeftOver, Watch, find, remove
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, FileEntry, Manifest, Position
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.checkpoints.upload_queue import UploadQueue
from hf_cloudtrain.checkpoints.upload_status import UploadStatus
from hf_cloudtrain.errors import StorageError, StorageUnavailableError
from hf_cloudtrain.runtime.progress import Progress
from hf_cloudtrain.storage.backend import IncompleteUpload, ObjectInfo
from hf_cloudtrain.storage.local_backend import LocalBackend
from hf_cloudtrain.testing import FaultyStorage
from tests.faults.runs import DEADLINE, Machines, bytes_of, entry_of, wait_until, write_checkpoint
from tests.unit.checkpoints.test_retention import save

FILE = FileEntry("model", 1, "xxh3-128:" + "0" * 32)


@pytest.fixture
def storage(tmp_path: Path, no_pauses: None) -> FaultyStorage:
    return FaultyStorage(f"file://{tmp_path / 'run'}")


@pytest.fixture
def catalog(storage: FaultyStorage) -> Catalog:
    """Two attempts: the first has committed step 5, the second began there and sends heartbeats."""
    catalog = Catalog(storage)
    catalog.attempts.begin(0.0, 0, None, {})
    save(catalog, CheckpointKey(1, 5))
    catalog.attempts.begin(0.0, 5, CheckpointKey(1, 5), {})
    for number in (1, 2):
        catalog.attempts.write_progress(number, {"time": 1.0})
    return catalog


def cut_off(catalog: Catalog, attempt: int, step: int) -> str:
    """Leave what a killed upload leaves; returns its folder."""
    folder = catalog.claim(CheckpointKey(attempt, step), f"nonce-{attempt}", exclusive=True)
    catalog.storage.write(f"{folder}/config.json", b"{}")
    root = Path(catalog.storage.url.removeprefix("file://"))
    (root / folder / ".cloudtrain-tmp-0123456789abcdef").write_bytes(b"half")
    return folder


def send_part(catalog: Catalog, key: CheckpointKey, host: int) -> None:
    HostParts(catalog, key, f"nonce-{key}", save=1, hosts=2).put(host, [FILE])


def watched(
    catalog: Catalog, left: list[LeftOver], meanwhile: Callable[[], object] = lambda: None
) -> dict[str, str | None]:
    """Why each left-over stays after a watch; `meanwhile` is called at the first pause."""
    happened = False

    def pause(seconds: float) -> None:
        nonlocal happened
        if not happened:
            happened = True
            meanwhile()

    return {item.name: reason for item, reason in Watch(catalog, left).wait(pause)}


class TestFind:
    def test_a_run_without_left_overs_has_none(self, catalog: Catalog) -> None:
        save(catalog, CheckpointKey(2, 5))
        save(catalog, CheckpointKey(2, 10))
        catalog.claim(CheckpointKey(2, 15), "nonce", exclusive=True)
        NamedFolders(catalog).begin("claimed-only", "nonce", 2)
        key, folder = NamedFolders(catalog).begin("final", "nonce", 2)
        catalog.storage.write(f"{folder}/model", b"x")
        NamedFolders(catalog).commit(Manifest(key, folder, 2, 10, "nonce", (FILE,), Position(10)))
        assert find(catalog) == []

    def test_an_interrupted_upload_belongs_to_its_attempt(self, catalog: Catalog) -> None:
        assert cut_off(catalog, 1, 10) == "checkpoint-10"
        assert cut_off(catalog, 2, 10) == "checkpoint-10.a2"
        first, second = find(catalog)
        assert (first.what, first.name, first.key) == ("upload", "checkpoint-10", CheckpointKey(1, 10))
        assert (second.what, second.name, second.attempt) == ("upload", "checkpoint-10.a2", 2)
        assert (first.count, first.size) == (2, len(b"{}") + len(b"half"))
        assert [first.free, second.free] == [False, False], "attempt 2 has committed nothing since"

    def test_an_upload_may_go_once_a_newer_attempt_has_committed(self, catalog: Catalog) -> None:
        cut_off(catalog, 1, 10)
        save(catalog, CheckpointKey(2, 7))
        (left,) = find(catalog)
        assert left.free

    def test_a_plain_folder_and_a_suffixed_one_are_distinguished(self, catalog: Catalog) -> None:
        cut_off(catalog, 1, 10)
        save(catalog, CheckpointKey(2, 10))
        (left,) = find(catalog)
        assert (left.name, left.attempt) == ("checkpoint-10", 1)

    def test_other_files_are_not_left_overs(self, catalog: Catalog) -> None:
        for path in (
            "checkpoint-99/model",
            "checkpoint-07/model",
            "notes/readme",
            "readme",
            "checkpoint-x/a",
        ):
            catalog.storage.write(path, b"a person put it here")
        assert find(catalog) == []

    def test_if_a_step_was_saved_twice_the_committed_folder_stays(self, catalog: Catalog) -> None:
        """If several hosts save, each save has a folder of its own."""
        for folder in ("checkpoint-5.a1.2", "checkpoint-10", "checkpoint-10.a2.3", "checkpoint-10.a2.2"):
            catalog.storage.write(f"{folder}/model", b"x")
        key = CheckpointKey(2, 10)
        assert catalog.claim(key, "nonce-2", exclusive=True) == "checkpoint-10"
        catalog.commit(Manifest(str(key), "checkpoint-10.a2.3", 2, 10, "nonce", (FILE,), Position(10)))
        found = find(catalog)
        assert [(left.what, left.name, left.free) for left in found] == [
            ("save", "checkpoint-10", True),
            ("save", "checkpoint-10.a2.2", True),
            ("save", "checkpoint-5.a1.2", True),
        ]
        assert all(remove(catalog, left) for left in found)
        assert [info.path for info in catalog.storage.list("checkpoint-10.a2.3")] == [
            "checkpoint-10.a2.3/model"
        ]
        assert len(catalog.storage.list("checkpoint-5")) == 2

    def test_a_plain_folder_beside_the_second_save_of_another_attempt_stays_with_its_owner(
        self, catalog: Catalog
    ) -> None:
        """The newest attempt may be sending it at this moment."""
        assert cut_off(catalog, 2, 10) == "checkpoint-10"
        key = CheckpointKey(1, 10)
        catalog.storage.write("checkpoint-10.a1.2/model", b"x")
        catalog.commit(Manifest(str(key), "checkpoint-10.a1.2", 1, 10, "nonce", (FILE,), Position(10)))
        (left,) = find(catalog)
        assert (left.what, left.name, left.attempt, left.free) == ("upload", "checkpoint-10", 2, False)

    def test_parts_without_a_commit_belong_to_their_upload(self, catalog: Catalog) -> None:
        cut_off(catalog, 2, 10)
        send_part(catalog, CheckpointKey(2, 10), 0)
        send_part(catalog, CheckpointKey(1, 9), 1)
        send_part(catalog, CheckpointKey(1, 5), 0)  # that one is committed
        alone, upload = find(catalog)
        assert (alone.name, alone.key, alone.count) == (
            *(".cloudtrain/parts/000001-0000000009", CheckpointKey(1, 9), 1),
        )
        assert upload.parts == (".cloudtrain/parts/000002-0000000010/0-of-2.json",)

    def test_a_named_folder_without_a_manifest_is_a_left_over(self, catalog: Catalog) -> None:
        for nonce, attempt in (("nonce-1", 1), ("nonce-2", 0)):
            _, folder = NamedFolders(catalog).begin("final", nonce, attempt)
            catalog.storage.write(f"{folder}/model", b"x")
        assert [(left.name, left.attempt, left.free) for left in find(catalog)] == [
            ("final", 1, False),
            ("final.2", None, False),
        ]
        save(catalog, CheckpointKey(2, 7))
        assert [left.free for left in find(catalog)] == [True, False], "the attempt of the second is unknown"

    def test_probes_and_unfinished_files_of_whole_folders_and_of_records_are_found(
        self, catalog: Catalog, tmp_path: Path
    ) -> None:
        catalog.storage.write(".cloudtrain/probes/probe-0123456789abcdef", b"x" * 32)
        catalog.storage.write(".cloudtrain/probe-0123456789abcdef", b"x" * 32)  # of an older version
        for folder in ("checkpoint-5", ".cloudtrain/progress"):
            (tmp_path / "run" / folder / ".cloudtrain-tmp-0123456789abcdef").write_bytes(b"half")
        found = {(left.what, left.name, left.size, left.free) for left in find(catalog)}
        assert found == {
            ("probe", ".cloudtrain/probes/probe-0123456789abcdef", 32, False),
            ("probe", ".cloudtrain/probe-0123456789abcdef", 32, False),
            ("file", ".cloudtrain/progress/.cloudtrain-tmp-0123456789abcdef", 4, False),
            ("file", "checkpoint-5", 4, True),
        }

    @pytest.mark.parametrize("folder", ["checkpoint-5", "checkpoint-9.a1", "final", "elsewhere"])
    def test_a_run_in_a_folder_of_this_one_is_left_alone(self, catalog: Catalog, folder: str) -> None:
        """Its uploads may be under way, and this run knows nothing of its attempts."""
        NamedFolders(catalog).begin("final", "nonce-1", 1)
        nested = Catalog(FaultyStorage(f"{catalog.storage.url}/{folder}/nested"))
        nested.attempts.begin(0.0, 0, None, {})
        cut_off(nested, 1, 3)
        assert not [left for left in find(catalog) if left.count]
        assert [left.name for left in find(nested)] == ["checkpoint-3"]

    def test_an_interrupted_deletion_may_be_finished_at_once(
        self, catalog: Catalog, storage: FaultyStorage
    ) -> None:
        save(catalog, CheckpointKey(2, 7))
        storage.fail("delete", StorageError("cut off"), path="checkpoint-7.a2/*", times=9)
        storage.fail("delete", StorageError("cut off"), path="checkpoint-7/*", times=9)
        with pytest.raises(StorageError):
            retire(catalog, CheckpointKey(2, 7))
        storage.heal()
        (left,) = find(catalog)
        assert (left.what, left.name, left.free) == ("deletion", "checkpoint-7", True)
        assert remove(catalog, left)
        assert find(catalog) == []
        assert retiring(catalog) == []

    def test_a_deletion_of_which_only_the_record_is_left_is_found(self, catalog: Catalog) -> None:
        manifest = catalog.read(CheckpointKey(1, 5))
        record = ".cloudtrain/retiring/000001-0000000004.json"
        text = manifest.encode().replace(b'"step": 5', b'"step": 4').replace(b"000005", b"000004")
        catalog.storage.write(record, text.replace(b"checkpoint-5", b"checkpoint-4"))
        (left,) = find(catalog)
        assert left.name == ".cloudtrain/retiring/000001-0000000004"
        assert remove(catalog, left)
        assert find(catalog) == []

    def test_credentials_that_may_not_list_unfinished_files_find_the_rest(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refused(self: LocalBackend) -> list[IncompleteUpload]:
            raise PermissionError("AccessDenied")

        cut_off(catalog, 2, 10)
        monkeypatch.setattr(LocalBackend, "incomplete", refused)
        assert [left.count for left in find(catalog)] == [1]
        assert "Cannot list unfinished uploads" in caplog.text

    def test_a_storage_that_does_not_answer_is_an_error(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(self: LocalBackend) -> list[IncompleteUpload]:
            raise ConnectionResetError

        monkeypatch.setattr(LocalBackend, "incomplete", unreachable)
        with pytest.raises(StorageUnavailableError):
            find(catalog)


class TestRemove:
    def test_the_claim_and_all_other_objects_stay(self, catalog: Catalog) -> None:
        before = [info.path for info in catalog.storage.list("")]
        cut_off(catalog, 2, 10)
        send_part(catalog, CheckpointKey(2, 10), 0)
        (left,) = find(catalog)
        assert remove(catalog, left)
        after = [info.path for info in catalog.storage.list("")]
        assert after == sorted([*before, ".cloudtrain/claims/checkpoint-10.json"])
        assert not catalog.storage.incomplete()

    def test_parts_are_deleted_before_files(self, catalog: Catalog, storage: FaultyStorage) -> None:
        """A host that trusts its part while its files are deleted would commit missing files."""
        cut_off(catalog, 2, 10)
        send_part(catalog, CheckpointKey(2, 10), 0)
        (left,) = find(catalog)
        storage.calls.clear()
        remove(catalog, left)
        deleted = [call.path for call in storage.calls if call.kind == "delete"]
        assert deleted[0].startswith(".cloudtrain/parts/")

    def test_an_upload_that_was_committed_in_the_meantime_stays(self, catalog: Catalog) -> None:
        cut_off(catalog, 2, 10)
        (left,) = find(catalog)
        save(catalog, CheckpointKey(2, 10))
        before = catalog.storage.list("")
        assert not remove(catalog, left)
        assert catalog.storage.list("") == before

    def test_a_named_folder_that_was_committed_in_the_meantime_stays(self, machines: Machines) -> None:
        machine = machines.new()
        machine.start()
        machine.save(5)
        folder = write_checkpoint(machine.output_dir, 5)
        machines.storage.hold("create", machines.gate, path="*/folders/*")
        saving = threading.Thread(target=machine.checkpointer.save_folder, args=(folder, "final"))
        saving.start()
        wait_until(lambda: machines.storage.count("create", "*/folders/*"), "its commit")
        (left,) = [left for left in find(machines.catalog) if left.name == "final"]
        assert left.attempt == 1
        machines.gate.set()
        saving.join(DEADLINE)
        assert not remove(machines.catalog, left)
        assert machines.catalog.storage.list("final")


class TestWatch:
    def test_what_does_not_change_may_go(self, catalog: Catalog) -> None:
        cut_off(catalog, 2, 10)
        catalog.storage.write(".cloudtrain/probe-0123456789abcdef", b"x")
        assert watched(catalog, find(catalog)) == {
            "checkpoint-10": None,
            ".cloudtrain/probe-0123456789abcdef": None,
        }

    def test_an_attempt_that_sends_heartbeats_keeps_its_uploads(self, catalog: Catalog) -> None:
        cut_off(catalog, 2, 10)
        catalog.storage.write(".cloudtrain/probe-0123456789abcdef", b"x")
        reasons = watched(catalog, find(catalog), lambda: catalog.attempts.write_progress(2, {"time": 0.5}))
        assert reasons == {
            "checkpoint-10": "attempt 2 still sends heartbeats",
            ".cloudtrain/probe-0123456789abcdef": None,
        }

    def test_the_newest_attempt_may_be_sending_the_saves_of_an_earlier_one(self, catalog: Catalog) -> None:
        cut_off(catalog, 1, 10)
        reasons = watched(catalog, find(catalog), lambda: catalog.attempts.write_progress(2, {"time": 2.0}))
        assert reasons == {"checkpoint-10": "attempt 2 still sends heartbeats"}

    def test_an_upload_that_grows_stays(self, catalog: Catalog) -> None:
        """A user flushes the outbox of a machine whose training is over: there are no heartbeats."""
        cut_off(catalog, 2, 10)
        reasons = watched(catalog, find(catalog), lambda: catalog.storage.write("checkpoint-10/more", b"x"))
        assert reasons == {"checkpoint-10": "it has changed"}

    def test_an_attempt_that_begins_during_the_watch_may_own_everything(self, catalog: Catalog) -> None:
        cut_off(catalog, 2, 10)
        reasons = watched(catalog, find(catalog), lambda: catalog.attempts.begin(0.0, 5, None, {}))
        assert reasons == {"checkpoint-10": "a new attempt has begun"}

    def test_an_upload_that_was_committed_during_the_watch_is_not_a_left_over(self, catalog: Catalog) -> None:
        cut_off(catalog, 2, 10)
        assert watched(catalog, find(catalog), lambda: save(catalog, CheckpointKey(2, 10))) == {}

    def test_an_upload_of_an_attempt_without_heartbeat_stays(self, catalog: Catalog) -> None:
        catalog.attempts.begin(0.0, 5, None, {})
        cut_off(catalog, 2, 10)
        (reason,) = watched(catalog, find(catalog)).values()
        assert reason is not None
        assert "attempt 3 has no heartbeat" in reason

    def test_parts_of_hosts_stay_until_a_newer_attempt_has_committed(self, catalog: Catalog) -> None:
        """The hosts that sent them have emptied their outboxes: this is the only copy."""
        cut_off(catalog, 2, 10)
        send_part(catalog, CheckpointKey(2, 10), 0)
        (reason,) = watched(catalog, find(catalog)).values()
        assert reason is not None
        assert "cloudtrain checkpoint flush" in reason
        catalog.attempts.begin(0.0, 5, None, {})
        save(catalog, CheckpointKey(3, 7))
        assert [left.free for left in find(catalog)] == [True]

    def test_an_upload_of_several_hosts_without_a_part_may_go(self, catalog: Catalog) -> None:
        """The host that began it still has it in its outbox."""
        HostParts(catalog, CheckpointKey(2, 10), "nonce", save=1, hosts=2).folder(exclusive=True)
        catalog.storage.write("checkpoint-10/model", b"x")
        assert watched(catalog, find(catalog)) == {"checkpoint-10": None}

    def test_a_watch_takes_four_heartbeats_of_the_slowest_attempt_and_at_least_a_minute(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut_off(catalog, 2, 10)
        assert Watch(catalog, find(catalog)).seconds == leftovers.WATCH_SECONDS == 60
        catalog.attempts.write_progress(2, {"time": 1.0, "interval_seconds": 100.0})
        assert Watch(catalog, find(catalog)).seconds == 400
        catalog.attempts.write_progress(2, {"time": 1.0, "interval_seconds": "soon"})
        monkeypatch.setenv(env.HEARTBEAT, "30")
        assert Watch(catalog, find(catalog)).seconds == 120

    def test_a_watch_ends_early_if_everything_has_changed(self, catalog: Catalog) -> None:
        cut_off(catalog, 2, 10)
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            catalog.attempts.write_progress(2, {"time": 2.0})

        assert list(Watch(catalog, find(catalog)).wait(pause)) == [
            (find(catalog)[0], "attempt 2 still sends heartbeats")
        ]
        assert len(pauses) == 1


def test_two_unfinished_uploads_of_one_record_are_both_reported(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ".cloudtrain/steps/000001-0001.jsonl"
    both = [
        LeftOver("file", path, uploads=(IncompleteUpload(path, token, 1),)) for token in ("first", "second")
    ]
    monkeypatch.setattr(Watch, "wait", lambda self: ((left, "it has changed") for left in both))
    assert list(leftovers.clean(catalog, both, lambda seconds: None)) == [
        (left, "it has changed") for left in both
    ]


class TestUploadsAfterwards:
    """An outbox still holds what was removed from storage."""

    def test_a_part_that_was_removed_is_sent_again_with_its_files(
        self, machines: Machines, tmp_path: Path
    ) -> None:
        catalog, outbox = machines.catalog, Outbox(tmp_path / "disk")
        catalog.attempts.begin(0.0, 0, None, {})

        def saved() -> None:
            folder = write_checkpoint(outbox.output_dir, 5)
            outbox.accept(folder, entry_of(machines.storage.url, 1, 5, host=1, hosts=2))

        saved()
        flush(catalog, outbox, Progress())
        (left,) = find(catalog)
        assert len(left.parts) == 2
        assert remove(catalog, left)
        saved()  # as if the process had died before it emptied the outbox
        flush(catalog, outbox, Progress())
        assert len(catalog.storage.list("checkpoint-5")) == len(bytes_of(5))
        assert len(catalog.storage.list(".cloudtrain/parts/000001-0000000005")) == 2, (
            "the part, and the folder"
        )

    def test_an_upload_queue_sends_removed_files_again_although_it_remembers_them(
        self, machines: Machines, tmp_path: Path
    ) -> None:
        catalog, outbox = Catalog(machines.storage), Outbox(tmp_path / "disk")
        catalog.attempts.begin(0.0, 0, None, {})
        folder = write_checkpoint(outbox.output_dir, 5)
        entry = outbox.accept(folder, entry_of(machines.storage.url, 1, 5))
        machines.storage.fail("create", path="*/checkpoints/*", times=10_000)
        upload_queue = UploadQueue(catalog, outbox, UploadStatus())
        upload_queue.start()
        try:
            wait_until(lambda: upload_queue.last_error, "everything has arrived, and the commit fails")
            machines.storage.hold("list", machines.gate, path="checkpoint-5")
            wait_until(
                lambda: machines.storage.calls[-1] == ("list", "checkpoint-5"), "the next try looks again"
            )
            remove(machines.catalog, find_without_faults(machines, entry.title))
            machines.storage.heal()
            machines.gate.set()
            upload_queue.wait(DEADLINE)
        finally:
            machines.gate.set()
            upload_queue.close()
            upload_queue._thread.join(DEADLINE)
        assert machines.committed() == [(1, 5)], "which reads every byte"


def find_without_faults(machines: Machines, folder: str) -> LeftOver:
    """Found by hand: every list of this process would wait."""
    paths = [path for path in (machines.run / folder).rglob("*") if path.is_file()]
    objects = tuple(ObjectInfo(str(path.relative_to(machines.run)), path.stat().st_size) for path in paths)
    return LeftOver("upload", folder, 1, CheckpointKey(1, 5), objects)
