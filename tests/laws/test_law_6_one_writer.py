"""Law 6, One writer: a trainer that a newer attempt has overtaken stops, moves no pointer and deletes nothing."""

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
"""Seconds between two heartbeats, where a test waits for one."""


@pytest.fixture(params=["file", "moto", "azurite", "rclone"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    yield from new_location(request, tmp_path)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hearts beat often."""
    monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", str(SOON))


def overtaken(machine: Machine) -> str:
    """What a training says that ends because a newer attempt has begun."""
    with pytest.raises(OvertakenError) as told:
        machine.wait()
    return str(told.value)


def storage_as_it_is(folder: Path) -> dict[str, bytes]:
    """Every object but those that are about one attempt alone."""
    return {
        path: data
        for path, data in contents(folder).items()
        if not path.startswith((f"{META}/attempts/", f"{META}/progress/"))
    }


class TestTwoLiveAttempts:
    def test_law_6_exactly_one_goes_on(
        self, location: Location, tmp_path: Path, no_pauses: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        """On every kind of storage; where fencing is best effort, the log says so."""
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
            old.save(900, best=True)  # it has noticed nothing yet
            told = overtaken(old)
            new.save(6)
            new.wait()

            assert catalog.checkpoints() == [CheckpointKey(1, 5), CheckpointKey(2, 6)]
            assert catalog.pointer("last") == CheckpointKey(2, 6)
            assert catalog.pointer("best") is None
            assert "Attempt 1 of" in told
            assert "overtaken by attempt 2, which began on host" in told
            assert [verify(catalog, catalog.read(key)) for key in catalog.checkpoints()] == [[], []]
            assert next_one.start() == 6
        finally:
            for machine in (old, new, next_one):
                machine.stop()
        assert ("told apart only by best effort" in caplog.text) == (not location.exclusive)

    def test_law_6_of_starts_at_once_exactly_one_goes_on(
        self, location: Location, no_pauses: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(attempts_module, "SETTLE_SECONDS", 0.5)
        together = threading.Barrier(3)
        before = Catalog(location.open())
        before.storage.check()
        before.attempts.begin(0.0, 0, None, {})  # rclone may hang where several make one folder at once

        def start(number: int) -> Attempt:
            catalog = Catalog(location.open())
            catalog.storage.exclusive = before.storage.exclusive
            together.wait(DEADLINE)
            return catalog.attempts.begin(0.0, 0, None, {})

        with ThreadPoolExecutor(3) as pool:
            attempts = list(pool.map(start, range(3)))
        catalog = Catalog(location.open())
        left = [attempt for attempt in attempts if Ownership(catalog, attempt).look() is None]
        assert [attempt.number for attempt in left] == [max(catalog.attempts.numbers())]
        if (
            location.exclusive
        ):  # elsewhere a start that is held up for longer than the others settle shares its number
            assert catalog.attempts.numbers() == [1, 2, 3, 4]


class TestTheOvertakenOne:
    def test_law_6_stops_an_upload_that_is_under_way_and_keeps_it(
        self, machines: Machines, often: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In the middle of a file, too: the rest of a large one may take an hour."""
        monkeypatch.setattr(backend, "PART_SIZE", 4096)
        old, new = machines.new("old"), machines.new("new")
        old.start()
        machines.storage.hold("upload", machines.gate, path="checkpoint-5/model.safetensors")
        old.save(5)
        wait_until(lambda: machines.storage.count("upload", "*/model.safetensors"), "the upload")
        new.start()
        wait_until(lambda: old.checkpointer.overtaken_by, "the look")
        machines.gate.set()
        told = overtaken(old)

        wait_until(lambda: old.checkpointer._upload_queue._current is None, "the upload has stopped")
        assert old.checkpointer._upload_queue.progress.done < len(bytes_of(5)["model.safetensors"])
        assert machines.storage.count("create", COMMITS) == 0
        assert not (machines.run / "checkpoint-5" / "model.safetensors").exists()
        assert old.waiting() == [CheckpointKey(1, 5)]
        assert "not on storage: checkpoint-5" in told
        assert f"cloudtrain checkpoint flush {old.output_dir}" in told

    def test_law_6_rests_once_it_has_stopped(self, machines: Machines) -> None:
        """What waits in its outbox is not looked at again and again."""
        old, new = machines.new("old"), machines.new("new")
        old.start()
        new.start()
        tries: list[str] = []
        old.checkpointer._upload_queue.progress.begin = lambda title, size: tries.append(title)  # type: ignore[method-assign]
        old.save(5)
        overtaken(old)
        for step in (6, 7, 8):
            new.save(step)
            new.wait()
        assert tries == ["Uploading checkpoint-5"]

    def test_law_6_looks_right_before_the_commit(self, machines: Machines) -> None:
        """It was overtaken while it sent the files, and no heart has beaten since."""
        old = machines.new("old")
        old.start()
        machines.storage.hold("upload", machines.gate, path="checkpoint-5/model.safetensors")
        old.save(5)
        wait_until(lambda: machines.storage.count("upload", "*/model.safetensors"), "the upload")
        machines.new("new").start()
        machines.gate.set()
        overtaken(old)
        assert machines.storage.count("upload", "checkpoint-5/*") == len(bytes_of(5)), "all of it was sent"
        assert machines.storage.count("create", COMMITS) == 0

    def test_law_6_what_it_had_saved_may_be_committed_under_its_own_number_and_moves_nothing(
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

    def test_law_6_accepts_nothing_once_it_knows(
        self, machines: Machines, often: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        old = machines.new("old")
        old.start()
        machines.new("new").start()
        wait_until(lambda: old.checkpointer.overtaken_by, "the look")
        assert old.checkpointer.overtaken_by == 2
        before = storage_as_it_is(machines.run)
        old.save(5)
        assert old.waiting() == []
        assert "checkpoint-5 is not uploaded: attempt 2 has begun" in caplog.text
        overtaken(old)
        assert storage_as_it_is(machines.run) == before

    def test_law_6_learns_of_it_though_it_saves_nothing_and_no_step_asks(
        self, machines: Machines, often: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        old = machines.new("old")
        old.start()
        new = machines.new("new")
        new.start()
        wait_until(lambda: old.checkpointer.overtaken_by, "the look")
        new.stop()
        machines.storage.calls.clear()
        assert [old.checkpointer.overtaken_by for _ in range(1_000)] == [2] * 1_000
        assert machines.storage.count("any", f"{META}/attempts*") == 0
        said = [record.getMessage() for record in caplog.records if "overtaken" in record.getMessage()]
        assert len(said) == 1, "said once"

    def test_law_6_goes_on_while_nobody_can_look(self, machines: Machines, often: None) -> None:
        """An outage overtakes nobody."""
        machine = machines.new()
        machine.start()
        machines.storage.fail("list", path=f"{META}/attempts", times=12)
        wait_until(lambda: machines.storage.count("list", f"{META}/attempts") > 14, "some looks")
        assert machine.checkpointer.overtaken_by is None
        machine.save(5)
        machine.wait()
        assert machines.committed() == [(1, 5)]

    def test_law_6_commits_nothing_while_nobody_can_look(self, machines: Machines) -> None:
        machine = machines.new()
        machine.start()
        machines.storage.fail("list", path=f"{META}/attempts", times=1_000_000)
        machine.save(5)
        wait_until(lambda: machine.checkpointer._upload_queue.last_error, "a failed look")
        assert machines.storage.count("create", COMMITS) == 0
        machines.storage.heal()
        machine.wait()
        assert machines.committed() == [(1, 5)]

    def test_law_6_does_not_wait_for_an_upload_that_hangs(self, machines: Machines, often: None) -> None:
        old = machines.new("old")
        old.start()
        machines.storage.hold("upload", machines.gate, path="checkpoint-5/*")
        old.save(5)
        machines.new("new").start()
        told: list[str] = []

        def wait() -> None:
            with pytest.raises(OvertakenError) as error:
                old.checkpointer.wait(timeout=1e6)  # the gate opens after the test
            told.append(str(error.value))

        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(DEADLINE)
        assert "not on storage: checkpoint-5" in "".join(told)

    def test_law_6_waits_at_its_end_for_nothing_and_does_not_pass_for_finished(
        self, machines: Machines
    ) -> None:
        """All of it is committed, and yet another one goes on."""
        old = machines.new("old")
        old.start()
        old.save(5)
        old.wait()
        machines.new("new").start()
        with pytest.raises(OvertakenError, match=r"Attempt 1 of .* was overtaken by attempt 2"):
            old.checkpointer.finish(DEADLINE)

    def test_law_6_drains_nothing_at_exit_and_says_what_is_left(
        self, machines: Machines, often: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        old = machines.new("old")
        old.start()
        machines.storage.hold("upload", machines.gate, path="checkpoint-5/*")
        old.save(5)
        machines.new("new").start()
        wait_until(lambda: old.checkpointer.overtaken_by, "the look")
        old.checkpointer.drain()
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(said) == 1
        assert f"not on storage: checkpoint-5. `cloudtrain checkpoint flush {old.output_dir}`" in said[0]
        assert "Finishing the upload" not in caplog.text

    def test_law_6_saves_no_folder_by_name(self, machines: Machines) -> None:
        old = machines.new("old")
        old.start()
        folder = write_checkpoint(old.output_dir, 5)
        machines.new("new").start()
        with pytest.raises(OvertakenError):
            old.checkpointer.save_folder(folder, "final")
        assert NamedFolders(machines.catalog).keys() == []
        assert old.waiting() == [], "and a flush finds none"

    def test_law_6_moves_no_local_folder_that_a_newer_one_may_have_saved(
        self, machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a disk that both see, it wakes between taking its number and tidying up."""
        slow = machines.new("shared")
        begin = Attempts.begin

        def and_sleeps(self: Attempts, *arguments: object) -> Attempt:
            taken = begin(self, *arguments)
            monkeypatch.undo()
            machines.catalog.attempts.begin(0.0, 0, None, {})
            write_checkpoint(slow.output_dir, 7)
            return taken

        monkeypatch.setattr(Attempts, "begin", and_sleeps)
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

        answers = on_ranks(3, train, monkeypatch)
        assert [type(answer) for answer in answers] == [OvertakenError] * 3
        assert all("attempt 2, which began on host 'elsewhere'" in str(answer) for answer in answers)

    @pytest.mark.parametrize("how", ["told by rank 0", "by waiting"])
    def test_law_6_a_host_that_is_not_the_first_stops_its_upload_too(
        self, machines: Machines, monkeypatch: pytest.MonkeyPatch, often: None, how: str
    ) -> None:
        """It does not look while it trains: a thousand hosts would ask as often."""
        monkeypatch.setenv("HF_CLOUDTRAIN_DRAIN_TIMEOUT", "5")
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
                wait_until(lambda: checkpointer.overtaken_by, "the look")
            ranks.barrier()
            with pytest.raises(OvertakenError):
                checkpointer.check_not_overtaken() if how == "told by rank 0" else checkpointer.wait(DEADLINE)
            checkpointer.drain()
            return checkpointer.overtaken_by

        assert on_ranks(2, train, monkeypatch) == [2, 2]
        assert machines.storage.count("create", COMMITS) == 0


class TestTheWindow:
    """Between the look and what follows it, a newer attempt may begin: nobody can close that, and it does no harm."""

    def test_law_6_a_commit_in_the_window_sorts_below_and_touches_nothing_of_the_newer_one(
        self, machines: Machines
    ) -> None:
        old, new = machines.new("old"), machines.new("new")
        old.start()
        old.save(5)
        old.wait()
        machines.storage.hold("create", machines.gate, path=COMMITS, times=1)
        old.save(900, best=True, salt="late")
        wait_until(lambda: machines.storage.count("create", COMMITS) == 2, "it has looked, and commits")
        assert new.start() == 5
        for step in (6, 900):
            new.save(step, salt="new", best=True)
            new.wait()
        before = storage_as_it_is(machines.run)
        machines.gate.set()
        wait_until(lambda: len(machines.catalog.checkpoints()) == 4, "the late commit")
        overtaken(old)

        after = storage_as_it_is(machines.run)
        added = {path for path in after if path not in before}
        assert added == {f"{META}/checkpoints/000001-0000000900.json"}
        assert {path: after[path] for path in before} == before, (
            "pointers and all that the newer one has written"
        )
        assert machines.committed() == [(1, 5), (1, 900), (2, 6), (2, 900)]
        assert machines.restored("next") == bytes_of(900, "new")

    def test_law_6_a_pointer_moved_in_the_window_is_put_right_by_the_next_commit(
        self, machines: Machines
    ) -> None:
        old, new = machines.new("old"), machines.new("new")
        old.start()
        machines.storage.hold("write", machines.gate, path=f"{META}/best.json", times=1)
        old.save(5, best=True)
        wait_until(lambda: machines.storage.count("write", f"{META}/best.json"), "it has looked, and points")
        assert new.start() == 5
        new.save(6, best=True, metrics={"best_metric": 0.5})
        new.wait()
        machines.gate.set()
        old.checkpointer._upload_queue.wait(DEADLINE)
        assert machines.catalog.pointer("best") == CheckpointKey(1, 5), "it is a checkpoint that exists"
        new.save(7)
        new.wait()
        assert machines.catalog.pointer("best") == CheckpointKey(2, 6)
        assert machines.catalog.pointer("last") == CheckpointKey(2, 7)
        assert b'"metric": 0.5' in machines.catalog.storage.read(f"{META}/best.json")


class TestAfterwards:
    def test_law_6_started_again_in_the_same_process_it_is_an_attempt_as_any_other(
        self, machines: Machines
    ) -> None:
        """A cell of a notebook that ended with the error, and is run again."""
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

    def test_law_6_the_framework_that_starts_over_does_not_overtake_itself(
        self, machines: Machines, often: None, caplog: pytest.LogCaptureFixture
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
        self, machines: Machines, often: None
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
    """Best effort: two may take one number at the same moment, and the nonce tells who has it."""

    @pytest.fixture(autouse=True)
    def no_exclusive_create(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(LocalBackend, "create", LocalBackend.write)

    def test_law_6_of_two_that_take_one_number_the_one_written_over_takes_another(
        self, machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = machines.new("first"), machines.new("second")
        seen_free = threading.Event()
        machines.storage.hold("write", seen_free, path="*/attempts/*", call=1, times=1)
        starting = threading.Thread(target=first.start)
        starting.start()
        wait_until(lambda: machines.storage.count("write", "*/attempts/*"), "it saw number 1 free")
        # The second one writes the same number, and settles; only then the first one's write arrives.
        monkeypatch.setattr(attempts_module, "SETTLE_SECONDS", 0.0)
        sleep = attempts_module.time.sleep

        def settle(seconds: float) -> None:
            if seconds == 0.0 and not seen_free.is_set():
                seen_free.set()
                starting.join(DEADLINE)
            else:
                sleep(seconds)

        monkeypatch.setattr(attempts_module.time, "sleep", settle)
        second.start()
        seen_free.set()  # where nobody settles
        starting.join(DEADLINE)
        monkeypatch.undo()
        numbers = (first.checkpointer.attempt.number, second.checkpointer.attempt.number)
        assert numbers == (1, 2)
        assert machines.catalog.attempts.numbers() == [1, 2]

    def test_law_6_a_number_that_another_one_is_just_writing_is_not_ours(self, machines: Machines) -> None:
        """`rclone serve s3` says then that there is no such object."""
        machines.storage.fail("read", FileNotFoundError("no such key"), call=2, path="*/attempts/000001.json")
        machine = machines.new()
        machine.start()
        assert machine.checkpointer.attempt.number == 2
        machine.save(5)
        machine.wait()
        assert machines.committed() == [(2, 5)]

    def test_law_6_whoever_lost_its_number_later_stops(self, machines: Machines) -> None:
        first = machines.new("first")
        first.start()
        other = Catalog(Storage(machines.storage.url))
        other.storage.exclusive = False
        other.storage.write(
            f"{META}/attempts/000001.json", b'{"nonce": "of another", "facts": {"host": "x"}}'
        )
        first.save(5)
        told = overtaken(first)
        assert "Attempt 1 of" in told
        assert (
            "started twice at the same moment, and the other one has it now, which began on host 'x'" in told
        )
        assert machines.storage.count("upload", "checkpoint-5/*") == 0

    def test_law_6_two_with_one_number_write_two_folders(self, machines: Machines) -> None:
        catalog = Catalog(machines.storage)
        catalog.storage.exclusive = False
        key = CheckpointKey(1, 5)
        assert catalog.claim(key, "one-5", exclusive=False) == "checkpoint-5"
        assert catalog.claim(key, "two-5", exclusive=False) == "checkpoint-5.a1"
        assert catalog.claim(key, "one-5-again", exclusive=False) == "checkpoint-5"
