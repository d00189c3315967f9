"""What a process does after a notice, how it leaves, and how much time it has."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.errors import OvertakenError, PreemptedError, PreemptedExit
from hf_cloudtrain.preemption import preemption as preemption_module
from hf_cloudtrain.preemption.agreement import StopDecision
from hf_cloudtrain.preemption.preemption import Preemption, check_no_pending_notice
from hf_cloudtrain.preemption.sources import Notice
from hf_cloudtrain.tracking.exit_record import record_end


def save(checkpointer: Checkpointer, step: int) -> None:
    folder = checkpointer.output_dir / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "model").write_bytes(b"weights")
    checkpointer.save(folder, Position(global_step=step))


def exit_record(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "exit.json").read_text())  # type: ignore[no-any-return]


class TestAlone:
    def test_without_a_notice_training_goes_on(self, made: Checkpointer) -> None:
        preemption = Preemption(made)
        preemption.start()
        assert [preemption.step_ended() for _ in range(3)] == [StopDecision.GO_ON] * 3
        preemption.close()

    def test_a_signal_takes_effect_at_the_end_of_the_step(self, made: Checkpointer) -> None:
        preemption = Preemption(made)
        preemption.start()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.step_ended() is StopDecision.SAVE
        preemption.close()

    def test_it_leaves_when_the_checkpoint_is_committed(self, made: Checkpointer, tmp_path: Path) -> None:
        preemption = Preemption(made)
        states: list[str] = []
        preemption.receive(Notice("a rebooting host", 20.0))
        save(made, 5)
        with pytest.raises(PreemptedExit) as left:
            preemption.leave(5, states.append)
        assert left.value.code == 75
        assert states == ["preempted"]
        assert [key.step for key in made.catalog.checkpoints()] == [5]
        assert exit_record(tmp_path)["reason"] == "a rebooting host"
        assert exit_record(tmp_path)["committed"] == "000001-0000000005"

    def test_it_leaves_when_the_time_is_up_and_names_what_is_not_on_storage(
        self, made: Checkpointer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert made.upload_queue is not None
        made.upload_queue.close()  # nothing is uploaded any more
        preemption = Preemption(made)
        preemption.receive(Notice("EC2", 0.5))
        save(made, 5)
        with pytest.raises(PreemptedExit):
            preemption.leave(5)
        assert "Training was stopped at step 5 (EC2). " in caplog.text
        assert "checkpoint-5" in caplog.text
        assert exit_record(tmp_path)["committed"] is None
        assert [entry.title for entry in made.outbox.entries()] == ["checkpoint-5"]

    def test_the_first_notice_counts_and_the_shortest_time(
        self, made: Checkpointer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(preemption_module, "time", SimpleNamespace(monotonic=lambda: 1000.0))
        preemption = Preemption(made)
        preemption.receive(Notice("EC2", 120.0))
        preemption.receive(Notice("SIGTERM", None))
        preemption.receive(Notice("a file", 60.0))
        assert (preemption._reason(), preemption.seconds_left()) == ("EC2", 28.0)

    def test_an_attempt_that_is_overtaken_while_it_leaves_reports_that(
        self, made: Checkpointer, tmp_path: Path
    ) -> None:
        preemption = Preemption(made)
        preemption.receive(Notice("EC2", 20.0))
        save(made, 5)
        made.wait()
        made.catalog.attempts.begin(0.0, 0, None, {})
        states: list[str] = []
        with pytest.raises(OvertakenError):
            preemption.leave(5, states.append)
        assert (states, exit_record(tmp_path)["outcome"]) == (["overtaken"], "overtaken")

    def test_a_heartbeat_that_cannot_be_stored_does_not_delay_it(
        self, made: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(preemption_module, "RESERVE_SECONDS", 0.1)
        preemption, hung = Preemption(made), threading.Event()
        preemption.receive(Notice("EC2", 20.0))
        save(made, 5)
        with pytest.raises(PreemptedExit):
            preemption.leave(5, lambda state: hung.wait(600) and None)
        hung.set()
        assert exit_record(tmp_path)["committed"] == "000001-0000000005"

    def test_storage_that_does_not_answer_does_not_delay_it(
        self, made: Checkpointer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        silent = threading.Event()
        monkeypatch.setattr(made, "_check_last_stored", lambda: silent.wait(600) and None)
        preemption = Preemption(made)
        preemption.receive(Notice("EC2", 0.5))
        save(made, 5)
        with pytest.raises(PreemptedExit):
            preemption.leave(5)
        silent.set()
        assert "does not answer whether the last checkpoint is there" in caplog.text

    def test_previous_handlers_receive_the_signal_after_the_save(self, made: Checkpointer) -> None:
        committed: list[list[int]] = []

        def before(number: int, frame: object) -> None:
            committed.append([key.step for key in made.catalog.checkpoints()])
            sys.exit(0)

        previous = signal.signal(signal.SIGTERM, before)
        try:
            preemption = Preemption(made)
            preemption.start()
            os.kill(os.getpid(), signal.SIGTERM)
            save(made, 5)
            with pytest.raises(PreemptedExit):
                preemption.leave(5)
            assert signal.getsignal(signal.SIGTERM) is before
        finally:
            signal.signal(signal.SIGTERM, previous)
        assert committed == [[5]]

    def test_in_a_notebook_it_raises_an_exception(
        self, made: Checkpointer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=object))
        preemption = Preemption(made)
        preemption.receive(Notice("EC2", 20.0))
        save(made, 5)
        with pytest.raises(PreemptedError, match="checkpoint-5 is on storage"):
            preemption.leave(5)

    def test_an_overtaken_attempt_quits_without_a_save(self, made: Checkpointer, tmp_path: Path) -> None:
        made.catalog.attempts.begin(0.0, 0, None, {})
        assert made.ownership is not None
        made.ownership.look()
        preemption = Preemption(made)
        preemption.receive(Notice("EC2", 20.0))
        assert preemption.step_ended() is StopDecision.QUIT
        with pytest.raises(OvertakenError):
            preemption.quit()
        assert exit_record(tmp_path)["outcome"] == "overtaken"

    def test_training_does_not_start_while_a_notice_is_pending(
        self, made: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check_no_pending_notice(made)
        stop = tmp_path / "stop"
        monkeypatch.setenv("HF_CLOUDTRAIN_STOP_FILE", str(stop))
        check_no_pending_notice(made)
        stop.touch()
        with pytest.raises(PreemptedExit):
            check_no_pending_notice(made)
        assert exit_record(tmp_path)["outcome"] == "preempted"
        assert str(stop) in exit_record(tmp_path)["reason"]

    def test_a_file_that_appears_is_a_notice(
        self, made: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_STOP_FILE", str(tmp_path / "stop"))
        preemption, received = Preemption(made), threading.Event()
        receive = preemption.receive
        monkeypatch.setattr(preemption, "receive", lambda notice: (receive(notice), received.set()))
        preemption.start()
        (tmp_path / "stop").touch()
        assert received.wait(30)
        assert preemption.step_ended() is StopDecision.SAVE
        preemption.close()


class TestTime:
    @pytest.mark.parametrize(
        ("notice", "argument", "variables", "seconds"),
        [
            (Notice("EC2", 120.0), 10.0, {}, 118.0),  # the notice's own time counts
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
    def test_it_is_what_the_notice_or_the_user_says_less_what_leaving_takes(
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
        monkeypatch.setattr(preemption_module, "time", SimpleNamespace(monotonic=lambda: 1000.0))
        preemption = Preemption(made, grace=argument)
        preemption.receive(notice)
        assert preemption.seconds_left() == pytest.approx(seconds)

    @pytest.mark.parametrize(
        ("pace", "save_seconds", "text"),
        [
            (None, 1.0, "It is not known yet how long"),
            (
                (100 * 10**6, 20e6),
                2.0,
                "100.0 MB at 20.0 MB/s take 5.0 s, so it should be on storage in time",
            ),
            ((60_000, 9e4), 2.0, "60.0 kB at 90.0 kB/s take 0.7 s, so it should be on storage in time"),
            ((10**9, 20e6), 2.0, "1.0 GB at 20.0 MB/s take 50.0 s, so it may not be on storage in time"),
        ],
    )
    def test_the_log_says_whether_the_upload_should_finish_in_time(
        self,
        made: Checkpointer,
        caplog: pytest.LogCaptureFixture,
        pace: tuple[int, float] | None,
        save_seconds: float,
        text: str,
    ) -> None:
        made.uploads.pace = pace
        preemption = Preemption(made)
        preemption.save_seconds = save_seconds
        preemption.receive(Notice("SIGTERM", None))
        preemption.announce(7)
        assert "SIGTERM: saving at step 7, with 28 s left." in caplog.text
        assert text in caplog.text


def test_the_exit_file_is_written_atomically_and_an_error_does_not_stop_the_process(
    made: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record_end(made, "stopped", "why")
    assert (exit_record(tmp_path)["outcome"], exit_record(tmp_path)["saved"]) == ("stopped", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exit.json", "out", "run"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_CLOUDTRAIN_EXIT_FILE", str(tmp_path / "file" / "exit.json"))
    record_end(made, "finished")
    assert "Cannot write the exit file" in caplog.text
