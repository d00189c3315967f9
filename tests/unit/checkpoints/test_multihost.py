"""Hosts with disks of their own: who gives what, what is held, and who waits for whom. Ranks are threads here."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.checkpoints import commit_watch as watch_module
from hf_cloudtrain.checkpoints import local_folders
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.commit_watch import CommitWatch
from hf_cloudtrain.checkpoints.host_shares import HostShares
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Position
from hf_cloudtrain.checkpoints.upload_status import UploadStatus
from hf_cloudtrain.errors import NotCommittedError, StorageUnavailableError
from hf_cloudtrain.runtime.ranks import Ranks
from tests.faults.ranks import on_ranks
from tests.faults.runs import DEADLINE, Machines, contents, entry_of, wait_until, write_files

Files = dict[str, bytes]


class Host:
    """A rank on a host of its own, in training."""

    def __init__(self, checkpointer: Checkpointer, ranks: Ranks) -> None:
        self.checkpointer = checkpointer
        self.rank = ranks.rank
        self.barrier = ranks.barrier
        checkpointer.begin(0)

    def save(self, step: int, files: Files | None = None, **options: Any) -> Path:
        folder = self.checkpointer.output_dir / f"checkpoint-{step}"
        if files is None:
            files = {f"shard-{self.rank}": f"{self.rank} at {step}".encode()}
        write_files(folder, files)
        self.checkpointer.save(folder, Position(global_step=step), **options)
        return folder

    def wait(self, seconds: float = DEADLINE) -> None:
        self.checkpointer.wait(seconds)

    def waiting(self) -> list[int]:
        assert self.checkpointer.upload_queue is not None
        self.checkpointer.upload_queue._dropping.settle(DEADLINE)
        return [entry.key.step for entry in self.checkpointer.outbox.entries()]

    def is_busy(self) -> bool:
        return self.checkpointer.upload_queue.is_busy()


@pytest.fixture
def hosts(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    def run(size: int, work: Callable[[Host], Any]) -> list[Any]:
        return on_ranks(
            size,
            lambda ranks: work(Host(machines.new(f"host-{ranks.rank}").checkpointer, ranks)),
            monkeypatch,
        )

    return run


Hosts = Callable[..., list[Any]]


def on_storage(machines: Machines, step: int) -> Files:
    assert (1, step) in machines.committed()
    manifest = machines.catalog.read(CheckpointKey(1, step))
    found = contents(machines.run / manifest.folder)
    assert set(found) == {entry.path for entry in manifest.files}
    return found


class TestShares:
    def test_a_file_that_every_node_wrote_is_in_the_manifest_once_from_the_lowest_node(
        self, hosts: Hosts, machines: Machines
    ) -> None:
        """As with `save_on_each_node`: bytes may differ, so one object must not be written by two."""

        def work(host: Host) -> None:
            mine = str(host.rank).encode()
            host.save(5, {"config.json": mine, "model.safetensors": mine * 2**20, f"rng_{host.rank}": mine})
            host.wait()

        assert hosts(3, work) == [None] * 3
        found = on_storage(machines, 5)
        assert {name: data[:1] for name, data in found.items()} == {
            "config.json": b"0",
            "model.safetensors": b"0",
            "rng_0": b"0",
            "rng_1": b"1",
            "rng_2": b"2",
        }
        assert machines.storage.count("upload", "*/config.json") == 1

    def test_hosts_without_files_of_their_own_give_no_part(self, hosts: Hosts, machines: Machines) -> None:
        def work(host: Host) -> None:
            host.save(5, {"model": b"1"} if host.rank < 2 else {"model": b"1", "extra": b"2"})
            host.wait()

        assert hosts(3, work) == [None] * 3
        assert on_storage(machines, 5) == {"model": b"1", "extra": b"2"}
        assert machines.storage.count("write", "*-of-2.json") == 2
        assert machines.storage.count("write", "*-of-3.json") == 0

    def test_a_host_without_the_folder_gives_nothing(self, hosts: Hosts, machines: Machines) -> None:
        def work(host: Host) -> CheckpointKey | None:
            folder = host.checkpointer.output_dir / "checkpoint-5"
            if host.rank == 1:
                write_files(folder, {"model": b"1"})
            host.checkpointer.save(folder, Position(global_step=5))
            host.wait()
            return host.checkpointer.uploads.last_committed

        assert hosts(2, work) == [CheckpointKey(1, 5)] * 2, "rank 0 knows of the commit, too"
        assert on_storage(machines, 5) == {"model": b"1"}

    def test_a_save_without_files_makes_no_checkpoint_and_the_first_host_reports_it(
        self, hosts: Hosts, machines: Machines, caplog: pytest.LogCaptureFixture
    ) -> None:
        def work(host: Host) -> None:
            (host.checkpointer.output_dir / "checkpoint-5").mkdir()
            host.save(5, {})
            host.wait(0.1)

        answers = hosts(2, work)
        assert [type(answer) for answer in answers] == [NotCommittedError] * 2
        assert "host-0/checkpoint-5' holds no file that belongs to this save" in caplog.text
        assert machines.committed() == []

    def test_a_left_over_of_another_save_does_not_belong_to_the_save(
        self, hosts: Hosts, machines: Machines
    ) -> None:
        def work(host: Host) -> None:
            folder = host.checkpointer.output_dir / "checkpoint-5"
            if host.rank == 0:
                write_files(folder, {"rng_1": b"of a larger world"})
            since = (folder / "rng_1").stat().st_mtime_ns + 1 if host.rank == 0 else 0
            host.save(5, {f"rng_{host.rank}": b"new"}, since_ns=since)
            host.wait()

        assert hosts(2, work) == [None] * 2
        assert on_storage(machines, 5) == {"rng_0": b"new", "rng_1": b"new"}

    def test_names_are_exchanged_only_when_they_change(
        self, hosts: Hosts, machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shared_out: list[int] = []
        share_out = HostShares._share_out

        def noted(shares: HostShares, found: Any) -> None:
            if shares._ranks.is_main:
                shared_out.append(len(found))
            share_out(shares, found)

        monkeypatch.setattr(HostShares, "_share_out", noted)
        before: dict[int, int] = {}

        def work(host: Host) -> None:
            for step in (5, 15, 150, 155):
                files = {f"global_step{step}/rank_{host.rank}.pt": b"1", f"x{step}": b"", "latest": b"1"}
                if step == 155 and host.rank == 1:
                    files["more"] = b"2"
                host.save(step, files)
                host.wait()
                before[step] = len(shared_out)

        assert hosts(2, work) == [None] * 2
        assert before == {5: 1, 15: 1, 150: 1, 155: 2}
        for step in before:
            names = {f"global_step{step}/rank_{rank}.pt" for rank in range(2)} | {f"x{step}", "latest"}
            assert set(on_storage(machines, step)) == names | ({"more"} if step == 155 else set())

    def test_a_disk_that_cannot_be_read_loses_the_save_on_all_hosts_and_training_continues(
        self, hosts: Hosts, machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Otherwise the files of the other hosts would be committed as if they were all."""
        fresh_files = local_folders.fresh_files

        def failing(folder: Path, *rest: Any) -> Any:
            if "host-1/checkpoint-10" in str(folder):
                raise PermissionError(13, "Permission denied", str(folder))
            return fresh_files(folder, *rest)

        monkeypatch.setattr(local_folders, "fresh_files", failing)

        def work(host: Host) -> None:
            host.save(5)
            host.wait()
            host.save(10)
            host.wait(0.1)

        answers = hosts(2, work)
        assert machines.committed() == [(1, 5)]
        for answer in answers:
            assert isinstance(answer, NotCommittedError)
            assert "Rank 1 could not look at the checkpoint" in str(answer)


class TestSlowHosts:
    def test_all_hosts_skip_the_same_saves(self, hosts: Hosts, machines: Machines) -> None:
        """Otherwise one host sends the second and another the third, and no set is ever whole."""
        machines.storage.hold("upload", machines.gate, path="checkpoint-5/shard-1")

        def work(host: Host) -> list[int]:
            host.save(5)
            if host.rank == 0:
                wait_until(lambda: not host.is_busy(), "the part of the fast host")
            for step in (10, 15, 20):
                host.save(step)
            held = host.waiting()
            host.barrier()
            machines.gate.set()
            host.wait()
            return held

        assert hosts(2, work) == [[20], [20, 5]]
        assert machines.committed() == [(1, 5), (1, 20)]
        assert machines.storage.count("upload", "checkpoint-1[05]/*") == 0

    def test_a_best_save_is_never_held(self, hosts: Hosts, machines: Machines) -> None:
        machines.storage.hold("upload", machines.gate, path="checkpoint-5/shard-1")

        def work(host: Host) -> None:
            host.save(5)
            for step in (10, 15, 20):
                host.save(step, best=step == 10)
            host.barrier()
            machines.gate.set()
            host.wait()

        assert hosts(2, work) == [None] * 2
        assert machines.committed() == [(1, 5), (1, 10), (1, 20)]

    def test_hosts_that_keep_up_send_every_save_and_hold_none(self, hosts: Hosts, machines: Machines) -> None:
        def work(host: Host) -> None:
            for step in (5, 10, 15):
                host.save(step)
                wait_until(lambda: not host.is_busy(), "its part")
                host.barrier()

        assert hosts(2, work) == [None] * 2
        assert machines.committed() == [(1, 5), (1, 10), (1, 15)]

    def test_a_held_save_is_replaced_also_if_one_host_alone_has_the_next(
        self, hosts: Hosts, machines: Machines
    ) -> None:
        machines.storage.hold("upload", machines.gate, path="checkpoint-5/shard-1")

        def work(host: Host) -> None:
            host.save(5)
            host.save(10)
            host.save(15, {} if host.rank else {"model": b"1"})
            host.barrier()
            machines.gate.set()
            host.wait()

        assert hosts(2, work) == [None] * 2
        assert machines.committed() == [(1, 5), (1, 15)]
        assert machines.storage.count("upload", "checkpoint-10/*") == 0

    def test_law_4_a_held_save_is_committed_at_the_next_start_after_all_hosts_were_killed(
        self, hosts: Hosts, machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machines.storage.hold("upload", machines.gate, path="checkpoint-5/shard-1")

        def work(host: Host) -> None:
            host.save(5)
            host.save(10)
            host.barrier()
            host.checkpointer.close()  # as if killed: it begins nothing more

        hosts(2, work)
        machines.gate.set()
        for machine in machines.made:
            machine.stop()
        machines.storage.heal()

        def again(ranks: Ranks) -> int:
            restored = machines.new(f"host-{ranks.rank}").checkpointer.restore()
            assert restored is not None
            return restored.manifest.step

        assert on_ranks(2, again, monkeypatch) == [10, 10]
        assert (1, 10) in machines.committed()


class TestWaiting:
    def test_law_5_a_host_that_has_sent_its_part_waits_for_the_commit(
        self, hosts: Hosts, machines: Machines
    ) -> None:
        machines.storage.hold("upload", machines.gate, path="*/shard-1")
        sent = threading.Event()

        def work(host: Host) -> list[tuple[int, int]]:
            host.save(5)
            if host.rank == 0:
                wait_until(lambda: not host.is_busy(), "its part")
                sent.set()
                threading.Timer(0.3, machines.gate.set).start()
            host.wait()
            return machines.committed()

        assert hosts(2, work) == [[(1, 5)]] * 2
        assert sent.is_set()

    def test_law_5_the_host_whose_part_is_missing_is_named_on_all_ranks(
        self, hosts: Hosts, machines: Machines
    ) -> None:
        machines.storage.fail("upload", times=10**9, path="*/shard-1")

        def work(host: Host) -> None:
            host.save(5)
            host.wait(1.0)

        first, second = hosts(2, work)
        assert isinstance(first, NotCommittedError)
        assert "checkpoint-5 (attempt 1). Missing is the part of rank 1 on '" in str(first)
        assert "flush" in str(first)
        assert isinstance(second, NotCommittedError)
        assert "connection reset on purpose" in str(second), "the host itself reports the reason"

    def test_a_host_that_lost_its_disk_is_named_and_the_run_resumes_from_the_checkpoint_before(
        self, hosts: Hosts, machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machines.storage.fail("upload", times=10**9, path="checkpoint-10/shard-1")

        def work(host: Host) -> None:
            host.save(5)
            host.wait()
            host.save(10)
            host.wait(0.5)

        hosts(2, work)
        for machine in machines.made:
            machine.stop()
        machines.storage.heal()
        shutil.rmtree(machines.run.parent / "host-1")

        def again(ranks: Ranks) -> int:
            checkpointer = machines.new(f"host-{ranks.rank}").checkpointer
            restored = checkpointer.restore()
            assert restored is not None
            return checkpointer.begin(restored.manifest.step).resumed_from.step

        assert on_ranks(2, again, monkeypatch) == [5, 5]
        assert machines.committed() == [(1, 5)]

    def test_a_process_that_ends_early_names_the_host_whose_part_is_missing(
        self,
        hosts: Hosts,
        machines: Machines,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(watch_module, "LAST_LOOK", 0.2)
        machines.storage.hold("upload", machines.gate, path="*/shard-1")

        def work(host: Host) -> None:
            host.save(5)
            if host.rank == 0:
                host.checkpointer.drain()

        assert hosts(2, work) == [None] * 2
        assert "the part of rank 1 on '" in caplog.text


class TestWatch:
    def entry(self, catalog: Catalog, step: int) -> Any:
        return entry_of(catalog.storage.url, 1, step, hosts=2)

    def commit(self, catalog: Catalog, step: int) -> None:
        catalog.storage.create(f".cloudtrain/checkpoints/{CheckpointKey(1, step)}.json", b"{}")

    def test_a_commit_is_noted_while_training_continues(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watch_module, "PAUSES", (0.005,))
        uploads = UploadStatus()
        watch = CommitWatch(catalog, uploads)
        for step in (5, 10):
            watch.expect(self.entry(catalog, step), ("a", "b"))
            self.commit(catalog, step)
            wait_until(lambda step=step: uploads.last_committed == CheckpointKey(1, step), "the commit")
        wait_until(lambda: watch._thread is None, "the end of a thread that has nothing to look for")

    def test_only_the_newest_is_waited_for(self, catalog: Catalog) -> None:
        uploads = UploadStatus()
        watch = CommitWatch(catalog, uploads)
        for step in (5, 10):
            watch.expect(self.entry(catalog, step), ("a", "b"))
        self.commit(catalog, 10)
        watch.wait(DEADLINE)
        assert uploads.last_committed == CheckpointKey(1, 10)
        watch.wait(0.0)

    def test_pauses_between_checks_grow(self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
        pauses: list[float] = []
        uploads = UploadStatus()
        watch = CommitWatch(catalog, uploads)

        def wait(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 8:
                self.commit(catalog, 5)

        monkeypatch.setattr(watch._changed, "wait", wait)
        watch.expect(self.entry(catalog, 5), ("a", "b"))
        wait_until(lambda: uploads.last_committed, "the commit")
        assert pauses == [1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0]

    def test_a_failed_check_is_repeated(self, machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watch_module, "PAUSES", (0.005,))
        catalog = machines.catalog
        uploads = UploadStatus()
        watch = CommitWatch(catalog, uploads)
        machines.storage.fail("read", StorageUnavailableError("away"), times=20)
        watch.expect(self.entry(catalog, 5), ("a", "b"))
        self.commit(catalog, 5)
        wait_until(lambda: uploads.last_committed, "the commit")
        watch.close()
