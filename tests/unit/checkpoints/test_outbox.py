"""The outbox keeps what was saved exactly as it was when it was accepted."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_cloudtrain.checkpoints import frozen
from hf_cloudtrain.checkpoints import outbox as module
from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.manifest import Manifest, Position
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, CorruptCheckpointError
from tests.faults.runs import bytes_of, contents, entry_of, write_checkpoint, write_files

URL = "file:///run"


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path)


def accepted(outbox: Outbox, step: int = 5, **options: object) -> OutboxEntry:
    folder = write_checkpoint(outbox.output_dir, step)
    return outbox.accept(folder, entry_of(URL, 1, step, **options))


def test_an_accepted_folder_is_an_entry_with_all_its_bytes(outbox: Outbox) -> None:
    entry = accepted(outbox, metrics={"loss": 0.5}, best=True, origin={"host": "a"}, inexact_reason="why")
    assert contents(entry.home / "files") == bytes_of(5)
    assert entry.size == sum(map(len, bytes_of(5).values()))
    assert entry.title == "checkpoint-5"
    assert OutboxEntry.read(entry.home) == entry
    assert outbox.entries() == [entry]


def test_entries_are_newest_first_and_of_one_run_if_asked(outbox: Outbox) -> None:
    folder = write_checkpoint(outbox.output_dir, 5)
    for attempt, step, url in ((1, 900, URL), (2, 5, URL), (2, 10, URL), (3, 1, "file:///other")):
        outbox.accept(folder, entry_of(url, attempt, step))
    assert [entry.key.step for entry in outbox.entries()] == [1, 10, 5, 900]
    assert [entry.key.step for entry in outbox.entries(URL)] == [10, 5, 900]


def test_a_removed_entry_is_gone_from_the_disk(outbox: Outbox) -> None:
    entry = accepted(outbox)
    outbox.remove(entry)
    assert outbox.entries() == []
    assert list(outbox.folder.iterdir()) == []
    outbox.remove(entry)  # twice is fine


def test_a_second_save_of_a_step_replaces_the_first(outbox: Outbox) -> None:
    accepted(outbox)
    folder = write_checkpoint(outbox.output_dir, 5, salt="again")
    outbox.accept(folder, entry_of(URL, 1, 5))
    [entry] = outbox.entries()
    assert contents(entry.home / "files") == bytes_of(5, "again")


def test_another_run_in_the_same_folder_replaces_nothing(outbox: Outbox) -> None:
    """Attempt 1 of each has a step 5, and neither is on storage yet."""
    accepted(outbox)
    for salt in ("other", "other again"):
        other = write_checkpoint(outbox.output_dir / salt, 5, salt=salt)
        outbox.accept(other, dataclasses.replace(entry_of("file:///other", 1, 5), nonce="0123456789-5"))
    [own] = outbox.entries(URL)
    [others] = outbox.entries("file:///other")
    assert contents(own.home / "files") == bytes_of(5)
    assert contents(others.home / "files") == bytes_of(5, "other again")


def test_forgetting_a_committed_save_does_not_forget_a_newer_one_of_the_same_step(outbox: Outbox) -> None:
    """The second save came in while the first was being committed."""
    first = accepted(outbox)
    outbox.accept(write_checkpoint(outbox.output_dir, 5, salt="again"), entry_of(URL, 1, 5))
    outbox.remove(first)
    assert [contents(entry.home / "files") for entry in outbox.entries()] == [bytes_of(5, "again")]


@pytest.mark.parametrize("last_rename", [1, 2, 3])
def test_a_second_save_of_a_step_that_is_killed_keeps_the_first_or_the_second(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, last_rename: int
) -> None:
    accepted(outbox)
    folder = write_checkpoint(outbox.output_dir, 6, salt="again")
    rename, left = os.rename, [last_rename - 1]

    def killed(source: str, target: str) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with contextlib.suppress(KeyboardInterrupt):
        outbox.accept(folder, entry_of(URL, 1, 5))
    monkeypatch.undo()
    kept = [contents(entry.home / "files") for entry in outbox.entries()]
    assert kept[:1] in ([bytes_of(5)], [bytes_of(6, "again")])


def test_an_empty_folder_is_refused_and_leaves_nothing(outbox: Outbox) -> None:
    folder = outbox.output_dir / "checkpoint-5"
    folder.mkdir()
    with pytest.raises(ConfigurationError, match="holds no file that belongs to this save"):
        outbox.accept(folder, entry_of(URL, 1, 5))
    assert list(outbox.folder.iterdir()) == []


def test_a_missing_folder_leaves_nothing(outbox: Outbox) -> None:
    with pytest.raises(FileNotFoundError):
        outbox.accept(outbox.output_dir / "checkpoint-5", entry_of(URL, 1, 5))
    assert list(outbox.folder.iterdir()) == []


def test_links_are_kept_as_the_files_that_they_point_to(outbox: Outbox) -> None:
    folder = write_checkpoint(outbox.output_dir, 5)
    weights = outbox.output_dir / "weights.bin"
    weights.write_bytes(b"w" * 2**20)
    (folder / "pytorch_model.bin").symlink_to(weights)
    (folder / "small.json").symlink_to(folder / "trainer_state.json")
    (folder / "dangling").symlink_to("nowhere")
    entry = outbox.accept(folder, entry_of(URL, 1, 5))
    kept = entry.home / "files"
    assert contents(kept) == bytes_of(5) | {
        "pytorch_model.bin": b"w" * 2**20,
        "small.json": bytes_of(5)["trainer_state.json"],
    }
    assert not [path for path in kept.rglob("*") if path.is_symlink()]


def test_our_own_records_in_a_folder_do_not_belong_to_it(outbox: Outbox) -> None:
    accepted(outbox)
    write_files(outbox.output_dir, {"model": b"x"})
    entry = outbox.accept(outbox.output_dir, entry_of(URL, 0, 0, name="final"))
    assert entry.home.name.startswith("final-")
    assert {file.path for file in entry.files} == {"model", *(f"checkpoint-5/{path}" for path in bytes_of(5))}


@pytest.mark.parametrize("reason", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP])
def test_files_are_copied_with_a_warning_if_the_disk_cannot_link(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: int
) -> None:
    def refused(source: object, target: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "link", refused)
    entry = accepted(outbox)
    assert contents(entry.home / "files") == bytes_of(5)
    assert "were copied" in caplog.text
    assert os.strerror(reason) in caplog.text


def test_a_copy_that_would_fill_the_disk_is_refused_and_leaves_nothing(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match=r"A copy of .* needs 1.0 MB, and only 1.0 MB are free") as told:
        accepted(outbox)
    assert told.value.errno == errno.ENOSPC
    assert list(outbox.folder.iterdir()) == []


def test_any_other_problem_with_a_link_is_an_error(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: object, target: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(OSError, match="Input/output error"):
        accepted(outbox)
    assert list(outbox.folder.iterdir()) == []


def in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"changed")
    os.utime(path, ns=(1, 1))


CHANGES: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "written in place": in_place,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_a_file_that_changed_after_it_was_accepted_is_noticed(outbox: Outbox, change: str, name: str) -> None:
    entry = accepted(outbox)
    entry.check_unchanged()
    CHANGES[change](entry.home / "files" / name)
    with pytest.raises(CorruptCheckpointError, match=f"'{name}' of checkpoint-5 \\(attempt 1\\)"):
        entry.check_unchanged()


def test_a_new_file_under_the_name_of_the_linked_one_changes_nothing(outbox: Outbox) -> None:
    """As safetensors writes: a new inode under the old name."""
    entry = accepted(outbox)
    model = outbox.output_dir / "checkpoint-5/model.safetensors"
    os.replace(write_checkpoint(outbox.output_dir, 6) / "model.safetensors", model)
    entry.check_unchanged()
    assert contents(entry.home / "files") == bytes_of(5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: {},
        lambda record: record | {"files": None},
        lambda record: record | {"files": [{**record["files"][0], "path": "../../away"}]},
        lambda record: record | {"attempt": "x"},
        lambda record: record | {"position": {"globalstep": 1}},
        lambda record: record | {"metrics": 5},
    ],
)
def test_a_damaged_entry_is_named_and_kept_and_the_others_are_read(
    outbox: Outbox, caplog: pytest.LogCaptureFixture, damage: Callable[[dict[str, object]], object]
) -> None:
    damaged, good = accepted(outbox, 5), accepted(outbox, 10)
    path = damaged.home / "entry.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    assert outbox.entries() == [good]
    assert str(damaged.home) in caplog.text
    assert damaged.home.is_dir()


def test_an_unfinished_folder_is_not_an_entry_and_is_removed(outbox: Outbox) -> None:
    entry = accepted(outbox)
    dead = subprocess.Popen(["true"])  # a number that no process has any more
    dead.wait()
    left = outbox.folder / f".000001-0000000005-{dead.pid}-deadbeef"
    os.rename(entry.home, left)
    (left / "entry.json").unlink()
    assert outbox.entries() == []
    assert list(outbox.folder.iterdir()) == []


def test_a_complete_folder_without_its_name_becomes_an_entry_after_its_process_died(outbox: Outbox) -> None:
    entry = accepted(outbox)
    dead = subprocess.Popen(["true"])
    dead.wait()
    os.rename(entry.home, outbox.folder / f".000001-0000000005-{dead.pid}-deadbeef")
    assert outbox.entries() == [entry]


def test_an_unfinished_folder_of_a_dead_process_with_the_same_number_is_removed(outbox: Outbox) -> None:
    """In a container, every start of a training has the same process number."""
    entry = accepted(outbox)
    left = outbox.folder / f".000001-0000000005-{os.getpid()}-deadbeef"
    os.rename(entry.home, left)
    (left / "entry.json").unlink()
    assert outbox.entries() == []
    assert list(outbox.folder.iterdir()) == []


def test_one_process_at_a_time_empties_an_outbox(outbox: Outbox) -> None:
    with outbox.lock(), pytest.raises(BlockingIOError), Outbox(outbox.output_dir).lock():
        pass
    with outbox.lock():
        pass


def test_a_lock_ends_with_its_holder_although_a_child_process_inherited_it(outbox: Outbox) -> None:
    """Loader workers that were forked during an upload live for hours."""
    with outbox.lock():
        [held] = [int(name) for name in os.listdir("/proc/self/fd") if is_lock(int(name))]
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], pass_fds=[held], stdin=subprocess.PIPE
        )
    try:
        with outbox.lock():
            pass
    finally:
        child.communicate()


def is_lock(descriptor: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").endswith("outbox.lock")
    except OSError:
        return False


def test_metrics_that_are_not_json_are_an_error_of_this_package(outbox: Outbox) -> None:
    """`save` logs errors of this package and continues; any other error would end the training."""
    with pytest.raises((CloudTrainError, OSError)):
        accepted(outbox, metrics={"loss": float("nan")})
    assert outbox.entries() == []


def test_a_metric_that_is_not_finite_is_named_in_the_origin(outbox: Outbox) -> None:
    """The numbers of a manifest are finite, and the last finite loss belongs to an earlier step."""
    metrics = {"loss": float("nan"), "eval_loss": float("inf"), "accuracy": 0.5}
    entry = OutboxEntry.new(URL, Attempt(1, "nonce"), Position(5), EXACT, metrics, best=False)
    found = outbox.accept(write_checkpoint(outbox.output_dir, 5), entry)
    manifest = Manifest.parse(found.manifest("k", "checkpoint-5", []).encode(), "k")
    assert manifest.metrics == {"accuracy": 0.5}
    assert manifest.origin["not_finite"] == "loss (nan), eval_loss (inf)"


def test_an_entry_is_immutable(outbox: Outbox) -> None:
    entry = accepted(outbox)
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.best = True  # type: ignore[misc]


class TestCopies:
    """link=False: the folder will be written again, in place, as soon as it is accepted."""

    @staticmethod
    def copied(outbox: Outbox, folder: Path, step: int = 5, **options: object) -> OutboxEntry:
        return outbox.accept(folder, entry_of(URL, 1, step), link=False, **options)

    def test_no_copy_shares_an_inode(self, outbox: Outbox) -> None:
        folder = write_checkpoint(outbox.output_dir, 5)
        entries = [self.copied(outbox, folder, step) for step in (5, 6)]
        for path in bytes_of(5):
            inodes = {
                os.stat(folder / path).st_ino,
                *(os.stat(e.home / "files" / path).st_ino for e in entries),
            }
            assert len(inodes) == 3
        write_files(folder, dict.fromkeys(bytes_of(5), b"again"))
        for entry in entries:
            entry.check_unchanged()
            assert contents(entry.home / "files") == bytes_of(5)

    @pytest.mark.parametrize(
        "name",
        "a.tmp a.part a.partial a.incomplete a~ .tmp12ab .nfs0001 tmpab12_3xy dir/a.tmp _cloudtrain/x".split(),
    )
    def test_unfinished_files_and_our_own_are_not_copied(self, outbox: Outbox, name: str) -> None:
        folder = outbox.output_dir / "ckpt"
        write_files(folder, {"model": b"1", name: b"2"})
        assert [file.path for file in self.copied(outbox, folder).files] == ["model"]

    @pytest.mark.parametrize(
        "name", ["tmp.bin", "tmpl_model.bin", "a.tmpl", "part", ".hidden", "dir/_cloudtrain/x"]
    )
    def test_files_with_other_names_are_copied(self, outbox: Outbox, name: str) -> None:
        folder = outbox.output_dir / "ckpt"
        write_files(folder, {name: b"2"})
        assert [file.path for file in self.copied(outbox, folder).files] == [name]

    def test_old_files_are_copied(self, outbox: Outbox) -> None:
        folder = write_checkpoint(outbox.output_dir, 5)
        for path in bytes_of(5):
            os.utime(folder / path, (1, 1))
        assert contents(self.copied(outbox, folder).home / "files") == bytes_of(5)

    def test_links_to_folders_are_not_followed_and_links_to_files_are(self, outbox: Outbox) -> None:
        folder = write_checkpoint(outbox.output_dir, 5)
        (folder / "latest").symlink_to(folder)
        (folder / "best").symlink_to(folder / "model.safetensors")
        entry = self.copied(outbox, folder)
        assert contents(entry.home / "files") == bytes_of(5) | {"best": bytes_of(5)["model.safetensors"]}
        assert not (entry.home / "files/best").is_symlink()

    def test_only_wanted_files_are_copied(self, outbox: Outbox) -> None:
        folder = write_checkpoint(outbox.output_dir, 5)
        entry = self.copied(outbox, folder, wanted=lambda path: path == "empty")
        assert contents(entry.home / "files") == {"empty": b""}

    def test_nothing_is_copied_if_the_disk_lacks_room_for_all_of_it(
        self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = outbox.output_dir / "ckpt"
        write_files(folder, {name: bytes(2**20) for name in "abcd"})
        free = 4 * 2**20 + frozen.SMALL_TOTAL - 1
        monkeypatch.setattr(frozen.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        copied: list[object] = []
        monkeypatch.setattr(frozen.shutil, "copyfile", lambda *paths: copied.append(paths))
        monkeypatch.setattr(frozen, "_clone", lambda source, target: False)
        with pytest.raises(OSError, match=r"A copy of .* are free") as told:
            self.copied(outbox, folder)
        assert told.value.errno == errno.ENOSPC
        assert copied == []
        assert outbox.entries() == []

    def test_space_is_checked_for_the_files_that_are_left(
        self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = outbox.output_dir / "ckpt"
        write_files(folder, {name: bytes(2**20) for name in "abcd"})
        free = 4 * 2**20 + frozen.SMALL_TOTAL
        copyfile = frozen.shutil.copyfile

        def copy(source: Path, target: Path) -> None:
            nonlocal free
            copyfile(source, target)
            free -= 2**20

        monkeypatch.setattr(frozen.shutil, "copyfile", copy)
        monkeypatch.setattr(frozen.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        monkeypatch.setattr(frozen, "_clone", lambda source, target: False)
        assert len(self.copied(outbox, folder).files) == 4

    def test_shared_blocks_need_no_space(self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = write_checkpoint(outbox.output_dir, 5)
        asked = []

        def clone(descriptor: int, request: int, source: int) -> None:
            asked.append(request)
            os.sendfile(descriptor, source, 0, 2**30)

        monkeypatch.setattr(frozen.fcntl, "ioctl", clone)
        monkeypatch.setattr(frozen.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        assert contents(self.copied(outbox, folder).home / "files") == bytes_of(5)
        assert set(asked) == {0x40049409}
        assert len(asked) == len(bytes_of(5))

    def test_sharing_blocks_is_tried_once_a_save(
        self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = write_checkpoint(outbox.output_dir, 5)
        asked = []

        def refuse(descriptor: int, request: int, source: int) -> None:
            asked.append(request)
            raise OSError(errno.EOPNOTSUPP, "not here")

        monkeypatch.setattr(frozen.fcntl, "ioctl", refuse)
        assert contents(self.copied(outbox, folder).home / "files") == bytes_of(5)
        assert len(asked) == 1

    def test_a_file_that_is_written_during_the_copy_loses_the_save(
        self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = write_checkpoint(outbox.output_dir, 5)
        copyfile = frozen.shutil.copyfile

        def while_written(source: Path, target: Path) -> None:
            copyfile(source, target)
            with open(source, "ab") as file:
                file.write(b"more")

        monkeypatch.setattr(frozen.shutil, "copyfile", while_written)
        monkeypatch.setattr(frozen, "_clone", lambda source, target: False)
        with pytest.raises(OSError, match="written while it was copied"):
            self.copied(outbox, folder)
        assert outbox.entries() == []


def test_of_the_entries_that_cannot_be_committed_only_the_last_is_kept(outbox: Outbox) -> None:
    for step in (5, 10, 15):
        outbox.set_aside(accepted(outbox, step), CorruptCheckpointError("written again"))
    (aside,) = (outbox.output_dir / "_cloudtrain/unusable").iterdir()
    assert aside.name.startswith("000001-0000000015-")
    assert contents(aside / "files") == bytes_of(15)


def test_a_reason_why_it_is_not_exact_is_said_once_and_again_only_if_it_is_certain_now(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    unknown, no = Exactness.not_verified("EMA may keep state"), Exactness.no("no optimizer")
    worse = unknown._replace(exact=False)
    told: set[Exactness] = set()
    for step, found in enumerate((EXACT, unknown, unknown, EXACT, unknown, no, unknown, no, worse, unknown)):
        entry_of(URL, 1, step, exact=found.exact, inexact_reason=found.reason).tell_exactness(told)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"checkpoint-1: {unknown.sentence}",
        f"checkpoint-5: {no.sentence}",
        f"checkpoint-8: {worse.sentence}",
    ]
