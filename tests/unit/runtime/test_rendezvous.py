"""Ranks communicate without a process group. They are threads here, each with its own client of the store."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.errors import ConfigurationError, PeerError, StorageError
from hf_cloudtrain.runtime import rendezvous as module
from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.runtime.rendezvous import FolderStore, LauncherStore, Rendezvous, Store
from tests.faults.runs import DEADLINE, wait_until

Place = Callable[[], Store]


@pytest.fixture(params=["folder", "launcher"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Opens the store as one process does."""
    if request.param == "folder":
        return lambda: FolderStore(tmp_path / "ranks")
    import torch.distributed as dist

    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=DEADLINE))
    return lambda: LauncherStore("127.0.0.1", server.port)


def launch(place: Place, size: int, work: Callable[[Rendezvous, int], Any]) -> list[Any]:
    """The answer or the error of each rank of a launch."""
    answers: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            answers[rank] = work(Rendezvous(place(), rank, size), rank)
        except Exception as error:  # noqa: BLE001 - a test checks it
            answers[rank] = error

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(DEADLINE)
        assert not rank.is_alive()
    return answers


def talk(rendezvous: Rendezvous, rank: int) -> list[Any]:
    found = [rendezvous.gather((rank, number)) for number in range(5)]
    rendezvous.barrier()
    return found


def test_every_rank_receives_all_values_in_order(place: Place) -> None:
    for answer in launch(place, 3, talk):
        assert answer == [[(0, n), (1, n), (2, n)] for n in range(5)]


def test_a_second_launch_reads_nothing_of_the_first(place: Place) -> None:
    """As if the first launch was killed between two rounds."""
    for said in ("first", "second", "third"):
        for answer in launch(place, 2, lambda rendezvous, rank, said=said: rendezvous.gather((said, rank))):
            assert answer == [(said, 0), (said, 1)]


def test_a_launch_of_fewer_ranks_reads_nothing_of_a_larger_one(place: Place) -> None:
    launch(place, 3, talk)
    assert launch(place, 2, lambda rendezvous, rank: rendezvous.gather(rank)) == [[0, 1]] * 2


def test_a_late_rank_replaces_its_predecessor(place: Place) -> None:
    """Rank 0 invites the nonce of an ended rank 2; only the new process can accept, and all ranks wait for it."""
    launch(place, 3, talk)
    store = place()
    old = store.get("roster")
    answers: dict[int, Any] = {}

    def rank(number: int) -> None:
        answers[number] = Rendezvous(place(), number, 3).gather(number)

    first, second, late = (threading.Thread(target=rank, args=(number,)) for number in range(3))
    first.start()
    second.start()
    wait_until(
        lambda: store.get("roster") not in {old, None} and store.get("ack-1") == store.get("roster"),
        "rank 1 accepts an invitation with the nonce of the ended process",
    )
    late.start()
    for thread in (first, second, late):
        thread.join(DEADLINE)
    assert answers == {number: [0, 1, 2] for number in range(3)}


def test_a_missing_rank_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(place, 2, talk)
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    for rank, missing in ((0, 1), (1, 0)):
        with pytest.raises(PeerError, match=rf"Rank {missing} did not answer.*init_process_group first"):
            Rendezvous(place(), rank, 2)


def test_a_rank_that_is_missing_in_a_later_round_is_named(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(rendezvous: Rendezvous, rank: int) -> list[Any]:
        rendezvous.barrier()
        if rank == 2:
            return []
        monkeypatch.setattr(module, "PATIENCE", 0.1)
        return rendezvous.gather(rank)

    first, second, _ = launch(place, 3, leave)
    assert isinstance(first, PeerError)
    assert isinstance(second, PeerError)
    assert "Rank 2 did not answer" in str(first)


def test_a_pending_answer_arrives_although_other_rounds_come_first(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `if step % 100 == 0 or is_emergency_save()`: a save comes between the request and its answer."""
    monkeypatch.setattr(module, "PATIENCE", 10.0)

    def work(rendezvous: Rendezvous, rank: int) -> list[list[float]]:
        heard = []
        for number in range(5):
            asked = rendezvous.begin_largest([float(rank), float(-number)])
            rendezvous.barrier()
            heard.append(asked.result())
        return heard

    assert launch(place, 2, work) == [[[1.0, float(-number)] for number in range(5)]] * 2


def test_old_values_are_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    for _ in range(3):
        launch(lambda: FolderStore(folder), 2, talk)
    names = {path.name for path in folder.iterdir()}
    assert len(names - {"hello-0", "hello-1", "ack-1", "roster", "go"}) == 2, "the last value of each rank"


def test_other_files_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "notes-1-2.txt").touch()
    launch(lambda: FolderStore(tmp_path), 2, talk)
    assert (tmp_path / "notes-1-2.txt").exists()


def test_a_launcher_that_has_ended_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.servers import free_port

    monkeypatch.setattr(module, "CONNECT_SECONDS", 1)
    with pytest.raises(PeerError, match=r"The launcher's store at '127\.0\.0\.1:\d+' does not answer"):
        LauncherStore("127.0.0.1", free_port())


class TestRanks:
    """Ranks over a rendezvous agree like any others. The variables are those that torchrun or mpirun sets."""

    @staticmethod
    def on_two_ranks(
        folder: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Ranks], Any]
    ) -> list[Any]:
        def run(rendezvous: Rendezvous, rank: int) -> Any:
            return work(Ranks(rank, 2, rendezvous))

        return launch(lambda: FolderStore(folder), 2, run)

    def test_a_decision_is_taken_once_and_an_error_is_raised_on_all_ranks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def work(ranks: Ranks) -> Any:
            ranks.meet_disks(tmp_path / "disk")
            assert ranks.leaders == [0]
            assert ranks.agree(lambda: f"from {ranks.rank}", "think") == "from 0"
            return ranks.agree(lambda: (_ for _ in ()).throw(StorageError("no")), "think")

        assert [type(answer) for answer in self.on_two_ranks(tmp_path / "ranks", monkeypatch, work)] == [
            StorageError
        ] * 2

    def test_an_error_of_the_user_s_own_class_reaches_the_other_ranks_as_text(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class TwoPartsError(StorageError):
            """Neither pickled nor made from a text."""

            def __init__(self, first: str, second: str) -> None:
                super().__init__(f"{first} and {second}")

        def fail() -> None:
            raise TwoPartsError("one", "two")

        own, other = self.on_two_ranks(
            tmp_path / "ranks", monkeypatch, lambda ranks: ranks.agree(fail, "think")
        )
        assert isinstance(own, TwoPartsError)
        assert isinstance(other, PeerError)
        assert "one and two" in str(other)

    def test_without_a_store_of_the_launcher_they_use_the_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr(module, "PATIENCE", 0.05)
        with pytest.raises(PeerError, match="Rank 1 did not answer"):
            Ranks.current(tmp_path / "ranks")
        assert (tmp_path / "ranks/hello-0").exists()

    def test_on_several_hosts_a_process_group_is_needed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigurationError, match=r"on several hosts.*init_process_group first"):
            Ranks.current(tmp_path / "ranks")

    @pytest.mark.parametrize("rank", [None, "2", "x", "-1"])
    def test_a_rank_out_of_range_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str | None
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(ConfigurationError, match=r"RANK='.*' is out of range.*torchrun"):
            Ranks.current(tmp_path / "ranks")

    def test_a_single_process_creates_no_folder(self, tmp_path: Path) -> None:
        assert Ranks.current(tmp_path / "ranks").size == 1
        assert not (tmp_path / "ranks").exists()
