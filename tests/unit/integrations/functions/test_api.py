"""The function API in one process: the order of calls, what is stored, and the messages."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hf_cloudtrain as ct
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.errors import (
    ConfigurationError,
    NotCommittedError,
    OvertakenError,
    RunCompleteError,
    RunHasCheckpointsError,
)
from hf_cloudtrain.integrations.functions import api
from hf_cloudtrain.tracking import tracker
from tests.faults.runs import DEADLINE, Machines, contents, left_overs, wait_until, write_files

LARGE = 3 * 2**20
"""Bytes of a file that would be linked, if anything were."""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def begin(machines: Machines, tmp_path: Path) -> Callable[..., Path]:
    """`init` on a machine; gives its checkpoint folder."""

    def init(total: int | None = 1_000, name: str = "ckpt", **options: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        ct.init(total, machines.storage.url, folder, **options)
        return folder

    return init


def steps(count: int = 1) -> None:
    for _ in range(count):
        with ct.train_step():
            pass


def bytes_at(step: int) -> bytes:
    return f"step {step} ".encode() * (LARGE // 16)


def save(folder: Path, step: int | None = None) -> None:
    """As torch.save does: the same path again and again, written in place."""
    write_files(folder, {"checkpoint.pt": bytes_at(ct.processed_steps() if step is None else step)})


def trained(begin: Callable[..., Path], until: int, every: int = 1, **options: Any) -> Path:
    """A run that was killed after it committed a checkpoint of step `until`."""
    folder = begin(**options)
    for step in range(1, until + 1):
        steps()
        if step % every == 0:
            save(folder)
            ct.upload_checkpoint()
    end_of_process()
    return folder


def end_of_process() -> None:
    assert api._Current.run is not None
    api._Current.run.close()
    api._Current.run = None


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(machines: Machines) -> list[dict[str, Any]]:
    lines = [line for path in sorted(machines.run.glob(".cloudtrain/steps/*")) for line in lines_of(path)]
    return [line for line in lines if line["kind"] == "log"]


def states(machines: Machines) -> list[str]:
    return [
        json.loads(path.read_text())["state"] for path in sorted(machines.run.glob(".cloudtrain/progress/*"))
    ]


class TestOrder:
    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("restore", ()),
            ("start_step", ()),
            ("end_step", ()),
            ("upload_checkpoint", ()),
            ("metric", ({},)),
            ("is_emergency_save", ()),
            ("processed_steps", ()),
        ],
    )
    def test_before_init_every_function_says_to_call_it(self, name: str, arguments: tuple[Any, ...]) -> None:
        with pytest.raises(ConfigurationError, match=rf"Call hf_cloudtrain\.init\(.*before {name}\(\)"):
            getattr(ct, name)(*arguments)

    def test_before_init_the_context_manager_says_so_too(self) -> None:
        with pytest.raises(ConfigurationError, match=r"before train_step\(\)"), ct.train_step():
            pass

    def test_the_max_steps_of_trainer_may_be_passed_as_it_is_in_local_mode(self, tmp_path: Path) -> None:
        """PeriFlow's example of Trainer does, and -1 is what `max_steps` is unless it is set."""
        ct.init(-1)
        with ct.train_step():
            pass
        assert ct.processed_steps() == 1
        with pytest.raises(ConfigurationError, match="Trainer's max_steps is -1"):
            ct.init(-1, run_url=str(tmp_path / "run"), checkpoint_dir=tmp_path)

    def test_periflows_variable_names_the_checkpoint_folder_if_nothing_else_does(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CKPT_DIR", str(tmp_path / "ckpt"))
        monkeypatch.setenv("HF_CLOUDTRAIN_RUN_URL", str(tmp_path / "run"))
        ct.init(5)
        save(tmp_path / "ckpt", 0)
        with ct.train_step():
            pass
        ct.upload_checkpoint()
        end_of_process()
        assert (tmp_path / "run" / "checkpoint-1" / "checkpoint.pt").exists()

    def test_a_step_is_done_when_it_ends(self) -> None:
        ct.init(10)
        assert ct.processed_steps() == 0
        ct.start_step()
        assert ct.processed_steps() == 0
        ct.end_step()
        with ct.train_step():
            assert ct.processed_steps() == 1
        assert ct.processed_steps() == 2

    def test_a_step_that_raises_does_not_count_and_a_new_one_may_start(self) -> None:
        ct.init(10)
        with pytest.raises(KeyError), ct.train_step():
            raise KeyError("batch")
        assert ct.processed_steps() == 0
        steps()
        assert ct.processed_steps() == 1

    def test_a_step_started_twice(self) -> None:
        ct.init(10)
        steps(3)
        ct.start_step()
        with pytest.raises(
            ConfigurationError, match=r"start_step\(\) was called twice: step 4 has not ended"
        ):
            ct.start_step()
        ct.end_step()
        assert ct.processed_steps() == 4

    def test_a_step_ended_without_a_start(self) -> None:
        ct.init(10)
        with pytest.raises(ConfigurationError, match=r"end_step\(\) was called without start_step\(\)"):
            ct.end_step()
        assert ct.processed_steps() == 0

    @pytest.mark.parametrize("total", [0, -2, 1.5, "10", True])
    def test_a_total_must_be_a_positive_integer(self, total: Any) -> None:
        with pytest.raises(ConfigurationError, match="must be a positive integer, or None if unknown"):
            ct.init(total)

    def test_a_total_may_be_a_numpy_integer_or_none(self) -> None:
        numpy = pytest.importorskip("numpy")
        ct.init(numpy.int64(10))
        ct.init(None)
        steps(20)
        assert ct.processed_steps() == 20

    def test_without_a_notice_no_emergency_save_is_due(self) -> None:
        ct.init(10)
        assert ct.is_emergency_save() is False


class TestLocalMode:
    def test_metrics_are_json_lines_with_step_and_rank(self, tmp_path: Path) -> None:
        ct.init(10, local_log_name=tmp_path / "log.jsonl")
        ct.metric({"stage": "before"})
        with ct.train_step():
            ct.metric({"loss": 0.5, "step": 77})
        ct.metric({"loss": float("nan"), "folder": tmp_path})
        assert lines_of(tmp_path / "log.jsonl") == [
            {"step": 0, "rank": 0, "stage": "before"},
            {"step": 77, "rank": 0, "loss": 0.5},
            {"step": 1, "rank": 0, "loss": None, "folder": str(tmp_path)},
        ]

    def test_metrics_that_json_cannot_hold_do_not_end_the_training(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        circle: list[Any] = []
        circle.append(circle)
        ct.init(10, local_log_name=tmp_path / "log.jsonl")
        for _ in range(2):
            ct.metric({"circle": circle})
        ct.metric({("a", 1): "caf\udce9", "nested": [float("inf")]})
        assert lines_of(tmp_path / "log.jsonl") == [
            {"step": 0, "rank": 0, "('a', 1)": "caf\udce9", "nested": [None]},
        ]
        assert caplog.text.count("are not written to") == 1

    def test_the_log_has_a_name_of_its_own_for_each_rank(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ct.init(10)
        ct.metric({"loss": 1})
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        ct.init(10)
        ct.metric({"loss": 2})
        alone, of_two = sorted(tmp_path.glob("hf_cloudtrain_*.log"), key=lambda path: path.name.count("_"))
        assert lines_of(alone) == [{"step": 0, "rank": 0, "loss": 1}]
        assert of_two.name.endswith("_1.log")
        assert lines_of(of_two) == [{"step": 0, "rank": 1, "loss": 2}]

    def test_one_warning_says_that_nothing_is_uploaded(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        ct.init(2, checkpoint_dir=tmp_path / "ckpt")
        assert ct.restore() is None
        steps(2)
        ct.upload_checkpoint()
        ct.upload_checkpoint()
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 1
        assert "upload_checkpoint() and restore() do nothing" in messages[0]
        assert "HF_CLOUDTRAIN_RUN_URL" in messages[0]
        assert list(tmp_path.iterdir()) == []

    def test_no_torch_is_imported(self) -> None:
        assert "torch" not in imported_by(
            "ct.init(3, local_log_name='x'); ct.start_step(); ct.metric({'a': 1})"
        )


class TestTensors:
    def test_they_are_read_every_ten_calls_and_in_order(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        ct.init(100, local_log_name=tmp_path / "log")
        running = torch.zeros((), requires_grad=True) * 2
        for number in range(10):
            assert not (tmp_path / "log").exists()
            ct.metric({"number": number, "sum": running})
            running = running.detach()
            running += 1  # in place, as running losses are
        assert [(line["number"], line["sum"]) for line in lines_of(tmp_path / "log")] == [
            (number, float(number)) for number in range(10)
        ]

    def test_the_last_ones_are_written_at_the_end(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        ct.init(100, local_log_name=tmp_path / "log")
        ct.metric({"loss": torch.tensor([1.5])})
        ct.metric({"loss": 2})
        end_of_process()
        assert [line["loss"] for line in lines_of(tmp_path / "log")] == [1.5, 2]

    def test_one_of_several_values_is_refused_by_name(self) -> None:
        torch = pytest.importorskip("torch")
        ct.init(100)
        with pytest.raises(ConfigurationError, match=r"'losses' is a tensor of shape \(3,\)"):
            ct.metric({"losses": torch.zeros(3)})


class TestUploads:
    def test_law_3_ten_saves_to_one_path_during_a_slow_upload_commit_their_own_steps(
        self, begin: Callable[..., Path], machines: Machines
    ) -> None:
        folder = begin(10)
        machines.storage.hold("upload", machines.gate, path="checkpoint-*")
        for _ in range(9):
            steps()
            save(folder)
            ct.upload_checkpoint()
        assert not machines.catalog.checkpoints()
        assert len(Outbox(folder).entries()) <= 3, "one under way, the newest, and one on its way out"
        machines.gate.set()
        steps()
        save(folder)
        ct.upload_checkpoint()
        committed = machines.committed()
        assert (1, 10) in committed
        assert 2 <= len(committed) < 10
        for attempt, step in committed:
            manifest = machines.catalog.read(CheckpointKey(attempt, step))
            assert contents(machines.run / manifest.folder) == {"checkpoint.pt": bytes_at(step)}

    def test_what_is_uploaded_is_what_was_there_when_it_was_called(
        self, begin: Callable[..., Path], machines: Machines
    ) -> None:
        folder = begin(2)
        machines.storage.hold("upload", machines.gate, path="checkpoint-1/*")
        steps()
        save(folder)
        ct.upload_checkpoint()
        with open(folder / "checkpoint.pt", "r+b") as file:
            file.write(b"rewritten in place")
        machines.gate.set()
        wait_until(machines.catalog.checkpoints, "the commit")
        assert contents(machines.run / "checkpoint-1") == {"checkpoint.pt": bytes_at(1)}

    def test_our_own_folder_and_temporary_files_are_not_uploaded(
        self, begin: Callable[..., Path], machines: Machines
    ) -> None:
        folder = begin(1)
        write_files(
            folder, {"a/model.bin": b"1", "x.tmp": b"", ".tmp123": b"", "tmpab12cd_3": b"", "b~": b""}
        )
        write_files(folder, {"a/y.part": b"", "tmp_of_mine.txt": b"2", "a/.cloudtrain": b"3"})
        steps()
        ct.upload_checkpoint()
        assert set(contents(machines.run / "checkpoint-1")) == {
            "a/model.bin",
            "tmp_of_mine.txt",
            "a/.cloudtrain",
        }

    def test_the_upload_of_the_last_step_returns_when_it_is_committed(
        self, begin: Callable[..., Path], machines: Machines
    ) -> None:
        folder = begin(2)
        steps(2)
        save(folder)
        ct.upload_checkpoint()
        assert machines.committed() == [(1, 2)]
        assert states(machines) == ["finished"]

    def test_an_upload_inside_the_last_step_counts_as_that_step(
        self, begin: Callable[..., Path], machines: Machines
    ) -> None:
        folder = begin(1)
        with ct.train_step():
            save(folder, 1)
            ct.upload_checkpoint()
            assert machines.committed() == [(1, 1)]

    def test_a_last_upload_that_storage_refuses_is_an_error_and_stays_in_the_outbox(
        self, begin: Callable[..., Path], machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_DRAIN_TIMEOUT", "0.2")
        folder = begin(1)
        steps()
        save(folder)
        machines.storage.fail("upload", times=1_000_000)
        with pytest.raises(NotCommittedError, match=f"cloudtrain checkpoint flush {folder}"):
            ct.upload_checkpoint()
        assert [entry.title for entry in Outbox(folder).entries()] == ["checkpoint-1"]
        assert states(machines) == ["failed"]

    def test_an_empty_folder_is_logged_and_does_not_end_training(
        self, begin: Callable[..., Path], machines: Machines, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = begin(2)
        steps()
        ct.upload_checkpoint()
        assert "checkpoint-1 could not be kept for upload" in caplog.text
        steps()
        save(folder)
        ct.upload_checkpoint()
        assert machines.committed() == [(1, 2)]

    def test_a_folder_that_the_script_removes_and_creates_again_is_uploaded(
        self, begin: Callable[..., Path], machines: Machines
    ) -> None:
        folder = begin()
        for step in (1, 2, 3):
            shutil.rmtree(folder)
            folder.mkdir()
            steps()
            save(folder)
            ct.upload_checkpoint()
            wait_until(lambda: not left_overs(folder), "the end of the upload")
            assert (1, step) in machines.committed()

    def test_without_a_checkpoint_folder_steps_are_tracked_and_an_upload_names_the_missing_argument(
        self, machines: Machines
    ) -> None:
        ct.init(2, machines.storage.url)
        missing = r"checkpoint_dir= to init\(\), or set HF_CLOUDTRAIN_CHECKPOINT_DIR"
        with pytest.raises(ConfigurationError, match=rf"restore\(\) needs to know.*{missing}"):
            ct.restore()
        steps(2)
        with pytest.raises(ConfigurationError, match=rf"upload_checkpoint\(\) needs to know.*{missing}"):
            ct.upload_checkpoint()
        end_of_process()
        assert states(machines) == ["finished"]


class TestRestore:
    def test_the_folder_is_restored_on_an_empty_machine_and_the_steps_continue(
        self, begin: Callable[..., Path], machines: Machines
    ) -> None:
        trained(begin, 3)
        folder = begin(name="other")
        assert ct.restore() == str(folder)
        assert (folder / "checkpoint.pt").read_bytes() == bytes_at(3)
        assert ct.processed_steps() == 3
        steps()
        assert ct.processed_steps() == 4
        assert machines.catalog.attempts.read_all()[-1].resumed_from == CheckpointKey(1, 3)
        assert sorted(path.name for path in folder.iterdir()) == ["_cloudtrain", "checkpoint.pt"]
        assert not (folder / "_cloudtrain/restored").exists()

    def test_a_first_start_has_nothing_to_restore(self, begin: Callable[..., Path]) -> None:
        begin()
        assert ct.restore() is None
        steps()

    def test_files_outside_the_checkpoint_stay_and_are_named(
        self, begin: Callable[..., Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        trained(begin, 1)
        files = {"checkpoint.pt": b"of another time", "mine.txt": b"1", "checkpoint-900/x": b"2"}
        write_files(tmp_path / "other", files)
        folder = begin(name="other")
        ct.restore()
        steps()
        assert (
            contents(folder).items()
            >= {
                "checkpoint.pt": bytes_at(1),
                "mine.txt": b"1",
                "checkpoint-900/x": b"2",
            }.items()
        )
        (warning,) = [text for record in caplog.records if "not part of" in (text := record.getMessage())]
        assert warning.endswith("the next upload will contain them: checkpoint-900/x, mine.txt.")

    def test_a_folder_that_is_whole_is_not_downloaded_again(
        self, begin: Callable[..., Path], machines: Machines
    ) -> None:
        trained(begin, 2)
        machines.storage.calls.clear()
        folder = begin()
        assert ct.restore() == str(folder)
        assert machines.storage.count("download", "checkpoint-*") == 0

    def test_a_file_that_was_written_since_is_replaced(self, begin: Callable[..., Path]) -> None:
        folder = trained(begin, 2)
        save(folder, 99)
        begin()
        ct.restore()
        assert (folder / "checkpoint.pt").read_bytes() == bytes_at(2)

    def test_where_the_newest_is_damaged_the_previous_one_is_restored(
        self, begin: Callable[..., Path], machines: Machines, caplog: pytest.LogCaptureFixture
    ) -> None:
        trained(begin, 1)
        begin()
        ct.restore()
        steps()
        save(Path("ckpt"))
        ct.upload_checkpoint()
        end_of_process()
        (machines.run / "checkpoint-2/checkpoint.pt").write_bytes(b"x")
        folder = begin(name="other")
        ct.restore()
        assert ct.processed_steps() == 1
        assert (folder / "checkpoint.pt").read_bytes() == bytes_at(1)
        assert "damaged" in caplog.text

    def test_a_folder_in_the_way_of_a_file_is_an_error(
        self, begin: Callable[..., Path], tmp_path: Path
    ) -> None:
        trained(begin, 1)
        (tmp_path / "other/checkpoint.pt").mkdir(parents=True)
        begin(name="other")
        with pytest.raises(ConfigurationError, match=r"checkpoint\.pt' cannot be restored.*Move what is in"):
            ct.restore()

    def test_it_must_come_before_the_first_step(self, begin: Callable[..., Path]) -> None:
        begin()
        steps()
        with pytest.raises(ConfigurationError, match="after training began"):
            ct.restore()

    def test_a_complete_run_is_an_error(self, begin: Callable[..., Path]) -> None:
        trained(begin, 2)
        begin(2, name="other")
        with pytest.raises(RunCompleteError, match="total_train_steps=2 is not above the 2 steps"):
            ct.restore()

    def test_law_9_a_forgotten_restore_is_stopped_before_the_first_step(
        self, begin: Callable[..., Path], machines: Machines
    ) -> None:
        trained(begin, 1)
        begin(name="other")
        with pytest.raises(RunHasCheckpointsError, match=r"Call hf_cloudtrain\.restore\(\) after init\(\)"):
            ct.start_step()
        assert machines.catalog.attempts.numbers() == [1]

    def test_law_4_uploads_left_over_are_finished_first(
        self, begin: Callable[..., Path], machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_DRAIN_TIMEOUT", "0.1")
        machines.storage.fail("upload", times=1_000_000, path="checkpoint-*")
        trained(begin, 2, every=2)
        assert not machines.catalog.checkpoints()
        machines.storage.heal()
        begin()
        ct.restore()
        assert ct.processed_steps() == 2


class TestALauncherThatRestored:
    @pytest.fixture(autouse=True)
    def restored(self, begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        trained(begin, 3)
        monkeypatch.setenv("HF_CLOUDTRAIN_RESTORED_CHECKPOINT", "000001-0000000003")

    def test_init_begins_at_that_step(self, begin: Callable[..., Path], machines: Machines) -> None:
        begin()
        assert ct.processed_steps() == 3
        steps()
        assert ct.processed_steps() == 4
        assert machines.catalog.attempts.read_all()[-1].resumed_from == CheckpointKey(1, 3)
        assert machines.catalog.attempts.read_all()[-1].global_step == 3

    def test_init_refuses_a_total_that_is_reached(self, begin: Callable[..., Path]) -> None:
        with pytest.raises(RunCompleteError, match="total_train_steps=3 is not above the 3 steps"):
            begin(3)

    def test_restore_finds_the_files_whole(self, begin: Callable[..., Path], machines: Machines) -> None:
        machines.storage.calls.clear()
        folder = begin()
        assert ct.restore() == str(folder)
        assert ct.processed_steps() == 3
        assert machines.storage.count("download", "checkpoint-*") == 0

    def test_the_attempt_records_which_of_two_checkpoints_of_one_step_it_resumed(
        self, machines: Machines, begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine = machines.new("another", fresh=True)
        machine.start()
        machine.save(3)
        machine.wait()
        begin()
        steps()
        assert machines.catalog.attempts.read_all()[-1].resumed_from == CheckpointKey(1, 3)

    def test_restore_overrides_the_variable(
        self, begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_RESTORED_CHECKPOINT", "000001-0000000777")
        begin()
        ct.restore()
        steps()
        assert ct.processed_steps() == 4

    def test_a_checkpoint_that_does_not_exist_is_an_error(
        self, begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_RESTORED_CHECKPOINT", "000001-0000000777")
        begin()
        with pytest.raises(ConfigurationError, match="'000001-0000000777' is not a checkpoint of"):
            ct.start_step()

    def test_an_older_checkpoint_is_resumed_with_a_warning(
        self,
        begin: Callable[..., Path],
        machines: Machines,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        begin()
        steps()
        save(Path("ckpt"))
        ct.upload_checkpoint()
        end_of_process()
        begin()
        steps()
        assert "but the newest checkpoint" in caplog.text
        assert machines.catalog.attempts.read_all()[-1].resumed_from == CheckpointKey(1, 3)

    def test_a_malformed_key_is_an_error(
        self, begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_RESTORED_CHECKPOINT", "checkpoint-3")
        with pytest.raises(ConfigurationError, match="'checkpoint-3' is not a checkpoint key"):
            begin()

    def test_after_a_restart_by_torchrun_the_variable_is_ignored(
        self, begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The workers that crashed have overwritten the files that it put there."""
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        begin()
        assert ct.processed_steps() == 0
        with pytest.raises(RunHasCheckpointsError):
            ct.start_step()
        begin()
        ct.restore()
        assert ct.processed_steps() == 3

    def test_in_local_mode_the_variable_is_ignored(self) -> None:
        ct.init(3)
        assert ct.processed_steps() == 0


class TestTheRun:
    def test_an_attempt_begins_with_the_first_step_and_not_before(
        self, begin: Callable[..., Path], machines: Machines
    ) -> None:
        begin()
        ct.metric({"stage": "before"})
        ct.restore()
        assert machines.catalog.attempts.numbers() == []
        ct.start_step()
        assert machines.catalog.attempts.numbers() == [1]

    def test_url_and_folder_may_come_from_the_environment(
        self, machines: Machines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_RUN_URL", machines.storage.url)
        monkeypatch.setenv("HF_CLOUDTRAIN_CHECKPOINT_DIR", str(tmp_path / "ckpt"))
        ct.init(1)
        steps()
        save(tmp_path / "ckpt")
        ct.upload_checkpoint()
        assert machines.committed() == [(1, 1)]

    def test_values_that_cannot_be_encoded_and_a_loss_of_nan_do_no_harm(
        self, begin: Callable[..., Path], machines: Machines, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The run ends as finished, and no number is shown for a step that did not report it."""
        folder = begin(4)
        circle: list[Any] = []
        circle.append(circle)
        for step in range(1, 5):
            with ct.train_step():
                ct.metric({"loss": 1 / step if step < 3 else float("nan"), "state": "mine", "step": -1})
                ct.metric(
                    {
                        "file": "caf\udce9.txt",
                        ("a", 1): 0.5,
                        "bytes": b"\xe9",
                        "huge": 10**5000,
                        "circle": circle,
                    }
                )
        save(folder)
        ct.upload_checkpoint()
        end_of_process()
        progress = json.loads((machines.run / ".cloudtrain/progress/000001.json").read_bytes())
        assert (progress["state"], progress["step"], progress["loss"]) == ("finished", 4, "nan")
        logs = ct.read_history(machines.storage.url).logs
        assert [log["loss"] for log in logs if "loss" in log] == [1.0, 0.5, "nan", "nan"]
        assert [log["step"] for log in logs if "file" in log] == [1, 2, 3, 4]
        for name in ("bytes", "huge", "circle"):
            assert caplog.text.count(f"The metric {name!r} is not recorded") == 1

    def test_metrics_are_in_the_run_with_the_steps_they_belong_to(
        self, begin: Callable[..., Path], machines: Machines
    ) -> None:
        folder = begin(2)
        ct.metric({"stage": "before"})
        with ct.train_step():
            ct.metric({"loss": 2.0, "kind": "mine", "time": 0, "step": 77})
        steps()
        ct.metric({"loss": 1.0})
        save(folder)
        ct.upload_checkpoint()
        found = [{key: value for key, value in line.items() if key != "time"} for line in records(machines)]
        assert found == [
            {"kind": "log", "step": 0, "metrics": {"stage": "before"}},
            {
                "kind": "log",
                "step": 1,
                "metrics": {"loss": 2.0, "kind": "mine", "time": 0, "step": 77},
            },
            {"kind": "log", "step": 2, "metrics": {"loss": 1.0}},
        ]
        (log,) = (log for log in ct.read_history(machines.storage.url).logs if log["step"] == 1)
        assert (log["loss"], log["user/step"], log["user/kind"]) == (2.0, 77, "mine")
        assert all(line["time"] > 0 for line in records(machines))

    def test_time_between_two_steps_does_not_count_as_step_time(
        self, begin: Callable[..., Path], machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 0.0
        monkeypatch.setattr(tracker.time, "perf_counter", lambda: now)
        begin()
        for _ in range(3):
            with ct.train_step():
                now += 2.0
            now += 100.0
        with contextlib.suppress(KeyError), ct.train_step():
            now += 1_000.0
            raise KeyError
        steps()
        end_of_process()
        (progress,) = machines.run.glob(".cloudtrain/progress/*")
        assert json.loads(progress.read_text())["productive_seconds"] == 6.0

    def test_a_second_init_closes_the_previous_run_properly(
        self, begin: Callable[..., Path], machines: Machines, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = begin(10)
        steps(2)
        save(folder)
        ct.upload_checkpoint()
        steps(3)
        ct.init(5)
        assert machines.committed() == [(1, 2)]
        assert states(machines) == ["stopped"]
        assert "ended at step 5, but the last uploaded checkpoint is of step 2" in caplog.text

    @pytest.mark.parametrize(
        ("total", "error", "state"),
        [
            (None, None, "finished"),
            (3, None, "stopped"),
            (2, None, "finished"),
            (None, ValueError("of the script"), "failed"),
            (None, KeyboardInterrupt(), "stopped"),
            (2, KeyboardInterrupt(), "finished"),
            (3, KeyboardInterrupt(), "stopped"),
        ],
    )
    def test_how_a_run_ended(
        self,
        begin: Callable[..., Path],
        machines: Machines,
        monkeypatch: pytest.MonkeyPatch,
        total: int | None,
        error: BaseException | None,
        state: str,
    ) -> None:
        folder = begin(total)
        steps(2)
        save(folder)
        ct.upload_checkpoint()
        monkeypatch.setattr(sys, "last_value", error, raising=False)
        end_of_process()
        assert states(machines) == [state]
        assert machines.committed() == [(1, 2)]

    def test_law_5_a_run_that_never_uploaded_has_failed(
        self, begin: Callable[..., Path], machines: Machines, caplog: pytest.LogCaptureFixture
    ) -> None:
        begin(2)
        steps(2)
        end_of_process()
        assert states(machines) == ["failed"]
        assert "ended without uploading a checkpoint. Call hf_cloudtrain.upload_checkpoint()" in caplog.text

    def test_law_6_an_upload_of_an_overtaken_attempt_raises_and_the_heartbeat_says_so(
        self, begin: Callable[..., Path], machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", "0.02")
        folder = begin()
        steps()
        machines.catalog.attempts.begin(0.0, 0, None, {})
        wait_until(
            lambda: (machines.catalog.attempts.read_progress(1) or {}).get("state") == "overtaken",
            "a heartbeat",
        )
        save(folder)
        with pytest.raises(OvertakenError, match=r"Attempt 1 of .* was overtaken by attempt 2"):
            ct.upload_checkpoint()
        end_of_process()
        assert states(machines)[0] == "overtaken"
        assert machines.committed() == []

    def test_law_6_an_overtaken_attempt_does_not_end_as_finished(
        self, begin: Callable[..., Path], machines: Machines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = begin(1)
        steps()
        machines.catalog.attempts.begin(0.0, 0, None, {})
        save(folder)
        with pytest.raises(OvertakenError, match=r"not on storage: checkpoint-1"):
            ct.upload_checkpoint()
        end_of_process()
        assert states(machines)[0] == "overtaken"
        assert machines.committed() == []

    def test_law_6_beyond_its_end_an_attempt_can_still_be_overtaken(
        self, begin: Callable[..., Path], machines: Machines
    ) -> None:
        folder = begin(1)
        steps()
        save(folder)
        ct.upload_checkpoint()
        machines.catalog.attempts.begin(0.0, 0, None, {})
        steps()
        save(folder)
        with pytest.raises(OvertakenError):
            ct.upload_checkpoint()
        assert machines.committed() == [(1, 1)]

    def test_training_beyond_the_end_causes_one_warning_and_is_still_safe(
        self, begin: Callable[..., Path], machines: Machines, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = begin(1)
        steps()
        save(folder)
        ct.upload_checkpoint()
        steps(3)
        save(folder)
        ct.upload_checkpoint()
        assert machines.committed() == [(1, 1), (1, 4)]
        assert caplog.text.count("continues after step 1") == 1

    def test_after_the_upload_of_the_last_step_signals_do_what_they_did_before(
        self, begin: Callable[..., Path]
    ) -> None:
        before = signal.getsignal(signal.SIGTERM)
        folder = begin(1)
        steps()
        assert not ct.is_emergency_save()
        assert signal.getsignal(signal.SIGTERM) != before
        save(folder)
        ct.upload_checkpoint()
        assert not ct.is_emergency_save()
        assert signal.getsignal(signal.SIGTERM) == before

    def test_a_process_group_that_appears_after_a_restore_alone_is_refused(
        self, begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begin()
        ct.restore()
        group = SimpleNamespace(
            is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2
        )
        monkeypatch.setitem(sys.modules, "torch.distributed", group)
        with pytest.raises(ConfigurationError, match=r"has 2 ranks, but restore\(\) saw 1"):
            ct.start_step()


def test_an_ordinary_run_logs_no_warning(
    begin: Callable[..., Path], machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = begin(4)
    ct.restore()
    for _ in range(4):
        steps()
        save(folder)
        ct.upload_checkpoint()
        wait_until(lambda: len(machines.catalog.checkpoints()) == ct.processed_steps(), "the commit")
    end_of_process()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def imported_by(code: str) -> set[str]:
    import subprocess

    shown = f"import sys, hf_cloudtrain as ct\n{code}\nprint(*sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", shown],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE,
        env={"PYTHONPATH": str(Path(__file__).resolve().parents[4])},
    )
    return set(answer.stdout.split())


def test_a_limit_leaves_the_newest_checkpoints_on_storage(
    begin: Callable[..., Path], machines: Machines
) -> None:
    folder = begin(6, save_total_limit=1, keep_every_n_steps=3)
    for _ in range(6):
        steps()
        save(folder)
        ct.upload_checkpoint()  # the last one returns when it is committed
    left = [step for _, step in machines.committed()]
    assert (left[0], left[-1]) == (3, 6)
