"""How several ranks come to one decision at one step."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.upload_status import UploadStatus
from hf_cloudtrain.errors import PeerError
from hf_cloudtrain.preemption import agreement
from hf_cloudtrain.preemption import preemption as preemption_module
from hf_cloudtrain.preemption.agreement import StopDecision
from hf_cloudtrain.preemption.preemption import Preemption
from hf_cloudtrain.preemption.save_clock import SaveClock
from hf_cloudtrain.preemption.sources import Notice
from hf_cloudtrain.runtime.ranks import Ranks
from tests.faults.ranks import on_ranks


@pytest.fixture(autouse=True)
def _vote_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "INTERVAL_SECONDS", 0.0)


def test_with_short_steps_all_ranks_vote_only_now_and_then_and_at_the_same_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agreement, "INTERVAL_SECONDS", 1e9)
    voted: list[int] = []

    def train(ranks: Ranks) -> int:
        begin = ranks.begin_largest
        step = 0

        def count(values: list[float]) -> Any:
            if ranks.rank == 0:
                voted.append(step)
            return begin(values)

        ranks.begin_largest = count  # type: ignore[method-assign]
        preemption = Preemption(checkpointer_of(ranks))
        for step in range(1, 100):
            if step == 20 and ranks.rank == 1:
                preemption.receive(Notice("EC2", 50.0))
            if preemption.step_ended() is StopDecision.SAVE:
                return step
        return 0

    assert on_ranks(2, train, monkeypatch) == [50, 50]
    assert voted == [1, 2, 18, 34, 50]  # voted at 34, and known at 50


@pytest.mark.parametrize("notified", [0, 1, 2])
def test_all_ranks_decide_at_the_same_step_whichever_has_the_notice(
    monkeypatch: pytest.MonkeyPatch, notified: int
) -> None:
    def train(ranks: Ranks) -> tuple[int, float, str]:
        preemption = Preemption(checkpointer_of(ranks))
        for step in range(1, 10):
            if step == 4 and ranks.rank == notified:
                preemption.receive(Notice("EC2", 50.0))
            if preemption.step_ended() is StopDecision.SAVE:
                preemption.announce(step)
                return step, round(preemption.seconds_left()), preemption._reason()
        return 0, 0.0, ""

    # Voted at the end of step 4, and known at the end of the next one.
    assert on_ranks(3, train, monkeypatch) == [(5, 48, "EC2")] * 3


def test_with_long_steps_ranks_wait_for_the_result_and_decide_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agreement, "SLOW_STEP_SECONDS", 0.0)

    def train(ranks: Ranks) -> int:
        preemption = Preemption(checkpointer_of(ranks))
        for step in range(1, 10):
            if step == 4 and ranks.rank == 1:
                preemption.receive(Notice("EC2", 50.0))
            if preemption.step_ended() is StopDecision.SAVE:
                return step
        return 0

    assert on_ranks(2, train, monkeypatch) == [4, 4]


def test_the_time_between_vote_and_result_is_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None)
    for module in (agreement, preemption_module):
        monkeypatch.setattr(module, "time", clock)

    def train(ranks: Ranks) -> float:
        preemption = Preemption(checkpointer_of(ranks))
        if ranks.rank == 1:
            preemption.receive(Notice("EC2", 50.0))
        preemption.step_ended()
        ranks.barrier()
        now[0] = 1020.0  # a long save, say
        ranks.barrier()
        assert preemption.step_ended() is StopDecision.SAVE
        return preemption.seconds_left()

    assert on_ranks(2, train, monkeypatch) == [28.0, 28.0]


def test_all_ranks_save_by_time_at_the_same_step_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's clock counts."""

    class Due:
        def __init__(self, steps: list[int]) -> None:
            self.steps = steps

        def is_due(self) -> bool:
            return step in self.steps

    step = 0

    def train(ranks: Ranks) -> list[int]:
        nonlocal step
        preemption = Preemption(checkpointer_of(ranks))
        preemption.clock = Due([3, 7] if ranks.rank == 0 else [5])  # type: ignore[assignment]
        saved = []
        for number in range(1, 10):
            ranks.barrier()
            step = number
            ranks.barrier()
            if preemption.step_ended() is StopDecision.SAVE_DUE:
                saved.append(number)
        return saved

    assert on_ranks(2, train, monkeypatch) == [[4, 8]] * 2


def test_a_notice_counts_more_than_a_save_that_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(ranks: Ranks) -> StopDecision:
        preemption = Preemption(checkpointer_of(ranks))
        preemption.clock = SaveClock(1e-9)
        if ranks.rank == 1:
            preemption.receive(Notice("EC2", 50.0))
        return preemption.decide_now()

    assert on_ranks(2, train, monkeypatch) == [StopDecision.SAVE] * 2


def test_decide_now_waits_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(ranks: Ranks) -> list[StopDecision]:
        preemption = Preemption(checkpointer_of(ranks))
        decisions = [preemption.step_ended()]
        if ranks.rank == 1:
            preemption.receive(Notice("EC2", 50.0))
        return [*decisions, preemption.decide_now()]

    assert on_ranks(2, train, monkeypatch) == [[StopDecision.GO_ON, StopDecision.SAVE]] * 2


def test_a_rank_with_a_notice_does_not_wait_for_a_crashed_one(
    made: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent:
        def done(self) -> bool:
            return False

    monkeypatch.setattr(agreement, "PEER_SECONDS", 0.05)
    monkeypatch.setattr(made.ranks, "size", 2)
    monkeypatch.setattr(made.ranks, "begin_largest", lambda values: Silent())
    preemption = Preemption(made)
    assert preemption.step_ended() is StopDecision.GO_ON
    threading.Timer(
        0.1, preemption.receive, [Notice("SIGTERM", None)]
    ).start()  # while it waits for the other rank
    with pytest.raises(PeerError, match="assumed to have crashed"):
        preemption.step_ended()


def checkpointer_of(ranks: Ranks) -> Any:
    """As much of a Checkpointer as a decision needs."""
    return SimpleNamespace(ranks=ranks, overtaken_by=None, uploads=UploadStatus())
