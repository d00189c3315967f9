"""Who is told, what all ranks do about it, and how much time there is."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.errors import OvertakenError, PeerError, PreemptedError, PreemptedExit
from hf_cloudtrain.preemption import agreement
from hf_cloudtrain.preemption.agreement import Preemption, StopDecision, check_no_pending_notice
from hf_cloudtrain.preemption.sources import Notice
from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.tracking.exit_record import record_end
from tests.faults.ranks import on_ranks


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkpointer]:
    monkeypatch.setenv("HF_CLOUDTRAIN_EXIT_FILE", str(tmp_path / "exit.json"))
    checkpointer = Checkpointer(str(tmp_path / "run"), tmp_path / "out")
    checkpointer.begin(0)
    yield checkpointer
    checkpointer.close()


def save(checkpointer: Checkpointer, step: int) -> None:
    folder = checkpointer.output_dir / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "model").write_bytes(b"weights")
    checkpointer.save(folder, Position(global_step=step))


def said(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "exit.json").read_text())  # type: ignore[no-any-return]


class TestAlone:
    def test_without_a_notice_training_goes_on(self, made: Checkpointer) -> None:
        listening = Preemption(made)
        listening.start()
        assert [listening.step_ended() for _ in range(3)] == [StopDecision.GO_ON] * 3
        listening.close()

    def test_a_signal_is_obeyed_at_the_end_of_the_step(self, made: Checkpointer) -> None:
        listening = Preemption(made)
        listening.start()
        os.kill(os.getpid(), signal.SIGTERM)
        assert listening.step_ended() is StopDecision.SAVE
        listening.close()

    def test_it_leaves_when_the_checkpoint_is_committed(self, made: Checkpointer, tmp_path: Path) -> None:
        listening = Preemption(made)
        states: list[str] = []
        listening.hear(Notice("a rebooting host", 20.0))
        save(made, 5)
        with pytest.raises(PreemptedExit) as left:
            listening.leave(5, states.append)
        assert left.value.code == 75
        assert states == ["preempted"]
        assert [key.step for key in made.catalog.checkpoints()] == [5]
        assert said(tmp_path)["reason"] == "a rebooting host"
        assert said(tmp_path)["committed"] == "000001-0000000005"

    def test_it_leaves_when_the_time_is_up_and_names_what_is_missing(
        self, made: Checkpointer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert made._upload_queue is not None
        made._upload_queue.close()  # nothing is sent any more
        listening = Preemption(made)
        listening.hear(Notice("EC2", 0.5))
        save(made, 5)
        with pytest.raises(PreemptedExit):
            listening.leave(5)
        assert "Training was stopped at step 5 (EC2). " in caplog.text
        assert "checkpoint-5" in caplog.text
        assert said(tmp_path)["committed"] is None
        assert [entry.title for entry in made.outbox.entries()] == ["checkpoint-5"]

    def test_the_first_notice_counts_and_the_shortest_time(
        self, made: Checkpointer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(agreement, "time", SimpleNamespace(monotonic=lambda: 1000.0))
        listening = Preemption(made)
        listening.hear(Notice("EC2", 120.0))
        listening.hear(Notice("SIGTERM", None))
        listening.hear(Notice("a file", 60.0))
        assert (listening._reason(), listening.seconds_left()) == ("EC2", 28.0)

    def test_overtaken_while_it_leaves_it_says_so(self, made: Checkpointer, tmp_path: Path) -> None:
        listening = Preemption(made)
        listening.hear(Notice("EC2", 20.0))
        save(made, 5)
        made.wait()
        made.catalog.begin_attempt(0.0, 0, None, {})
        states: list[str] = []
        with pytest.raises(OvertakenError):
            listening.leave(5, states.append)
        assert (states, said(tmp_path)["outcome"]) == (["overtaken"], "overtaken")

    def test_a_heartbeat_that_cannot_be_stored_does_not_keep_it(
        self, made: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(agreement, "RESERVE_SECONDS", 0.1)
        listening, hung = Preemption(made), threading.Event()
        listening.hear(Notice("EC2", 20.0))
        save(made, 5)
        with pytest.raises(PreemptedExit):
            listening.leave(5, lambda state: hung.wait(600) and None)
        hung.set()
        assert said(tmp_path)["committed"] == "000001-0000000005"

    def test_a_storage_that_is_silent_does_not_keep_it(
        self, made: Checkpointer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        silent = threading.Event()
        monkeypatch.setattr(made, "_check_last_checkpoint_stored", lambda: silent.wait(600) and None)
        listening = Preemption(made)
        listening.hear(Notice("EC2", 0.5))
        save(made, 5)
        with pytest.raises(PreemptedExit):
            listening.leave(5)
        silent.set()
        assert "does not answer whether the last checkpoint is there" in caplog.text

    def test_handlers_that_were_there_before_hear_it_after_the_save(self, made: Checkpointer) -> None:
        heard: list[list[int]] = []

        def before(number: int, frame: object) -> None:
            heard.append([key.step for key in made.catalog.checkpoints()])
            sys.exit(0)

        there = signal.signal(signal.SIGTERM, before)
        try:
            listening = Preemption(made)
            listening.start()
            os.kill(os.getpid(), signal.SIGTERM)
            save(made, 5)
            with pytest.raises(PreemptedExit):
                listening.leave(5)
            assert signal.getsignal(signal.SIGTERM) is before
        finally:
            signal.signal(signal.SIGTERM, there)
        assert heard == [[5]]

    def test_in_a_notebook_it_is_an_exception(
        self, made: Checkpointer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=object))
        listening = Preemption(made)
        listening.hear(Notice("EC2", 20.0))
        save(made, 5)
        with pytest.raises(PreemptedError, match="checkpoint-5 is on storage"):
            listening.leave(5)

    def test_an_overtaken_attempt_quits_without_a_save(self, made: Checkpointer, tmp_path: Path) -> None:
        made.catalog.begin_attempt(0.0, 0, None, {})
        assert made._ownership is not None
        made._ownership.look()
        listening = Preemption(made)
        listening.hear(Notice("EC2", 20.0))
        assert listening.step_ended() is StopDecision.QUIT
        with pytest.raises(OvertakenError):
            listening.quit()
        assert said(tmp_path)["outcome"] == "overtaken"

    def test_while_a_notice_is_pending_nothing_begins(
        self, made: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check_no_pending_notice(made)
        stop = tmp_path / "stop"
        monkeypatch.setenv("HF_CLOUDTRAIN_STOP_FILE", str(stop))
        check_no_pending_notice(made)
        stop.touch()
        with pytest.raises(PreemptedExit):
            check_no_pending_notice(made)
        assert said(tmp_path)["outcome"] == "preempted"
        assert str(stop) in said(tmp_path)["reason"]

    def test_a_file_that_appears_is_a_notice(
        self, made: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_STOP_FILE", str(tmp_path / "stop"))
        listening, heard = Preemption(made), threading.Event()
        hear = listening.hear
        monkeypatch.setattr(listening, "hear", lambda notice: (hear(notice), heard.set()))
        listening.start()
        (tmp_path / "stop").touch()
        assert heard.wait(30)
        assert listening.step_ended() is StopDecision.SAVE
        listening.close()


class TestTime:
    @pytest.mark.parametrize(
        ("notice", "argument", "variables", "seconds"),
        [
            (Notice("EC2", 120.0), 10.0, {}, 118.0),  # the notice knows best
            (Notice("SIGTERM", None), None, {}, 28.0),
            (Notice("SIGTERM", None), 100.0, {}, 98.0),
            (Notice("SIGTERM", None), None, {"HF_CLOUDTRAIN_GRACE": "60"}, 58.0),
            (Notice("SIGTERM", None), 100.0, {"TORCHELASTIC_RUN_ID": "x"}, 28.0),
            (
                Notice("SIGTERM", None),
                100.0,
                {"TORCHELASTIC_RUN_ID": "x", "PET_SHUTDOWN_TIMEOUT": "50"},
                48.0,
            ),
            (Notice("a file", None), 100.0, {"TORCHELASTIC_RUN_ID": "x"}, 98.0),  # no launcher kills for that
            (Notice("SIGTERM", None), 5.0, {}, 4.5),
        ],
    )
    def test_there_is_as_much_as_was_said_less_what_leaving_takes(
        self,
        made: Checkpointer,
        monkeypatch: pytest.MonkeyPatch,
        notice: Notice,
        argument: float | None,
        variables: dict[str, str],
        seconds: float,
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(agreement, "time", SimpleNamespace(monotonic=lambda: 1000.0))
        listening = Preemption(made, grace=argument)
        listening.hear(notice)
        assert listening.seconds_left() == pytest.approx(seconds)

    @pytest.mark.parametrize(
        ("pace", "save_seconds", "words"),
        [
            (None, 1.0, "is not known yet"),
            ((100 * 10**6, 20e6), 2.0, "100 MB at 20 MB/s take 5.0 s, so it should be on storage in time"),
            ((10**9, 20e6), 2.0, "1000 MB at 20 MB/s take 50.0 s, so it may not be on storage in time"),
        ],
    )
    def test_the_log_says_what_will_be_on_storage_in_time(
        self,
        made: Checkpointer,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        pace: tuple[int, float] | None,
        save_seconds: float,
        words: str,
    ) -> None:
        monkeypatch.setattr(Checkpointer, "upload_pace", property(lambda self: pace))
        listening = Preemption(made)
        listening.save_seconds = save_seconds
        listening.hear(Notice("SIGTERM", None))
        listening.announce(7)
        assert "SIGTERM: saving at step 7, with 28 s left." in caplog.text
        assert words in caplog.text


class TestRanks:
    @pytest.fixture(autouse=True)
    def _at_each_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(agreement, "INTERVAL_SECONDS", 0.0)

    def test_short_steps_ask_once_in_a_while_and_all_ranks_at_the_same_ones(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(agreement, "INTERVAL_SECONDS", 1e9)
        asked: list[int] = []

        def train(ranks: Ranks) -> int:
            begin = ranks.begin_largest
            step = 0

            def count(values: list[float]) -> Any:
                if ranks.rank == 0:
                    asked.append(step)
                return begin(values)

            ranks.begin_largest = count  # type: ignore[method-assign]
            listening = Preemption(checkpointer_of(ranks))
            for step in range(1, 100):
                if step == 20 and ranks.rank == 1:
                    listening.hear(Notice("EC2", 50.0))
                if listening.step_ended() is StopDecision.SAVE:
                    return step
            return 0

        assert on_ranks(2, train, monkeypatch) == [50, 50]
        assert asked == [1, 2, 18, 34, 50]  # it is said at 34, and heard at 50

    @pytest.mark.parametrize("told", [0, 1, 2])
    def test_all_hear_it_at_the_same_step_whoever_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int
    ) -> None:
        def train(ranks: Ranks) -> tuple[int, float, str]:
            listening = Preemption(checkpointer_of(ranks))
            for step in range(1, 10):
                if step == 4 and ranks.rank == told:
                    listening.hear(Notice("EC2", 50.0))
                if listening.step_ended() is StopDecision.SAVE:
                    listening.announce(step)
                    return step, round(listening.seconds_left()), listening._reason()
            return 0, 0.0, ""

        # Said at the end of step 4, and heard at the end of the one after.
        assert on_ranks(3, train, monkeypatch) == [(5, 48, "EC2")] * 3

    def test_where_steps_are_long_they_wait_and_hear_it_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(agreement, "SLOW_STEP_SECONDS", 0.0)

        def train(ranks: Ranks) -> int:
            listening = Preemption(checkpointer_of(ranks))
            for step in range(1, 10):
                if step == 4 and ranks.rank == 1:
                    listening.hear(Notice("EC2", 50.0))
                if listening.step_ended() is StopDecision.SAVE:
                    return step
            return 0

        assert on_ranks(2, train, monkeypatch) == [4, 4]

    def test_the_time_that_the_answer_took_is_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [1000.0]
        monkeypatch.setattr(
            agreement, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None)
        )

        def train(ranks: Ranks) -> float:
            listening = Preemption(checkpointer_of(ranks))
            if ranks.rank == 1:
                listening.hear(Notice("EC2", 50.0))
            listening.step_ended()
            ranks.barrier()
            now[0] = 1020.0  # a long save, say
            ranks.barrier()
            assert listening.step_ended() is StopDecision.SAVE
            return listening.seconds_left()

        assert on_ranks(2, train, monkeypatch) == [28.0, 28.0]

    def test_asked_to_they_wait_for_each_other(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def train(ranks: Ranks) -> list[StopDecision]:
            listening = Preemption(checkpointer_of(ranks))
            heard = [listening.step_ended()]
            if ranks.rank == 1:
                listening.hear(Notice("EC2", 50.0))
            return [*heard, listening.ask_now()]

        assert on_ranks(2, train, monkeypatch) == [[StopDecision.GO_ON, StopDecision.SAVE]] * 2

    def test_a_rank_that_was_told_does_not_wait_for_a_dead_one(
        self, made: Checkpointer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Silent:
            def is_there(self) -> bool:
                return False

        monkeypatch.setattr(agreement, "PEER_SECONDS", 0.05)
        monkeypatch.setattr(made.ranks, "size", 2)
        monkeypatch.setattr(made.ranks, "begin_largest", lambda values: Silent())
        listening = Preemption(made)
        assert listening.step_ended() is StopDecision.GO_ON
        threading.Timer(
            0.1, listening.hear, [Notice("SIGTERM", None)]
        ).start()  # while it waits for the other
        with pytest.raises(PeerError, match="taken for dead"):
            listening.step_ended()


def test_the_exit_file_appears_in_one_piece_and_trouble_with_it_ends_nothing(
    made: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record_end(made, "stopped", "why")
    assert (said(tmp_path)["outcome"], said(tmp_path)["saved"]) == ("stopped", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exit.json", "out", "run"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_CLOUDTRAIN_EXIT_FILE", str(tmp_path / "file" / "exit.json"))
    record_end(made, "finished")
    assert "could not be written" in caplog.text


def checkpointer_of(ranks: Ranks) -> Any:
    """As much of one as listening needs."""
    return SimpleNamespace(ranks=ranks, overtaken_by=None, upload_pace=None)
