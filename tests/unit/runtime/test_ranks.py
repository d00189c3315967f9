"""How ranks agree: a single process, threads, and three real processes of torch.distributed (started once)."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_cloudtrain.errors import ConfigurationError, PeerError, StorageError
from hf_cloudtrain.runtime.ranks import Ranks, rank_and_size
from tests.faults.ranks import on_ranks
from tests.integration._zygote import Zygote

ROOT = Path(__file__).resolve().parents[3]
SIZE = 3

Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """The answers of each of three processes."""
    folder = tmp_path_factory.mktemp("gloo")
    processes = [
        zygote.start("tests.unit.runtime.gloo_ranks", "answer", rank=rank, folder=folder)
        for rank in range(SIZE)
    ]
    codes = [process.wait() for process in processes]
    assert codes == [0] * SIZE, "\n".join(process.log for process in processes)[-4_000:]
    return [process.value for process in processes]


def test_each_process_knows_its_rank(ranks: Answers) -> None:
    assert [answers["who"] for answers in ranks] == [[0, 3, True], [1, 3, False], [2, 3, False]]


def test_the_decision_of_rank_0_reaches_all_ranks(ranks: Answers) -> None:
    assert [answers["agree"] for answers in ranks] == ["from 0"] * SIZE


def test_every_rank_receives_all_answers_in_order(ranks: Answers) -> None:
    assert [answers["each"] for answers in ranks] == [[0, 10, 20]] * SIZE


def test_an_error_of_ours_keeps_its_class_on_all_ranks(ranks: Answers) -> None:
    assert [answers["agree fails"] for answers in ranks] == [["RunHasCheckpointsError", "it has"]] * SIZE
    assert [answers["each fails with ours"] for answers in ranks] == [
        ["RunHasCheckpointsError", "it has"]
    ] * SIZE


def test_any_other_error_keeps_its_class_on_its_rank_and_is_a_peer_error_elsewhere(ranks: Answers) -> None:
    kinds = [answers["each fails"][0] for answers in ranks]
    assert kinds == ["PeerError", "OSError", "PeerError"]
    for answers in (ranks[0], ranks[2]):
        assert answers["each fails"][1].startswith("Rank 1 could not write: ")
        assert "full" in answers["each fails"][1]


def test_the_ranks_still_agree_after_an_error(ranks: Answers) -> None:
    assert [answers["after errors"] for answers in ranks] == [[0, 1, 2]] * SIZE
    assert [answers["after no disk"] for answers in ranks] == [[0, 1, 2]] * SIZE


def test_work_may_take_longer_than_the_timeout_of_a_collective(ranks: Answers) -> None:
    assert [answers["slow"] for answers in ranks] == ["slept"] * SIZE
    assert [answers["the user's group"] for answers in ranks] == ["alive"] * SIZE


@pytest.mark.parametrize(
    ("disks", "leaders", "neighbours"),
    [
        ("one disk", [0], [[0, 1, 2]] * 3),
        ("own disks", [0, 1, 2], [[0], [1], [2]]),
        ("two disks", [0, 2], [[0, 1], [0, 1], [2]]),
    ],
)
def test_ranks_find_out_which_ranks_share_their_disk(
    ranks: Answers, disks: str, leaders: list[int], neighbours: list[list[int]]
) -> None:
    for rank, answers in enumerate(ranks):
        found = answers[disks]
        assert found["leaders"] == leaders
        assert found["neighbours"] == neighbours[rank]
        assert found["leads"] == (rank in leaders)
        assert found["answers"] == leaders, "one answer per disk"
        # Each rank lists the folder before the others have removed their files, so only its own file must be gone.
        assert f"-{rank}" not in [name[-2:] for name in found["left"]]


def test_a_disk_that_cannot_be_written_is_an_error_on_all_ranks(ranks: Answers) -> None:
    kinds = [answers["no disk"][0] for answers in ranks]
    assert kinds == ["PeerError", "PeerError", "NotADirectoryError"]
    assert "Rank 2 could not write to" in ranks[0]["no disk"][1]


def test_a_single_process_decides_at_once() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.is_main, ranks.is_leader) == (0, 1, True, True)
    assert ranks.agree(lambda: 5, "think") == 5
    assert ranks.each(lambda: 5, "think") == [5]
    assert ranks.each_leader(lambda: 5, "think") == [5]
    ranks.barrier()
    with pytest.raises(StorageError, match="as it was"):
        ranks.agree(lambda: (_ for _ in ()).throw(StorageError("as it was")), "think")


def test_a_single_process_creates_no_files(tmp_path: Path) -> None:
    Ranks().meet_disks(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_single_process_without_a_group_is_one_rank() -> None:
    assert Ranks.current().size == 1


def test_several_processes_without_a_group_are_an_error_that_says_how_to_make_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    no_group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.distributed", no_group)
    with pytest.raises(ConfigurationError, match=r"WORLD_SIZE is 4, but no process group.*TrainingArguments"):
        Ranks.current()


def test_asking_for_the_ranks_does_not_import_torch() -> None:
    code = "import sys; from hf_cloudtrain.runtime.ranks import Ranks; Ranks.current(); print('torch' in sys.modules)"
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert asked.stdout == "False\n"


def test_only_leaders_work_once_per_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[int] = []

    def lead(ranks: Ranks) -> list[int]:
        ranks.leaders = [0, 2]
        return ranks.each_leader(lambda: worked.append(ranks.rank) or ranks.rank, "lead")

    assert on_ranks(4, lead, monkeypatch) == [[0, 2]] * 4
    assert sorted(worked) == [0, 2]


def test_each_rank_raises_its_own_error_or_the_first_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(ranks: Ranks) -> None:
        def work() -> None:
            if ranks.rank:
                raise ValueError(f"of rank {ranks.rank}")

        ranks.each(work, "work")

    answers = on_ranks(3, fail, monkeypatch)
    assert isinstance(answers[0], PeerError)
    assert "Rank 1 could not work" in str(answers[0])
    assert [str(answer) for answer in answers[1:]] == ["of rank 1", "of rank 2"]


def test_a_full_disk_of_one_rank_is_an_error_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ranks: Ranks) -> None:
        def work() -> None:
            if ranks.rank == 1:
                raise StorageError(28, "no space is left on the disk")

        ranks.each(work, "work")

    answers = on_ranks(2, fail, monkeypatch)
    assert all(isinstance(answer, StorageError) for answer in answers)
    assert all("no space is left on the disk" in str(answer) for answer in answers)


def test_the_rank_comes_from_the_process_group_then_from_the_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert rank_and_size() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert rank_and_size() == (3, 4)
    group = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 1, get_world_size=lambda: 2
    )
    monkeypatch.setitem(sys.modules, "torch.distributed", group)
    assert rank_and_size() == (1, 2)
    assert Ranks().group_size == 2


def test_without_a_group_the_size_is_that_of_the_launcher() -> None:
    assert Ranks(0, 3).group_size == 3


def test_work_in_this_thread_runs_there_and_its_error_is_raised_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[bool] = []

    def work(ranks: Ranks) -> int:
        def own() -> int:
            threads.append(threading.current_thread() is mine)
            if ranks.rank == 1:
                raise OSError(28, "No space left on device")
            return ranks.rank

        mine = threading.current_thread()
        return ranks.here(own, "write it")

    answers = on_ranks(2, work, monkeypatch)
    assert threads == [True, True]
    assert isinstance(answers[0], PeerError)
    assert "Rank 1 could not write it" in str(answers[0])
    assert isinstance(answers[1], OSError)


def test_a_process_with_a_gloo_group_sleeps_before_it_exits(zygote: Zygote, tmp_path: Path) -> None:
    code = """
import time
import torch.distributed as dist
from hf_cloudtrain.runtime.ranks import Ranks
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(2):
    Ranks.current()
time.sleep = lambda seconds: print("sleeps for", seconds)
print("the script is over")
"""
    child = zygote.start("tests.integration._script", "run", words=["-c", code], folder=tmp_path)
    assert child.wait() == 0, child.log
    assert child.log.splitlines() == ["the script is over", "sleeps for 0.1"]
