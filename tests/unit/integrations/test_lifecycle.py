"""One lifecycle a run and folder, and one attempt after another in it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.attempt_checks import Advice
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import Manifest, Position
from hf_cloudtrain.errors import NotCommittedError, OvertakenError, PreemptedExit
from hf_cloudtrain.integrations import lifecycle as lifecycle_module
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle
from hf_cloudtrain.preemption.sources import Notice
from hf_cloudtrain.resume.topology import Conversion, Epoch
from tests.faults.runs import wait_until


@pytest.fixture
def lifecycle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AttemptLifecycle]:
    monkeypatch.setenv("HF_CLOUDTRAIN_EXIT_FILE", str(tmp_path / "exit.json"))
    monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", "0.02")
    lifecycle = AttemptLifecycle.of(str(tmp_path / "run"), tmp_path / "out")
    yield lifecycle
    lifecycle.stop_listening()
    lifecycle.close()


def save(lifecycle: AttemptLifecycle, step: int) -> None:
    folder = lifecycle.checkpointer.output_dir / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "model").write_bytes(b"weights")
    lifecycle.checkpointer.save(folder, Position(global_step=step))


def recorded(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "exit.json").read_text())  # type: ignore[no-any-return]


def states(lifecycle: AttemptLifecycle) -> list[Any]:
    catalog = lifecycle.checkpointer.catalog
    return [
        (catalog.attempts.read_progress(number) or {}).get("state") for number in catalog.attempts.numbers()
    ]


class TestRegistry:
    @pytest.fixture
    def waited(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Folders whose uploads were waited for."""
        found: list[str] = []
        monkeypatch.setattr(Checkpointer, "finish_uploads", lambda self: found.append(self.output_dir.name))
        return found

    def test_a_training_in_a_different_folder_waits_for_the_uploads_of_the_first(
        self, tmp_path: Path, waited: list[str]
    ) -> None:
        for run, name in (("run", "one"), ("run", "one"), ("other", "three"), ("run", "two")):
            found = AttemptLifecycle.of(str(tmp_path / run), tmp_path / name)
            assert found.checkpointer.output_dir == tmp_path / name
        assert waited == ["one"]

    def test_the_same_run_folder_and_options_are_one_checkpointer(
        self, tmp_path: Path, waited: list[str]
    ) -> None:
        url, folder = str(tmp_path / "run"), tmp_path / "out"
        first = AttemptLifecycle.of(url, folder, fresh=False)
        assert AttemptLifecycle.of(url, folder, fresh=False) is first
        assert AttemptLifecycle.of(url, folder, fresh=True) is not first
        assert AttemptLifecycle.of(url, folder, fresh=False, advice=Advice("Restore.", "Save.")) is not first

    def test_a_new_training_does_not_count_what_an_earlier_one_restored(
        self, lifecycle: AttemptLifecycle, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        lifecycle.begin(0)
        save(lifecycle, 4)
        lifecycle.finish()
        assert lifecycle.restore() is not None
        lifecycle.begin(4)
        save(lifecycle, 8)
        lifecycle.finish()
        assert AttemptLifecycle.of(str(tmp_path / "run"), tmp_path / "out") is lifecycle
        lifecycle.begin(4)
        assert "resumes at step 4, but the newest checkpoint" in caplog.text

    def test_a_closed_one_is_forgotten(self, tmp_path: Path) -> None:
        first = AttemptLifecycle.of(str(tmp_path / "run"), tmp_path / "out")
        first.close()
        assert first not in lifecycle_module._lifecycles.values()
        assert AttemptLifecycle.of(str(tmp_path / "run"), tmp_path / "out") is not first

    def test_a_new_attempt_removes_the_exit_file_of_the_last_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_EXIT_FILE", str(tmp_path / "exit.json"))
        (tmp_path / "exit.json").write_text("{}")
        AttemptLifecycle.of(str(tmp_path / "run"), tmp_path / "out")
        assert not (tmp_path / "exit.json").exists()


class TestRestore:
    def test_a_first_start_has_nothing_to_restore(self, lifecycle: AttemptLifecycle) -> None:
        assert lifecycle.restore() is None

    def test_a_converted_checkpoint_has_a_folder_of_its_new_number(self, lifecycle: AttemptLifecycle) -> None:
        lifecycle.begin(0)
        save(lifecycle, 4)
        lifecycle.finish()
        now = Position(global_step=0)

        def plan(manifest: Manifest) -> Conversion:
            return Conversion(manifest.position, now, Epoch(8, 8, 1), Epoch(8, 4, 2), 2, manifest.folder)

        found = lifecycle.restore(plan=plan)
        assert found is not None
        restored, conversion = found
        assert restored.path.name == "checkpoint-2.a1-4"
        assert conversion is not None
        assert conversion.global_step == 2


class TestAnAttempt:
    def test_that_ends_is_recorded_in_the_exit_file_and_the_heartbeat(
        self, lifecycle: AttemptLifecycle, tmp_path: Path
    ) -> None:
        lifecycle.begin(0, total=4)
        lifecycle.listen()
        save(lifecycle, 4)
        lifecycle.finish()
        assert (recorded(tmp_path)["outcome"], recorded(tmp_path)["committed"]) == (
            "finished",
            "000001-0000000004",
        )
        assert states(lifecycle) == ["finished"]
        assert lifecycle.preemption is None

    def test_that_saved_nothing_has_failed(self, lifecycle: AttemptLifecycle, tmp_path: Path) -> None:
        before = signal.getsignal(signal.SIGTERM)
        lifecycle.begin(0, total=4)
        lifecycle.listen()
        with pytest.raises(NotCommittedError):
            lifecycle.finish()
        assert recorded(tmp_path)["outcome"] == "failed"
        assert "without saving any checkpoint" in recorded(tmp_path)["reason"]
        assert states(lifecycle) == ["failed"]
        assert signal.getsignal(signal.SIGTERM) is before

    def test_that_tracks_steps_alone_needs_no_checkpoint(
        self, lifecycle: AttemptLifecycle, tmp_path: Path
    ) -> None:
        lifecycle.begin(0)
        lifecycle.finish(uploads=False)
        assert recorded(tmp_path)["outcome"] == "finished"

    def test_that_an_exception_interrupted_ends_when_the_next_one_begins(
        self, lifecycle: AttemptLifecycle
    ) -> None:
        before = signal.getsignal(signal.SIGTERM)
        lifecycle.begin(0, total=4)
        lifecycle.listen()
        first = lifecycle.tracker
        lifecycle.begin(0, started_over=True, interrupted="failed")
        assert lifecycle.tracker is not first
        assert signal.getsignal(signal.SIGTERM) is before
        lifecycle.interrupt(lifecycle.checkpointer.attempt)
        assert states(lifecycle) == ["failed", "stopped"]

    def test_that_an_exception_interrupted_ends_when_the_next_one_begins_in_a_different_folder(
        self, lifecycle: AttemptLifecycle, tmp_path: Path
    ) -> None:
        before = signal.getsignal(signal.SIGTERM)
        lifecycle.begin(0, total=4)
        lifecycle.listen()
        other = AttemptLifecycle.of(str(tmp_path / "run"), tmp_path / "other")
        other.begin(0, started_over=True, interrupted="failed")
        assert (lifecycle.tracker, lifecycle.preemption) == (None, None)
        assert states(lifecycle)[0] == "failed"
        assert signal.getsignal(signal.SIGTERM) is before
        other.close()

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no space")])
    def test_that_cannot_begin_to_train_ends_at_once_because_a_notebook_lives_on(
        self, lifecycle: AttemptLifecycle, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        def fails(*_: object) -> None:
            raise error

        monkeypatch.setattr(lifecycle.checkpointer.local, "begin", fails)
        with pytest.raises(type(error)):
            lifecycle.begin(0, total=4)
        assert lifecycle.tracker is None
        assert states(lifecycle) == ["stopped" if isinstance(error, KeyboardInterrupt) else "failed"]

    def test_tracks_no_steps_where_no_callback_does(self, lifecycle: AttemptLifecycle) -> None:
        lifecycle.begin(0, total=4, tracks=False)
        assert lifecycle.tracker is None

    def test_listens_once(self, lifecycle: AttemptLifecycle) -> None:
        before = signal.getsignal(signal.SIGTERM)
        lifecycle.begin(0)
        lifecycle.listen()
        lifecycle.listen()
        lifecycle.stop_listening()
        assert signal.getsignal(signal.SIGTERM) is before

    def test_is_not_stopped_by_the_late_end_of_an_earlier_one(self, lifecycle: AttemptLifecycle) -> None:
        earlier = lifecycle.begin(0)
        lifecycle.begin(0, started_over=True)
        lifecycle.listen()
        lifecycle.interrupt(earlier)
        assert lifecycle.preemption is not None

    def test_does_not_begin_while_a_notice_is_pending_unless_it_does_not_check(
        self, lifecycle: AttemptLifecycle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_STOP_FILE", str(tmp_path))
        with pytest.raises(PreemptedExit):
            lifecycle.begin(0)
        assert lifecycle.begin(0, check_notices=False).number == 1


class TestANotice:
    def test_leads_to_one_decision_and_the_way_out(self, lifecycle: AttemptLifecycle, tmp_path: Path) -> None:
        lifecycle.begin(0, total=4)
        assert not lifecycle.must_stop(), "nothing waits for notices yet"
        lifecycle.listen()
        assert not lifecycle.must_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert lifecycle.must_stop()
        lifecycle.announce(2)
        assert lifecycle.is_leaving
        assert not lifecycle.must_stop(), "the decision is taken"
        save(lifecycle, 2)
        with pytest.raises(PreemptedExit):
            lifecycle.leave(2)
        assert (recorded(tmp_path)["outcome"], recorded(tmp_path)["reason"]) == ("preempted", "SIGTERM")
        assert states(lifecycle) == ["preempted"]

    def test_of_a_newer_attempt_ends_the_old_one_without_a_save(
        self, lifecycle: AttemptLifecycle, tmp_path: Path
    ) -> None:
        lifecycle.begin(0)
        lifecycle.listen()
        assert lifecycle.preemption is not None
        lifecycle.preemption.receive(Notice("EC2", 20.0))
        lifecycle.checkpointer.catalog.attempts.begin(0.0, 0, None, {})
        wait_until(lambda: lifecycle.checkpointer.overtaken_by, "the look")
        with pytest.raises(OvertakenError):
            lifecycle.must_stop()
        assert recorded(tmp_path)["outcome"] == "overtaken"
