"""One folder written again and again, on one host and on several. Ranks are threads here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.in_place import InPlace
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Position
from hf_cloudtrain.runtime.ranks import Ranks
from tests.faults.ranks import on_ranks
from tests.faults.runs import DEADLINE, Machines, contents, wait_until, write_files

Files = dict[str, bytes]


class Host:
    """A rank on a host of its own, and what it writes."""

    def __init__(self, checkpointer: Checkpointer, ranks: Ranks) -> None:
        self.checkpointer = checkpointer
        self.folder = checkpointer.output_dir
        self.rank = ranks.rank

    def save(self, step: int, files: Files) -> None:
        write_files(self.folder, files)
        self.checkpointer.save(self.folder, Position(global_step=step))


@pytest.fixture
def hosts(machines: Machines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs `work` on ranks with a disk each, or with one disk for all."""

    def run(size: int, work: Callable[[Host], Any], name: str = "host-{}") -> list[Any]:
        def rank(ranks: Ranks) -> Any:
            checkpointer = Checkpointer(
                machines.storage.url, tmp_path / name.format(ranks.rank), layout=InPlace
            )
            try:
                return work(Host(checkpointer, ranks))
            finally:
                checkpointer.drain()
                checkpointer.close()

        answers = on_ranks(size, rank, monkeypatch)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    return run


def files_of(machines: Machines, attempt: int, step: int) -> set[str]:
    return {file.path for file in machines.catalog.read(CheckpointKey(attempt, step)).files}


def test_if_only_rank_0_writes_its_host_gives_everything(
    hosts: Callable[..., list[Any]], machines: Machines
) -> None:
    def work(host: Host) -> None:
        host.checkpointer.begin(0)
        host.save(1, {"model": b"1", "config": b"c"} if host.rank == 0 else {})
        host.save(2, {"model": b"2"} if host.rank == 0 else {})
        host.checkpointer.wait(DEADLINE)

    hosts(2, work)
    assert (1, 2) in machines.committed()
    assert contents(machines.run / "checkpoint-2") == {"model": b"2", "config": b"c"}


def test_a_file_that_a_host_only_restored_does_not_belong_to_its_save(
    hosts: Callable[..., list[Any]], machines: Machines
) -> None:
    """Otherwise two hosts would give a file of one name, and one of them an old version."""

    def first(host: Host) -> None:
        host.checkpointer.begin(0)
        host.save(1, {"model": b"1", f"rng-{host.rank}": b"first"})
        host.checkpointer.wait(DEADLINE)

    def second(host: Host) -> None:
        assert host.checkpointer.restore() is not None
        assert contents(host.folder).items() >= {"model": b"1", "rng-0": b"first", "rng-1": b"first"}.items()
        host.checkpointer.begin(1)
        host.save(2, ({"model": b"2"} if host.rank == 0 else {}) | {f"rng-{host.rank}": b"second"})
        host.checkpointer.wait(DEADLINE)
        host.save(3, {"model": b"3"} if host.rank == 0 else {})
        host.checkpointer.wait(DEADLINE)

    hosts(2, first)
    hosts(2, second, name="elsewhere-{}")
    assert files_of(machines, 1, 1) == {"model", "rng-0", "rng-1"}
    assert (2, 2) in machines.committed()
    assert contents(machines.run / "checkpoint-2") == {"model": b"2", "rng-0": b"second", "rng-1": b"second"}
    assert contents(machines.run / "checkpoint-3") == {"model": b"3", "rng-0": b"second", "rng-1": b"second"}


def test_the_first_host_gives_a_file_that_all_hosts_write(
    hosts: Callable[..., list[Any]], machines: Machines
) -> None:
    def work(host: Host) -> None:
        host.checkpointer.begin(0)
        host.save(1, {"model": f"of rank {host.rank}".encode(), f"rng-{host.rank}": b""})
        host.checkpointer.wait(DEADLINE)

    hosts(3, work)
    assert files_of(machines, 1, 1) == {"model", "rng-0", "rng-1", "rng-2"}
    assert (machines.run / "checkpoint-1/model").read_bytes() == b"of rank 0"


def test_a_file_is_taken_from_the_host_that_wrote_it_last(
    hosts: Callable[..., list[Any]], machines: Machines
) -> None:
    def work(host: Host) -> None:
        host.checkpointer.begin(0)
        for step, writer in ((1, 0), (2, 2), (3, None)):
            host.save(step, {"model": f"of step {step}".encode()} if host.rank == writer else {})
            host.checkpointer.wait(DEADLINE)

    hosts(3, work)
    assert machines.committed() == [(1, 1), (1, 2), (1, 3)]
    for step, written in ((1, 1), (2, 2), (3, 2)):
        assert (machines.run / f"checkpoint-{step}/model").read_bytes() == f"of step {written}".encode()


def test_files_of_sharded_frameworks_keep_their_names(
    hosts: Callable[..., list[Any]], machines: Machines
) -> None:
    """DCP's index is a hidden file, written beside and renamed; DeepSpeed has a pointer and a folder a step."""
    on_first = {
        ".metadata": b"index",
        "latest": b"global_step1",
        "global_step1/mp_rank_00_model_states.pt": b"m",
    }

    def first(host: Host) -> None:
        host.checkpointer.begin(0)
        own = {
            f"__{host.rank}_0.distcp": b"s",
            f"global_step1/zero_pp_rank_{host.rank}_optim_states.pt": b"o",
        }
        host.save(1, {**own, **(on_first | {".metadata.tmp": b"half"} if host.rank == 0 else {})})
        host.checkpointer.wait(DEADLINE)

    def second(host: Host) -> Files:
        assert host.checkpointer.restore() is not None
        return contents(host.folder)

    hosts(2, first)
    wanted = on_first.keys() | {f"__{rank}_0.distcp" for rank in range(2)}
    wanted |= {f"global_step1/zero_pp_rank_{rank}_optim_states.pt" for rank in range(2)}
    assert files_of(machines, 1, 1) == wanted
    for found in hosts(2, second, name="elsewhere-{}"):
        assert {name for name in found if not name.startswith("_cloudtrain")} == wanted


def test_no_host_waits_for_one_that_gives_nothing(
    hosts: Callable[..., list[Any]], machines: Machines
) -> None:
    def work(host: Host) -> None:
        host.checkpointer.begin(0)
        host.save(1, {} if host.rank == 1 else {f"shard-{host.rank}": b"1"})
        host.checkpointer.wait(DEADLINE)

    hosts(3, work)
    assert files_of(machines, 1, 1) == {"shard-0", "shard-2"}


def test_a_host_whose_folder_was_removed_continues(
    hosts: Callable[..., list[Any]], machines: Machines
) -> None:
    def work(host: Host) -> None:
        host.checkpointer.begin(0)
        if host.rank == 1:
            shutil.rmtree(host.folder)
        host.save(1, {"model": b"1"} if host.rank == 0 else {})
        host.save(2, {f"shard-{host.rank}": b"2"})
        host.checkpointer.wait(DEADLINE)

    hosts(2, work)
    assert files_of(machines, 1, 2) == {"model", "shard-0", "shard-1"}


def test_restored_files_look_older_than_files_written_next(
    hosts: Callable[..., list[Any]], machines: Machines
) -> None:
    def first(host: Host) -> None:
        host.checkpointer.begin(0)
        host.save(5, {"a": b"1"})
        wait_until(machines.catalog.checkpoints, "the commit")

    def second(host: Host) -> int:
        host.checkpointer.restore()
        return host.checkpointer.local.mark_save_begin() - (host.folder / "a").stat().st_mtime_ns

    hosts(1, first)
    assert hosts(1, second, name="elsewhere")[0] > 5 * 10**9


def test_no_rank_continues_before_the_folder_is_copied(
    hosts: Callable[..., list[Any]], machines: Machines
) -> None:
    """Each rank writes a file of its own into one folder, and rank 0 copies it."""
    sizes = 4 * 2**20

    def work(host: Host) -> None:
        host.checkpointer.begin(0)
        for step in range(1, 5):
            host.save(step, {f"shard-{host.rank}": bytes([step]) * sizes})
        host.checkpointer.wait(DEADLINE)

    hosts(3, work, name="one")
    for attempt, step in machines.committed():
        manifest = machines.catalog.read(CheckpointKey(attempt, step))
        found = contents(machines.run / manifest.folder)
        assert {name: set(data) for name, data in found.items()} == {
            f"shard-{rank}": {step} for rank in range(3)
        }


def test_a_second_save_of_a_committed_step_makes_no_new_checkpoint_on_any_rank(
    hosts: Callable[..., list[Any]], machines: Machines
) -> None:
    def work(host: Host) -> None:
        host.checkpointer.begin(0)
        host.save(1, {"model": b"first"})
        host.checkpointer.wait(DEADLINE)
        host.save(1, {"model": b"second"})
        host.save(2, {"model": b"third"})
        host.checkpointer.wait(DEADLINE)

    hosts(2, work, name="one")
    assert machines.committed() == [(1, 1), (1, 2)]
    assert (machines.run / "checkpoint-1/model").read_bytes() == b"first"


def test_every_host_restores_everything(hosts: Callable[..., list[Any]], machines: Machines) -> None:
    def first(host: Host) -> None:
        host.checkpointer.begin(0)
        host.save(5, {f"shard-{host.rank}": bytes([host.rank])})
        host.checkpointer.wait(DEADLINE)

    def second(host: Host) -> Files:
        restored = host.checkpointer.restore()
        assert restored is not None
        assert restored.path == host.folder
        return contents(restored.path)

    hosts(2, first)
    for found in hosts(2, second, name="elsewhere-{}"):
        assert {name: data for name, data in found.items() if name.startswith("shard")} == {
            "shard-0": b"\0",
            "shard-1": b"\1",
        }


def test_a_restore_that_was_killed_starts_over(
    hosts: Callable[..., list[Any]], machines: Machines, tmp_path: Path
) -> None:
    def first(host: Host) -> None:
        host.checkpointer.begin(0)
        host.save(5, {"a": b"1", "b": b"2"})
        wait_until(machines.catalog.checkpoints, "the commit")

    hosts(1, first)
    write_files(tmp_path / "elsewhere", {"a": b"1", "_cloudtrain/restored/files/b": b"half"})

    def second(host: Host) -> Files:
        host.checkpointer.restore()
        return contents(host.folder)

    (found,) = hosts(1, second, name="elsewhere")
    assert (found["a"], found["b"]) == (b"1", b"2")
    assert not (tmp_path / "elsewhere/_cloudtrain/restored").exists()
