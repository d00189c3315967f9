"""Law 6, One writer: an attempt that a newer one has overtaken stops, moves no pointer and deletes nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints import attempts as attempts_module
from hf_cloudtrain.checkpoints.attempts import Attempt, Attempts
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import verify
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Position
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.ownership import Ownership
from hf_cloudtrain.errors import OvertakenError
from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.storage import backend
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.local_backend import LocalBackend
from hf_cloudtrain.storage.names import META
from tests.contract.conftest import Location, new_location
from tests.faults.ranks import on_ranks
from tests.faults.runs import (
    DEADLINE,
    Machine,
    Machines,
    bytes_of,
    contents,
    wait_until,
    write_checkpoint,
    write_files,
)

COMMITS = "*/checkpoints/*"
SOON = 0.02
"""Seconds between two heartbeats in tests that wait for one."""


@pytest.fixture(params=["file", "moto", "azurite", "rclone"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    yield from new_location(request, tmp_path)


@pytest.fixture
def fast_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats every 20 ms."""
    monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", str(SOON))


def overtaken(machine: Machine) -> str:
    """The message of the error that ends an overtaken attempt."""
    with pytest.raises(OvertakenError) as raised:
        machine.wait()
    return str(raised.value)


def objects_of_the_run(folder: Path) -> dict[str, bytes]:
    """Every object of the run except attempt and progress records."""
    return {
        path: data
        for path, data in contents(folder).items()
        if not path.startswith((f"{META}/attempts/", f"{META}/progress/"))
    }


class TestTwoLiveAttempts:
    def test_law_6_exactly_one_continues(
        self, location: Location, tmp_path: Path, no_pauses: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        """On every kind of storage; where ownership is best effort, the log says so."""
        catalog = Catalog(location.open())
        old, new, next_one = (
            Machine(tmp_path / name, location.url, storage_options=location.options)
            for name in ("old", "new", "next")
        )
        try:
            old.start()
            old.save(5)
            old.wait()
            assert new.start() == 5
            old.save(900, best=True)  # it does not know yet that it was overtaken
            message = overtaken(old)
            new.save(6)
            new.wait()

            assert catalog.checkpoints() == [CheckpointKey(1, 5), CheckpointKey(2, 6)]
            assert catalog.pointer("last") == CheckpointKey(2, 6)
            assert catalog.pointer("best") is None
            assert "Attempt 1 of" in message
            assert "overtaken by attempt 2, which began on host" in message
            assert [verify(catalog, catalog.read(key)) for key in catalog.checkpoints()] == [[], []]
            assert next_one.start() == 6
        finally:
            for machine in (old, new, next_one):
                machine.stop()
        assert ("told apart only by best effort" in caplog.text) == (not location.exclusive)

    def test_law_6_of_simultaneous_starts_exactly_one_continues(
        self, location: Location, no_pauses: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(attempts_module, "SETTLE_SECONDS", 0.5)
        together = threading.Barrier(3)
        before = Catalog(location.open())
        before.storage.check()
        before.attempts.begin(0.0, 0, None, {})  # rclone may hang if several starts create one folder at once

        def start(number: int) -> Attempt:
            catalog = Catalog(location.open())
            catalog.storage.exclusive = before.storage.exclusive
            together.wait(DEADLINE)
            return catalog.attempts.begin(0.0, 0, None, {})

        with ThreadPoolExecutor(3) as pool:
            attempts = list(pool.map(start, range(3)))
        catalog = Catalog(location.open())
        remaining = [attempt for attempt in attempts if Ownership(catalog, attempt).look() is None]
        assert [attempt.number for attempt in remaining] == [max(catalog.attempts.numbers())]
        # Without exclusive create, a start that is delayed beyond the settle time may share its number.
        if location.exclusive:
            assert catalog.attempts.numbers() == [1, 2, 3, 4]


class TestTheOvertakenAttempt:
    def test_law_6_stops_a_running_upload_and_keeps_its_entry(
        self, machines: Machines, fast_heartbeats: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It stops even within a file: the rest of a large file may take an hour."""
        monkeypatch.setattr(backend, "PART_SIZE", 4096)
        old, new = machines.new("old"), machines.new("new")
        old.start()
        machines.storage.hold("upload", machines.gate, path="checkpoint-5/model.safetensors")
        old.save(5)
        wait_until(lambda: machines.storage.count("upload", "*/model.safetensors"), "the upload")
        new.start()
        wait_until(lambda: old.checkpointer.overtaken_by, "the ownership check")
        machines.gate.set()
        message = overtaken(old)

        wait_until(lambda: old.checkpointer.upload_queue._current is None, "the end of the upload")
        assert old.checkpointer.upload_queue.progress.done < len(bytes_of(5)["model.safetensors"])
        assert machines.storage.count("create", COMMITS) == 0
        assert not (machines.run / "checkpoint-5" / "model.safetensors").exists()
        assert old.waiting() == [CheckpointKey(1, 5)]
        assert "not on storage: checkpoint-5" in message
        assert f"cloudtrain checkpoint flush {old.output_dir}" in message

    def test_law_6_does_not_retry_once_it_has_stopped(self, machines: Machines) -> None:
        """The entries in its outbox are tried once."""
        old, new = machines.new("old"), machines.new("new")
        old.start()
        new.start()
        tries: list[str] = []
        progress = old.checkpointer.upload_queue.progress
        progress.begin = lambda title, size: tries.append(title)  # type: ignore[method-assign]
        old.save(5)
        overtaken(old)
        for step in (6, 7, 8):
            new.save(step)
            new.wait()
        assert tries == ["Uploading checkpoint-5"]

    def test_law_6_checks_right_before_the_commit(self, machines: Machines) -> None:
        """It was overtaken during the upload, and no heartbeat has run since."""
        old = machines.new("old")
        old.start()
        machines.storage.hold("upload", machines.gate, path="checkpoint-5/model.safetensors")
        old.save(5)
        wait_until(lambda: machines.storage.count("upload", "*/model.safetensors"), "the upload")
        machines.new("new").start()
        machines.gate.set()
        overtaken(old)
        assert machines.storage.count("upload", "checkpoint-5/*") == len(bytes_of(5)), (
            "all files were uploaded"
        )
        assert machines.storage.count("create", COMMITS) == 0

    def test_law_6_its_old_save_may_be_committed_under_its_own_number_and_moves_no_pointer(
        self, machines: Machines
    ) -> None:
        old, new = machines.new("old"), machines.new("new")
        old.start()
        new.start()
        old.save(900, best=True)
        overtaken(old)
        new.save(5, best=True)
        new.wait()
        old.land()
        assert machines.committed() == [(1, 900), (2, 5)]
        assert machines.catalog.newest() == CheckpointKey(2, 5)
        assert machines.catalog.pointer("best") == machines.catalog.pointer("last") == CheckpointKey(2, 5)
        assert old.waiting() == []

    def test_law_6_accepts_no_save_once_it_knows(
        self, machines: Machines, fast_heartbeats: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        old = machines.new("old")
        old.start()
        machines.new("new").start()
        wait_until(lambda: old.checkpointer.overtaken_by, "the ownership check")
        assert old.checkpointer.overtaken_by == 2
        before = objects_of_the_run(machines.run)
        old.save(5)
        assert old.waiting() == []
        assert "checkpoint-5 is not uploaded: attempt 2 has begun" in caplog.text
        overtaken(old)
        assert objects_of_the_run(machines.run) == before

    def test_law_6_learns_of_it_without_a_save_and_without_a_request_per_step(
        self, machines: Machines, fast_heartbeats: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        old = machines.new("old")
        old.start()
        new = machines.new("new")
        new.start()
        wait_until(lambda: old.checkpointer.overtaken_by, "the ownership check")
        new.stop()
        machines.storage.calls.clear()
        assert [old.checkpointer.overtaken_by for _ in range(1_000)] == [2] * 1_000
        assert machines.storage.count("any", f"{META}/attempts*") == 0
        messages = [record.getMessage() for record in caplog.records if "overtaken" in record.getMessage()]
        assert len(messages) == 1, "logged once"

    def test_law_6_continues_while_the_check_fails(self, machines: Machines, fast_heartbeats: None) -> None:
        """An outage does not count as being overtaken."""
        machine = machines.new()
        machine.start()
        machines.storage.fail("list", path=f"{META}/attempts", times=12)
        wait_until(lambda: machines.storage.count("list", f"{META}/attempts") > 14, "a few checks")
        assert machine.checkpointer.overtaken_by is None
        machine.save(5)
        machine.wait()
        assert machines.committed() == [(1, 5)]

    def test_law_6_commits_nothing_while_the_check_fails(self, machines: Machines) -> None:
        machine = machines.new()
        machine.start()
        machines.storage.fail("list", path=f"{META}/attempts", times=1_000_000)
        machine.save(5)
        wait_until(lambda: machine.checkpointer.upload_queue.last_error, "a failed check")
        assert machines.storage.count("create", COMMITS) == 0
        machines.storage.heal()
        machine.wait()
        assert machines.committed() == [(1, 5)]

    def test_law_6_does_not_wait_for_an_upload_that_hangs(
        self, machines: Machines, fast_heartbeats: None
    ) -> None:
        old = machines.new("old")
        old.start()
        machines.storage.hold("upload", machines.gate, path="checkpoint-5/*")
        old.save(5)
        machines.new("new").start()
        messages: list[str] = []

        def wait() -> None:
            with pytest.raises(OvertakenError) as error:
                old.checkpointer.wait(timeout=1e6)  # the gate opens after the test
            messages.append(str(error.value))

        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(DEADLINE)
        assert "not on storage: checkpoint-5" in "".join(messages)

    def test_law_6_finish_does_not_wait_and_reports_that_it_was_overtaken(self, machines: Machines) -> None:
        """Its checkpoints are committed, but a newer attempt continues the run."""
        old = machines.new("old")
        old.start()
        old.save(5)
        old.wait()
        machines.new("new").start()
        with pytest.raises(OvertakenError, match=r"Attempt 1 of .* was overtaken by attempt 2"):
            old.checkpointer.finish(DEADLINE)

    def test_law_6_uploads_nothing_at_exit_and_names_what_is_left(
        self, machines: Machines, fast_heartbeats: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        old = machines.new("old")
        old.start()
        machines.storage.hold("upload", machines.gate, path="checkpoint-5/*")
        old.save(5)
        machines.new("new").start()
        wait_until(lambda: old.checkpointer.overtaken_by, "the ownership check")
        old.checkpointer.drain()
        messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(messages) == 1
        assert f"not on storage: checkpoint-5. `cloudtrain checkpoint flush {old.output_dir}`" in messages[0]
        assert "Finishing the upload" not in caplog.text

    def test_law_6_saves_no_named_folder(self, machines: Machines) -> None:
        old = machines.new("old")
        old.start()
        folder = write_checkpoint(old.output_dir, 5)
        machines.new("new").start()
        with pytest.raises(OvertakenError):
            old.checkpointer.save_folder(folder, "final")
        assert NamedFolders(machines.catalog).keys() == []
        assert old.waiting() == [], "a flush must find no entry"

    def test_law_6_moves_no_local_folder_that_a_newer_attempt_may_have_saved(
        self, machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a shared disk, a newer attempt begins after the old one took its number and before it tidies up."""
        slow = machines.new("shared")
        begin = Attempts.begin

        def begin_and_be_overtaken(self: Attempts, *arguments: object) -> Attempt:
            taken = begin(self, *arguments)
            monkeypatch.undo()
            machines.catalog.attempts.begin(0.0, 0, None, {})
            write_checkpoint(slow.output_dir, 7)
            return taken

        monkeypatch.setattr(Attempts, "begin", begin_and_be_overtaken)
        with pytest.raises(OvertakenError):
            slow.start()
        assert contents(slow.output_dir / "checkpoint-7") == bytes_of(7)

    def test_law_6_ends_on_all_ranks_together(
        self, machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def train(ranks: Ranks) -> None:
            checkpointer = machines.new("old").checkpointer
            checkpointer.begin(0)
            checkpointer.check_not_overtaken()
            if checkpointer.ranks.is_main:
                machines.catalog.attempts.begin(0.0, 0, None, {"host": "elsewhere"})
                checkpointer.ownership.look()
            checkpointer.check_not_overtaken()

        results = on_ranks(3, train, monkeypatch)
        assert [type(result) for result in results] == [OvertakenError] * 3
        assert all("attempt 2, which began on host 'elsewhere'" in str(result) for result in results)

    @pytest.mark.parametrize("how", ["by broadcast", "by waiting"])
    def test_law_6_the_other_hosts_stop_their_uploads_too(
        self, machines: Machines, monkeypatch: pytest.MonkeyPatch, fast_heartbeats: None, how: str
    ) -> None:
        """Other hosts make no checks of their own during training: the requests would grow with the number of hosts."""
        monkeypatch.setenv("HF_CLOUDTRAIN_DRAIN_TIMEOUT", "0.5")
        machines.storage.hold("upload", machines.gate, path="*/of-rank-1")

        def train(ranks: Ranks) -> int | None:
            checkpointer = machines.new(f"host-{ranks.rank}").checkpointer
            checkpointer.begin(0)
            folder = checkpointer.output_dir / "checkpoint-5"
            write_files(folder, {f"of-rank-{ranks.rank}": b"1"})
            checkpointer.save(folder, Position(global_step=5))
            wait_until(lambda: machines.storage.count("upload", "*/of-rank-1"), "the upload")
            if ranks.is_main:
                machines.catalog.attempts.begin(0.0, 0, None, {})
                wait_until(lambda: checkpointer.overtaken_by, "the ownership check")
            ranks.barrier()
            with pytest.raises(OvertakenError):
                checkpointer.check_not_overtaken() if how == "by broadcast" else checkpointer.wait(DEADLINE)
            checkpointer.drain()
            return checkpointer.overtaken_by

        assert on_ranks(2, train, monkeypatch) == [2, 2]
        assert machines.storage.count("create", COMMITS) == 0


class TestTheWindow:
    """A newer attempt may begin between the check and the write after it. This cannot be prevented, but is harmless."""

    def test_law_6_a_commit_in_the_window_sorts_below_and_changes_nothing_of_the_newer_attempt(
        self, machines: Machines
    ) -> None:
        old, new = machines.new("old"), machines.new("new")
        old.start()
        old.save(5)
        old.wait()
        machines.storage.hold("create", machines.gate, path=COMMITS, times=1)
        old.save(900, best=True, salt="late")
        wait_until(lambda: machines.storage.count("create", COMMITS) == 2, "the commit after the check")
        assert new.start() == 5
        for step in (6, 900):
            new.save(step, salt="new", best=True)
            new.wait()
        before = objects_of_the_run(machines.run)
        machines.gate.set()
        wait_until(lambda: len(machines.catalog.checkpoints()) == 4, "the late commit")
        overtaken(old)

        after = objects_of_the_run(machines.run)
        added = {path for path in after if path not in before}
        assert added == {f"{META}/checkpoints/000001-0000000900.json"}
        assert {path: after[path] for path in before} == before, (
            "pointers and all objects of the newer attempt must be unchanged"
        )
        assert machines.committed() == [(1, 5), (1, 900), (2, 6), (2, 900)]
        assert machines.restored("next") == bytes_of(900, "new")

    def test_law_6_a_pointer_moved_in_the_window_is_corrected_by_the_next_commit(
        self, machines: Machines
    ) -> None:
        old, new = machines.new("old"), machines.new("new")
        old.start()
        machines.storage.hold("write", machines.gate, path=f"{META}/best.json", times=1)
        old.save(5, best=True)
        wait_until(
            lambda: machines.storage.count("write", f"{META}/best.json"), "the pointer write after the check"
        )
        assert new.start() == 5
        new.save(6, best=True, metrics={"best_metric": 0.5})
        new.wait()
        machines.gate.set()
        old.checkpointer.upload_queue.wait(DEADLINE)
        assert machines.catalog.pointer("best") == CheckpointKey(1, 5), "it points to an existing checkpoint"
        new.save(7)
        new.wait()
        assert machines.catalog.pointer("best") == CheckpointKey(2, 6)
        assert machines.catalog.pointer("last") == CheckpointKey(2, 7)
        assert b'"metric": 0.5' in machines.catalog.storage.read(f"{META}/best.json")


class TestAfterwards:
    def test_law_6_a_new_start_in_the_same_process_is_an_ordinary_attempt(self, machines: Machines) -> None:
        """A notebook cell ended with the error, and the user runs it again."""
        old, new = machines.new("old"), machines.new("new")
        old.start()
        new.start()
        old.save(7)
        overtaken(old)
        new.save(5)
        new.wait()
        assert old.start() == 5
        assert old.checkpointer.attempt.number == 3
        assert old.checkpointer.overtaken_by is None
        assert machines.committed() == [(1, 7), (2, 5)]
        old.save(6)
        old.wait()
        assert "by attempt 3" in overtaken(new)

    def test_law_6_a_framework_that_starts_over_does_not_overtake_itself(
        self, machines: Machines, fast_heartbeats: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine = machines.new()
        machine.start()
        machines.storage.hold("upload", machines.gate, path="checkpoint-5/*")
        machine.save(5)
        machine.checkpointer.begin(0, started_over=True)
        machines.gate.set()
        machine.save(6)
        machine.wait()
        assert machines.committed() == [(1, 5), (2, 6)]
        assert "overtaken" not in caplog.text

    def test_law_6_an_attempt_that_has_finished_is_not_overtaken(
        self, machines: Machines, fast_heartbeats: None
    ) -> None:
        machine = machines.new("old")
        machine.start()
        machine.save(5)
        machine.checkpointer.finish(DEADLINE)
        machines.new("new").start()
        folder = write_checkpoint(machine.output_dir, 6)
        assert machine.checkpointer.save_folder(folder, "final").endswith("/final")
        assert machine.checkpointer.overtaken_by is None


class TestWithoutExclusiveCreate:
    """Best effort: two attempts may take one number at the same moment; the nonce decides which one keeps it."""

    @pytest.fixture(autouse=True)
    def no_exclusive_create(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(LocalBackend, "create", LocalBackend.write)

    def test_law_6_an_attempt_whose_record_is_overwritten_takes_a_different_number(
        self, machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = machines.new("first"), machines.new("second")
        first_may_write = threading.Event()
        machines.storage.hold("write", first_may_write, path="*/attempts/*", call=1, times=1)
        starting = threading.Thread(target=first.start)
        starting.start()
        wait_until(lambda: machines.storage.count("write", "*/attempts/*"), "the first write of number 1")
        # The second start writes the same number and settles; only then does the first start's write arrive.
        monkeypatch.setattr(attempts_module, "SETTLE_SECONDS", 0.0)
        sleep = attempts_module.time.sleep

        def settle(seconds: float) -> None:
            if seconds == 0.0 and not first_may_write.is_set():
                first_may_write.set()
                starting.join(DEADLINE)
            else:
                sleep(seconds)

        monkeypatch.setattr(attempts_module.time, "sleep", settle)
        second.start()
        first_may_write.set()  # in case the settle time is not used
        starting.join(DEADLINE)
        monkeypatch.undo()
        numbers = (first.checkpointer.attempt.number, second.checkpointer.attempt.number)
        assert numbers == (1, 2)
        assert machines.catalog.attempts.numbers() == [1, 2]

    def test_law_6_a_number_that_a_different_attempt_is_writing_is_not_ours(self, machines: Machines) -> None:
        """`rclone serve s3` then answers that the object does not exist."""
        machines.storage.fail("read", FileNotFoundError("no such key"), call=2, path="*/attempts/000001.json")
        machine = machines.new()
        machine.start()
        assert machine.checkpointer.attempt.number == 2
        machine.save(5)
        machine.wait()
        assert machines.committed() == [(2, 5)]

    def test_law_6_an_attempt_that_loses_its_number_later_stops(self, machines: Machines) -> None:
        first = machines.new("first")
        first.start()
        other = Catalog(Storage(machines.storage.url))
        other.storage.exclusive = False
        other.storage.write(
            f"{META}/attempts/000001.json", b'{"nonce": "of a different start", "facts": {"host": "x"}}'
        )
        first.save(5)
        message = overtaken(first)
        assert "Attempt 1 of" in message
        assert (
            "started twice at the same moment, and the other process has the number now, which began on host 'x'"
            in message
        )
        assert machines.storage.count("upload", "checkpoint-5/*") == 0

    def test_law_6_two_attempts_with_one_number_write_two_folders(self, machines: Machines) -> None:
        catalog = Catalog(machines.storage)
        catalog.storage.exclusive = False
        key = CheckpointKey(1, 5)
        assert catalog.claim(key, "one-5", exclusive=False) == "checkpoint-5"
        assert catalog.claim(key, "two-5", exclusive=False) == "checkpoint-5.a1"
        assert catalog.claim(key, "one-5-again", exclusive=False) == "checkpoint-5"
