"""TrainLoop: law 7 with every kind of DataLoader, and what users find on their disk."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.errors import (
    ConfigurationError,
    ManifestError,
    PositionError,
    PreemptedError,
    PreemptedExit,
)
from hf_cloudtrain.integrations.loop.loop import TrainLoop
from hf_cloudtrain.preemption.signals import STOPPING
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.history import read_history
from tests.faults.runs import wait_until
from tests.integration import _loops
from tests.integration._loops import (
    CASES,
    OF_TWO,
    KilledError,
    Rows,
    difference,
    through_a_signal,
    through_kills,
    train,
)
from tests.integration._torchrun import torchrun
from tests.integration._zygote import PATIENCE

pytestmark = pytest.mark.filterwarnings(
    "ignore:'set_vital' is deprecated:UserWarning"  # torchdata asks torch for what it no longer has
)


@pytest.fixture(autouse=True)
def _alone() -> Any:
    _loops.forget_accelerate()
    yield
    _loops.forget_accelerate()


SLOW = {"loader processes", "a stream in a loader process"}
"""Of loader processes, lasting ones and those of a stateful loader are enough for `make test`."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
)
def test_law_7_a_loop_killed_in_both_epochs_equals_uninterrupted_with(tmp_path: Path, name: str) -> None:
    dataset, arguments = CASES[name]
    found = through_kills(tmp_path, dataset, **arguments)
    assert found["difference"] == 0.0
    assert found["batches"] == found["uninterrupted"]
    assert found["attempts"] == [1, 2, 3]
    assert 0 < found["resumed_at"] < found["steps"]


@pytest.mark.parametrize(
    "name",
    ["shuffling", "a seedable sampler", "lasting loader processes", "a generator", "a stream with a state"],
)
def test_law_7_a_checkpoint_between_two_epochs_is_exact_with(tmp_path: Path, name: str) -> None:
    dataset, arguments = CASES[name]
    found = through_kills(
        tmp_path, dataset, **{**arguments, "save_steps": None, "kills": (6, 11), "epochs": 3}
    )
    assert found["difference"] == 0.0
    assert found["batches"] == found["uninterrupted"]
    assert found["resumed_at"] == 10


@pytest.mark.slow
def test_law_7_a_loop_of_two_processes_equals_uninterrupted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with torchrun("-m", "tests.integration._loops", str(tmp_path), log=log) as launcher:
        assert launcher.wait(PATIENCE * 4) == 0, log.read_text()
    for rank in range(2):
        answer = json.loads((tmp_path / f"results-{rank}.json").read_text())
        results, signalled = answer["cases"], answer["signalled"]
        for failing in range(2):
            assert "No space left on device" in results.pop(f"rank {failing} cannot save")
        assert set(results) == set(OF_TWO)
        position = results["data that draws random numbers"]["position"]
        assert (position["samples_seen"], position["per_device_train_batch_size"]) == (54, 4)
        assert position["world_size"] == 2
        for name, found in results.items():
            assert found["difference"] == 0.0, name
            assert found["batches"] == found["uninterrupted"], name
            assert found["attempts"] == [1, 2, 3], name
        # Rank 1 alone received the signal in step 3, and all ranks decided at the end of step 4.
        assert (signalled["exit_code"], signalled["saved"]) == (PreemptedExit.CODE, 4)
        assert signalled["difference"] == 0.0
        assert signalled["batches"] == signalled["uninterrupted"]


class TestPreemption:
    @pytest.mark.parametrize(
        ("signal_at", "arguments", "saved"),
        [
            (5, {}, 6),  # a step that is saved anyway
            (6, {}, 8),  # numpy drew in between
            (0, {}, 2),
            (3, {"save_steps": None}, 5),
            (4, {"save_steps": None}, 5),  # the last step of an epoch
            (5, {"accumulation": 2}, 6),
        ],
    )
    def test_law_7_an_emergency_save_comes_before_the_evaluation_and_is_exact(
        self, tmp_path: Path, signal_at: int, arguments: dict[str, Any], saved: int
    ) -> None:
        found = through_a_signal(tmp_path, lambda: Rows(20, noise=True), signal_at=signal_at, **arguments)
        assert found["exit_code"] == PreemptedExit.CODE
        assert found["saved"] == saved
        assert found["difference"] == 0.0
        assert found["batches"] == found["uninterrupted"]

    def test_after_a_signal_during_an_evaluation_it_leaves_once_the_epoch_is_saved(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        evaluate, seen = _loops.evaluate, []

        def signalled_meanwhile(model: Any, loop: TrainLoop) -> float:
            os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(model, loop)

        whole, batches, _ = train(tmp_path / "plain", tmp_path / "uninterrupted", Rows(20))
        monkeypatch.setattr(_loops, "evaluate", signalled_meanwhile)
        with pytest.raises(PreemptedExit):
            train(tmp_path / "run", tmp_path / "out", Rows(20), save_steps=None, seen=seen)
        monkeypatch.setattr(_loops, "evaluate", evaluate)
        assert [item.step for item in _manifests(tmp_path / "run")] == [5]
        weights, rest, _ = train(tmp_path / "run", tmp_path / "elsewhere", Rows(20), seed=9)
        assert difference(whole, weights) == 0.0
        assert [item[1:] for item in seen + rest] == [item[1:] for item in batches]

    def test_previous_signal_handlers_are_restored(self, tmp_path: Path) -> None:
        before = [signal.getsignal(number) for number in STOPPING]
        with pytest.raises(PreemptedExit):
            train(tmp_path / "run", tmp_path / "out", Rows(20), signal_at=3)
        assert [signal.getsignal(number) for number in STOPPING] == before
        with pytest.raises(KilledError):
            train(tmp_path / "run", tmp_path / "out", Rows(20), kill=7)
        assert [signal.getsignal(number) for number in STOPPING] == before
        train(tmp_path / "run", tmp_path / "out", Rows(20))
        assert [signal.getsignal(number) for number in STOPPING] == before

    def test_in_a_notebook_it_raises_an_exception(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=object))
        with pytest.raises(
            PreemptedError, match=r"stopped at step \d \(SIGTERM\). checkpoint-\d is on storage."
        ):
            train(tmp_path / "run", tmp_path / "out", Rows(20), signal_at=3)


class TestSave:
    def test_an_unplanned_save_is_exact(self, tmp_path: Path) -> None:
        def ask(loop: TrainLoop) -> None:
            if loop.global_step in (1, 6):
                loop.save()

        found = through_kills(
            tmp_path, lambda: Rows(20, noise=True), save_steps=None, inside=ask, kills=(4, 9)
        )
        assert found["difference"] == 0.0
        assert found["resumed_at"] == 8, "numpy drew in between, so it came a step later"

    def test_an_unplanned_save_comes_at_once_where_neither_numpy_nor_python_draws(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_loops.np.random, "rand", lambda: 0.5)
        monkeypatch.setattr(_loops.random, "random", lambda: 0.5)
        asked: list[int] = []

        def ask(loop: TrainLoop) -> None:
            if loop.global_step == 1 and not asked:
                asked.append(1)
                loop.save()

        train(tmp_path / "run", tmp_path / "out", Rows(20), save_steps=None, inside=ask)
        assert [key.step for key in Catalog(Storage(str(tmp_path / "run"))).checkpoints()] == [2, 5, 10]

    def test_only_steps_whose_gradients_are_in_sync_are_counted_and_saved(self, tmp_path: Path) -> None:
        train(tmp_path / "run", tmp_path / "out", Rows(20), accumulation=2, save_steps=1)
        manifests = _manifests(tmp_path / "run")
        # Five batches an epoch are three steps: the last one is of a single batch.
        seen = {item.step: item.position.samples_seen for item in manifests}
        assert seen == {1: 8, 2: 16, 3: 20, 4: 28, 5: 36, 6: 40}

    def test_an_epoch_is_saved_though_the_script_does_not_call_end_epoch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TrainLoop, "end_epoch", lambda self, metrics: None)
        train(tmp_path / "run", tmp_path / "out", Rows(20), save_steps=None)
        assert [item.step for item in _manifests(tmp_path / "run")] == [5, 10]

    def test_a_failing_save_leaves_the_previous_one_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = Accelerator.save_state

        def fail(self: Accelerator, output_dir: str, **options: Any) -> Any:
            if "saving-4-" in output_dir:
                raise OSError(28, "No space left on device")
            return real(self, output_dir, **options)

        monkeypatch.setattr(Accelerator, "save_state", fail)
        with pytest.raises(OSError, match="No space left"):
            train(tmp_path / "run", tmp_path / "out", Rows(20))
        folder = tmp_path / "out" / "checkpoint-2"
        assert json.loads((folder / "training_state.json").read_text())["step"] == 2
        assert torch.load(folder / "optimizer.bin", weights_only=True)["state"]
        assert (tmp_path / "out" / "last" / "training_state.json").is_file()
        assert not list((tmp_path / "out" / "_cloudtrain").glob("saving-*"))

    def test_automatic_naming_of_accelerate_does_not_move_our_checkpoints(self, tmp_path: Path) -> None:
        def name_them(accelerator: Accelerator) -> None:
            accelerator.project_configuration.automatic_checkpoint_naming = True
            accelerator.project_configuration.total_limit = 1

        found = through_kills(tmp_path, lambda: Rows(20), prepared=name_them)
        assert found["difference"] == 0.0

    def test_on_disk_only_the_newest_checkpoint_is_kept(self, tmp_path: Path) -> None:
        train(tmp_path / "run", tmp_path / "out", Rows(20))
        assert [item.name for item in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-10"]

    def test_the_end_of_an_epoch_does_not_save_a_step_twice_where_the_loader_cannot_tell_its_end(
        self, tmp_path: Path
    ) -> None:
        train(tmp_path / "run", tmp_path / "out", _loops.Stream(20), prepare=False, save_steps=1)
        catalog = Catalog(Storage(str(tmp_path / "run")))
        ends = [item for item in _manifests(tmp_path / "run") if item.step in (5, 10)]
        assert [item.position.epoch for item in ends] == [1.0, 2.0]
        assert all("eval_loss" in item.metrics for item in ends)
        assert catalog.pointer("best") is not None

    def test_a_folder_that_a_live_process_is_writing_is_kept(self, tmp_path: Path) -> None:
        from hf_cloudtrain.integrations.loop.state import repair
        from hf_cloudtrain.runtime.files import temp_suffix

        living, dead = f"saving-4-{temp_suffix()}", f"saving-4-{2**22 + 1}-0123abcd"
        for name in (living, dead):
            (tmp_path / "_cloudtrain" / name).mkdir(parents=True)
        repair(tmp_path)
        assert [path.name for path in (tmp_path / "_cloudtrain").iterdir()] == [living]


class TestMetrics:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "high"])
    def test_a_metric_that_is_not_a_number_is_never_the_best_and_does_not_end_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any
    ) -> None:
        answers = iter([value, 0.5])
        monkeypatch.setattr(_loops, "evaluate", lambda model, loop: next(answers))
        _, _, loop = train(tmp_path / "run", tmp_path / "out", Rows(20))
        assert loop.best_metric == 0.5
        assert [item.step for item in _manifests(tmp_path / "run") if "best_metric" in item.metrics] == [10]

    def test_a_missing_metric_is_an_error_after_the_epoch_is_saved(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"'los' is not among.*nearest is 'loss'"):
            train(tmp_path / "run", tmp_path / "one", Rows(20), metric_for_best_model="los")
        catalog = Catalog(Storage(str(tmp_path / "run")))
        wait_until(lambda: catalog.newest() == CheckpointKey(1, 5), "the epoch is on storage")
        _, seen, _ = train(tmp_path / "run", tmp_path / "two", Rows(20))
        assert {item[1] for item in seen} == {1}

    def test_a_tracker_that_is_down_does_not_end_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(self: Accelerator, values: Any, step: int | None = None) -> None:
            raise ConnectionError("no answer")

        monkeypatch.setattr(Accelerator, "log", fail)
        _, _, loop = train(tmp_path / "run", tmp_path / "out", Rows(20))
        assert loop.global_step == 10
        assert caplog.text.count("no answer") == 1


class TestResume:
    def test_objects_registered_for_checkpointing_are_restored(self, tmp_path: Path) -> None:
        counters: list[_Counter] = []

        def register(accelerator: Accelerator) -> None:
            counters.append(_Counter())
            accelerator.register_for_checkpointing(counters[-1])

        def count(loop: TrainLoop) -> None:
            counters[-1].count += 1

        through_kills(tmp_path, lambda: Rows(20), prepared=register, inside=count)
        assert counters[0].count == counters[-1].count == 10

    @pytest.mark.parametrize(("save_steps", "kills"), [(None, (6,)), (2, (3, 7))])
    def test_random_numbers_that_a_script_draws_after_resume_have_no_effect(
        self, tmp_path: Path, save_steps: int | None, kills: tuple[int, ...]
    ) -> None:
        def draw(loop: TrainLoop) -> None:
            if loop.resume() is not None:
                torch.rand(3), _loops.random.random(), _loops.np.random.rand()

        found = through_kills(
            tmp_path, lambda: Rows(20, noise=True), before=draw, save_steps=save_steps, kills=kills
        )
        assert found["difference"] == 0.0
        assert found["batches"] == found["uninterrupted"]

    def test_trackers_keep_their_step(self, tmp_path: Path) -> None:
        tracker = _Tracker()

        def init(accelerator: Accelerator) -> None:
            accelerator.init_trackers("run")

        arguments: dict[str, Any] = {"log_with": tracker, "prepared": init}
        with pytest.raises(KilledError):
            train(tmp_path / "run", tmp_path / "one", Rows(20), kill=7, **arguments)
        before = len(tracker.steps)
        train(tmp_path / "run", tmp_path / "two", Rows(20), **arguments)
        assert tracker.steps[:before] == [(2, "loss"), (4, "loss"), (5, "eval_loss"), (6, "loss")]
        assert tracker.steps[before:] == [(8, "loss"), (10, "loss"), (10, "eval_loss")]

    def test_the_logs_of_all_attempts_join_without_gaps(self, tmp_path: Path) -> None:
        train(tmp_path / "plain", tmp_path / "whole", Rows(20))
        with pytest.raises(KilledError):
            train(
                tmp_path / "run",
                tmp_path / "one",
                Rows(20),
                kill=7,
                # A real process would have had two seconds to store them.
                inside=lambda loop: (
                    loop._lifecycle.tracker.close("failed") if loop.global_step == 7 else None
                ),
            )
        train(tmp_path / "run", tmp_path / "two", Rows(20))
        whole, resumed = (
            [(log["step"], log.get("loss"), log.get("eval_loss")) for log in read_history(str(run)).logs]
            for run in (tmp_path / "plain", tmp_path / "run")
        )
        assert resumed == whole
        logs = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("whole", "two")]
        assert logs[0] == logs[1]
        assert [
            (item["epoch"], item["step"], set(item["train"]), set(item["valid"])) for item in logs[1]
        ] == [
            (0, 5, {"loss"}, {"loss"}),
            (1, 10, {"loss"}, {"loss"}),
        ]

    def test_a_different_order_is_refused_before_a_step(self, tmp_path: Path) -> None:
        _killed(tmp_path, 3)
        steps: list[int] = []
        with pytest.raises(PositionError, match=r"order differs.*or start a new run"):
            train(
                tmp_path / "run",
                tmp_path / "two",
                Rows(20),
                loader=lambda: {"shuffle": False},
                inside=lambda loop: steps.append(loop.global_step),
            )
        assert steps == []

    def test_a_sampler_that_continues_differently_is_refused(self, tmp_path: Path) -> None:
        """It yields the same batches again, because its first random numbers are restored, and then different ones."""
        _killed(tmp_path, 3, loader=lambda: {"shuffle": False, "sampler": _Lazy(20)})
        with pytest.raises(PositionError, match="the batch after them differs"):
            train(
                tmp_path / "run",
                tmp_path / "two",
                Rows(20),
                loader=lambda: {"shuffle": False, "sampler": _Lazy(20)},
            )

    def test_a_batch_sampler_with_a_generator_of_its_own_is_restored(self, tmp_path: Path) -> None:
        found = through_kills(
            tmp_path, lambda: Rows(20), loader=lambda: {"batch_sampler": _Shuffled(20)}, batch_size=1
        )
        assert found["difference"] == 0.0
        assert found["batches"] == found["uninterrupted"]

    def test_a_second_iteration_of_the_loader_in_between_does_not_count(self, tmp_path: Path) -> None:
        loaders: list[Any] = []

        def keep(accelerator: Accelerator) -> None:
            loaders[:] = accelerator._dataloaders

        def look(loop: TrainLoop) -> None:
            next(iter(loaders[0].base_dataloader))

        found = through_kills(
            tmp_path, lambda: Rows(20), prepared=keep, inside=look, config={"use_seedable_sampler": True}
        )
        assert found["difference"] == 0.0
        assert found["batches"] == found["uninterrupted"]

    def test_a_shorter_dataset_is_refused_before_a_step(self, tmp_path: Path) -> None:
        _killed(tmp_path, 5, size=32)
        with pytest.raises(PositionError, match="cannot be reproduced"):
            train(tmp_path / "run", tmp_path / "two", Rows(12))

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [({"batch_size": 3}, "4 samples per batch"), ({"accumulation": 3}, "1 batches per optimizer step")],
    )
    def test_a_step_of_a_different_size_that_cannot_be_converted_is_refused(
        self, tmp_path: Path, arguments: dict[str, Any], text: str
    ) -> None:
        _killed(tmp_path, 3)
        with pytest.raises(PositionError, match=text):
            train(tmp_path / "run", tmp_path / "two", Rows(20), **arguments)

    def test_a_different_kind_of_dataset_is_refused(self, tmp_path: Path) -> None:
        _killed(tmp_path, 3)
        with pytest.raises(PositionError, match="Use the same kind of dataset and DataLoader"):
            train(tmp_path / "run", tmp_path / "two", _loops.Stream(20))

    def test_a_checkpoint_that_a_loop_did_not_save_is_refused(self, tmp_path: Path) -> None:
        from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
        from hf_cloudtrain.checkpoints.manifest import Position

        folder = tmp_path / "other" / "checkpoint-3"
        checkpointer = Checkpointer(str(tmp_path / "run"), folder.parent)
        checkpointer.begin(0)
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
        checkpointer.save(folder, Position(global_step=3))
        checkpointer.wait()
        with pytest.raises(ManifestError, match="was not saved by a TrainLoop"):
            train(tmp_path / "run", tmp_path / "out", Rows(20))

    def test_a_complete_run_trains_nothing_and_takes_no_attempt(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        train(tmp_path / "run", tmp_path / "one", Rows(20))
        _, seen, loop = train(tmp_path / "run", tmp_path / "two", Rows(20))
        assert (seen, loop.global_step, loop.epoch) == ([], 10, 2)
        assert "The run is complete: 2 of 2 epochs" in caplog.text
        assert Catalog(Storage(str(tmp_path / "run"))).attempts.numbers() == [1]

    def test_a_complete_run_continues_when_it_gets_more_epochs(self, tmp_path: Path) -> None:
        whole, _, _ = train(tmp_path / "plain", tmp_path / "whole", Rows(20), epochs=3)
        _, _, before = train(tmp_path / "run", tmp_path / "one", Rows(20), epochs=2)
        more, seen, loop = train(tmp_path / "run", tmp_path / "two", Rows(20), epochs=3)
        assert {item[1] for item in seen} == {2}
        assert _loops.difference(whole, more) == 0.0
        assert loop.best_metric <= before.best_metric

    def test_fresh_starts_over(self, tmp_path: Path) -> None:
        train(tmp_path / "run", tmp_path / "one", Rows(20))
        _, seen, _ = train(tmp_path / "run", tmp_path / "two", Rows(20), fresh=True)
        assert len(seen) == 10


class TestEnd:
    # Requested in the second step: numpy draws there, so it comes a step later, unless the step has one more batch.
    @pytest.mark.parametrize(("accumulation", "stopped_at"), [(1, 3), (2, 2)])
    def test_stop_within_an_epoch_is_exact_though_an_evaluation_follows(
        self, tmp_path: Path, accumulation: int, stopped_at: int
    ) -> None:
        arguments: dict[str, Any] = {"epochs": 2, "save_steps": None, "accumulation": accumulation}
        whole, batches, _ = train(tmp_path / "plain", tmp_path / "whole", Rows(28, noise=True), **arguments)

        def stop(loop: TrainLoop) -> None:
            if loop.global_step == 1:
                loop.stop()

        _, seen, loop = train(
            tmp_path / "run", tmp_path / "one", Rows(28, noise=True), inside=stop, **arguments
        )
        assert loop.global_step == stopped_at
        assert [item.step for item in _manifests(tmp_path / "run")] == [stopped_at]
        assert not (tmp_path / "one" / "log.json").exists()
        assert read_history(str(tmp_path / "run")).attempts[0].state == "stopped"
        resumed, rest, _ = train(tmp_path / "run", tmp_path / "two", Rows(28, noise=True), **arguments)
        assert seen + rest == batches
        assert _loops.difference(whole, resumed) == 0.0

    @pytest.mark.parametrize("evaluated", [True, False])
    def test_stop_at_the_last_step_of_an_epoch_is_exact(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: bool
    ) -> None:
        """Where a stopped script skips the evaluation, the next attempt catches up on it."""
        whole, _, _ = train(tmp_path / "plain", tmp_path / "whole", Rows(20), save_steps=None)

        def stop(loop: TrainLoop) -> None:
            if loop.global_step == 4:
                loop.stop()

        with monkeypatch.context() as patched:
            if not evaluated:
                patched.setattr(_loops, "evaluate", lambda model, loop: 0.0)
                patched.setattr(TrainLoop, "end_epoch", lambda loop, metrics: None)
            train(tmp_path / "run", tmp_path / "one", Rows(20), save_steps=None, inside=stop)
        assert [item.position.epoch for item in _manifests(tmp_path / "run")] == [1.0]
        resumed, rest, _ = train(tmp_path / "run", tmp_path / "two", Rows(20), save_steps=None)
        assert [item[1] for item in rest] == [1] * 5
        assert _loops.difference(whole, resumed) == 0.0

    def test_a_stop_that_is_complete_ends_the_run_on_every_machine(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def stop(loop: TrainLoop) -> None:
            if loop.global_step == 2:
                loop.stop(complete=True)

        train(tmp_path / "run", tmp_path / "one", Rows(20), inside=stop)
        assert read_history(str(tmp_path / "run")).attempts[0].state == "finished"
        _, seen, _ = train(tmp_path / "run", tmp_path / "two", Rows(20))
        assert seen == []
        assert (
            "The run is complete: stop(complete=True) ended it at step 4. Nothing is trained." in caplog.text
        )
        assert (tmp_path / "two/last/training_state.json").is_file()
        _, seen, loop = train(tmp_path / "run", tmp_path / "three", Rows(20), epochs=3)
        assert (seen[0][0], loop.global_step) == (5, 15)

    def test_a_complete_run_brings_its_results_to_an_empty_machine(self, tmp_path: Path) -> None:
        train(tmp_path / "run", tmp_path / "one", Rows(20))
        train(tmp_path / "run", tmp_path / "two", Rows(20))
        for name in ("log.json", "last/training_state.json", "best/training_state.json"):
            assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()

    def test_steps_that_are_left_with_break_end_the_epoch(self, tmp_path: Path) -> None:
        accelerator = _loops.Accelerator(cpu=True)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = torch.utils.data.DataLoader(Rows(20), batch_size=4)
        model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        loop = TrainLoop(accelerator, str(tmp_path / "run"), num_epochs=2, output_dir=tmp_path / "out")
        steps = []
        for _ in loop.epochs():
            for number, _batch in enumerate(loop.steps(batches)):
                optimizer.step()
                if number == 1:
                    break
            steps.append(loop.global_step)
            assert not accelerator.gradient_state.in_dataloader
        assert [item.step for item in _manifests(tmp_path / "run")] == [2, 4]
        assert [item.position.epoch for item in _manifests(tmp_path / "run")] == [1.0, 2.0]

    def test_an_interrupted_loop_resumes_from_its_checkpoint_when_it_is_iterated_again(
        self, tmp_path: Path
    ) -> None:
        accelerator = _loops.Accelerator(cpu=True)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = torch.utils.data.DataLoader(Rows(20), batch_size=4)
        model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        arguments: dict[str, Any] = {"num_epochs": 1, "save_steps": 2, "output_dir": tmp_path / "out"}
        loop = TrainLoop(accelerator, str(tmp_path / "run"), **arguments)

        def cell(interrupt_at: int | None) -> list[int]:
            seen = []
            for _ in loop.epochs():
                for batch in loop.steps(batches):
                    if loop.global_step == interrupt_at:
                        raise KeyboardInterrupt
                    seen += batch["id"].tolist()
                    optimizer.step()
            return seen

        with pytest.raises(KeyboardInterrupt):
            cell(1)
        with pytest.raises(ConfigurationError, match="before the first checkpoint"):
            cell(None)
        loop = TrainLoop(accelerator, str(tmp_path / "run"), **arguments)
        with pytest.raises(KeyboardInterrupt):
            cell(3)
        assert cell(None) == list(range(8, 20))

    def test_loops_that_have_ended_leave_no_thread(self, tmp_path: Path) -> None:
        before = set(threading.enumerate())
        loops = [train(tmp_path / f"run{at}", tmp_path / f"out{at}", Rows(20))[2] for at in range(3)]
        wait_until(lambda: not ours(set(threading.enumerate()) - before), "the end of the threads")
        assert len(loops) == 3, "a notebook keeps them"

    def test_ctrl_c_before_the_first_step_is_recorded_as_the_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(loop: TrainLoop, dataloader: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(TrainLoop, "steps", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            train(tmp_path / "run", tmp_path / "out", Rows(20))
        del caught
        gc.collect()  # the traceback keeps the generator of the loop
        beat = Catalog(Storage(str(tmp_path / "run"))).attempts.read_progress(1)
        assert beat is not None
        assert (beat["state"], beat["step"]) == ("stopped", 0)

    def test_ending_an_epoch_twice_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        once = TrainLoop.end_epoch

        def twice(loop: TrainLoop, metrics: dict[str, Any]) -> None:
            once(loop, metrics)
            once(loop, metrics)

        monkeypatch.setattr(TrainLoop, "end_epoch", twice)
        with pytest.raises(ConfigurationError, match="called twice in epoch 0"):
            train(tmp_path / "run", tmp_path / "out", Rows(20))

    def test_a_second_loop_in_one_process_ends_the_heartbeat_of_the_first(self, tmp_path: Path) -> None:
        with pytest.raises(KilledError):
            train(tmp_path / "run", tmp_path / "out", Rows(20), kill=3)
        train(tmp_path / "run", tmp_path / "out", Rows(20))
        assert [info.state for info in read_history(str(tmp_path / "run")).attempts] == [
            "stopped",
            "finished",
        ]

    def test_leaving_the_epochs_with_break_counts_as_a_stop(self, tmp_path: Path) -> None:
        accelerator = _loops.Accelerator(cpu=True)
        batches = accelerator.prepare(torch.utils.data.DataLoader(Rows(20), batch_size=4))
        accelerator.prepare(torch.nn.Linear(1, 1))
        loop = TrainLoop(accelerator, str(tmp_path / "run"), num_epochs=2, output_dir=tmp_path / "out")
        for _ in loop.epochs():
            list(loop.steps(batches))
            loop.end_epoch()
            break
        assert [info.state for info in read_history(str(tmp_path / "run")).attempts] == ["stopped"]

    def test_a_loader_without_batches_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="yielded no batches in epoch 0"):
            train(tmp_path / "run", tmp_path / "out", Rows(3), loader=lambda: {"drop_last": True})

    @pytest.mark.parametrize(
        ("misuse", "text"),
        [
            (lambda loop: next(loop.steps([])), "steps.. belongs inside"),
            (lambda loop: loop.end_epoch(), "end_epoch.. belongs inside"),
            (lambda loop: list(loop.epochs()), "took no step"),
            (lambda loop: [loop.end_epoch() for _ in loop.epochs()], "took no step"),
            (lambda loop: loop.log(loss="low"), "neither a number nor a tensor"),
        ],
    )
    def test_misuse_says_what_to_do(self, tmp_path: Path, misuse: Any, text: str) -> None:
        accelerator = _loops.Accelerator(cpu=True)
        accelerator.prepare(torch.nn.Linear(1, 1))
        loop = TrainLoop(accelerator, str(tmp_path / "run"), num_epochs=1, output_dir=tmp_path / "out")
        with pytest.raises(ConfigurationError, match=text):
            misuse(loop)

    def test_a_loop_before_prepare_is_refused(self, tmp_path: Path) -> None:
        loop = TrainLoop(
            _loops.Accelerator(cpu=True), str(tmp_path / "run"), num_epochs=1, output_dir=tmp_path
        )
        with pytest.raises(ConfigurationError, match=r"call accelerator\.prepare"):
            next(loop.epochs())

    def test_an_unknown_form_of_the_log_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ConfigurationError, match=r"log_format='json' must be 'records' or 'epochs'"):
            TrainLoop(None, "run", num_epochs=1, log_format="json")  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["num_epochs", "save_steps", "logging_steps"])
    def test_counts_must_be_positive(self, tmp_path: Path, name: str) -> None:
        arguments: dict[str, Any] = {"num_epochs": 1, name: 0}
        with pytest.raises(ConfigurationError, match=f"{name}=0"):
            TrainLoop(_loops.Accelerator(cpu=True), str(tmp_path / "run"), **arguments)


class _Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class _Lazy(torch.utils.data.Sampler):
    """Draws each index on demand, from the same random state as the model."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        for _ in range(self.size):
            yield int(torch.randint(self.size, ()))

    def __len__(self) -> int:
        return self.size


class _Shuffled(torch.utils.data.BatchSampler):
    """Shuffles batches of consecutive samples by a generator of its own."""

    def __init__(self, size: int) -> None:
        super().__init__(torch.utils.data.SequentialSampler(range(size)), 4, drop_last=False)
        self.generator = torch.Generator().manual_seed(5)

    def __iter__(self) -> Any:
        batches = list(super().__iter__())
        for at in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[at]


class _Tracker(GeneralTracker):
    name = "in memory"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__(_blank=True)
        self.steps: list[tuple[int | None, str]] = []

    @property
    def tracker(self) -> list[Any]:
        return self.steps

    def start(self) -> None:
        """Nothing to start."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing to store."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.steps.append((step, next(iter(values))))


def _killed(folder: Path, step: int, size: int = 20, **arguments: Any) -> None:
    with pytest.raises(KilledError):
        train(folder / "run", folder / "one", Rows(size), kill=step, **arguments)


def _manifests(run: Path) -> list[Any]:
    catalog = Catalog(Storage(str(run)))
    return [catalog.read(key) for key in catalog.checkpoints()]


def ours(threads: set[threading.Thread]) -> list[str]:
    return [thread.name for thread in threads if thread.name.startswith("cloudtrain-")]
