"""Trackers go on: one tracker run for a run, each step in it once, and the curve of an uninterrupted training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_cloudtrain.checkpoints.paths import EVENTS, TRACKERS
from hf_cloudtrain.tracking.status import run_state
from tests.integration._lab import Lab
from tests.integration._trackers import Notebook, histograms_in

MODULE = "tests.integration._trackers"
STEPS = list(range(1, 13))
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3}


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notebook:
    monkeypatch.setenv("NOTEBOOK", str(tmp_path / "notebook.jsonl"))
    return Notebook()


def killed_twice(lab: Lab, **arguments: Any) -> None:
    lab.killed("first", kill_at=7, committed=4, module=MODULE, **arguments)
    lab.killed("second", kill_at=10, committed=8, module=MODULE, **arguments)


class TestOneTrackerRun:
    def test_three_machines_report_each_step_once_and_the_curve_is_that_of_an_uninterrupted_run(
        self, lab: Lab, notebook: Notebook, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        killed_twice(lab, **EVALUATED)
        lab.train("third", module=MODULE, **EVALUATED)
        found = notebook.values("one")
        assert notebook.values() == found
        assert [step for name, step, _ in found if name == "loss"] == STEPS
        assert [step for name, step, _ in found if name == "eval_loss"] == [3, 6, 9, 12]
        monkeypatch.setenv("NOTEBOOK", str(lab.folder / "plain.jsonl"))
        lab.plain(module=MODULE, **EVALUATED)
        lasting = {"loss", "grad_norm", "learning_rate", "eval_loss", "eval_nearness"}
        plain = [value for value in Notebook().values() if value[0] in lasting]
        assert sorted(plain) == sorted(value for value in found if value[0] in lasting)
        assert lab.manifest(3, 12).exact is True, "its methods on the callback are not state of the callback"

    def test_an_evaluation_after_the_training_is_in_the_same_tracker_run(
        self, lab: Lab, notebook: Notebook
    ) -> None:
        for machine in ("first", "second"):
            lab.train(machine, module=MODULE, tested=True)
        assert {line["run"] for line in notebook.lines()} == {"one"}
        assert [step for name, step, _ in notebook.values() if name == "loss"] == STEPS
        assert {step for name, step, _ in notebook.values() if name == "test_loss"} == {12}

    def test_a_callback_that_is_added_later_finds_the_reports_in_restore(
        self, lab: Lab, notebook: Notebook
    ) -> None:
        for machine in ("first", "second"):
            lab.killed(machine, kill_at=7, committed=4, module=MODULE, added_later=True)
            if machine == "first":
                assert notebook.values("one")
        lab.train("third", module=MODULE, added_later=True)
        assert [step for name, step, _ in notebook.values() if name == "loss"] == STEPS
        assert {line["run"] for line in notebook.lines()} == {"one"}

    def test_what_the_dead_machine_had_not_sent_is_sent_from_the_checkpoint(
        self, lab: Lab, notebook: Notebook
    ) -> None:
        lab.killed("first", kill_at=7, committed=4, module=MODULE)
        kept = [line for line in notebook.lines() if line.get("step", 0) <= 2]
        notebook.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        again = lab.train("second", module=MODULE)
        assert [step for name, step, _ in notebook.values("one") if name == "loss"] == STEPS
        assert "The tracker notebook lacked 2 logs of earlier steps, and has them now." in again.log

    def test_the_id_is_that_of_the_environment_where_there_is_one(
        self, lab: Lab, notebook: Notebook, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lab.killed("first", kill_at=7, committed=4, module=MODULE)
        monkeypatch.setenv("NOTEBOOK_RUN_ID", "mine")
        again = lab.killed("second", kill_at=9, committed=8, module=MODULE)
        assert "reports to the notebook run mine, which the script or its environment names" in again.log
        monkeypatch.delenv("NOTEBOOK_RUN_ID")
        lab.train("third", module=MODULE)
        assert [step for name, step, _ in notebook.values("mine") if name == "loss"] == STEPS

    def test_a_deleted_tracker_run_is_followed_by_a_new_one_that_has_the_whole_curve(
        self, lab: Lab, notebook: Notebook
    ) -> None:
        lab.killed("first", kill_at=7, committed=4, module=MODULE)
        notebook.write(deleted="one")
        again = lab.train("second", module=MODULE, ids=["two"])
        assert (
            "The notebook run one does not go on (it was deleted). This attempt reports to a new one, two."
            in again.log
        )
        assert [step for name, step, _ in notebook.values("two") if name == "loss"] == STEPS
        assert {"run": "one", "followed": "it was deleted"} in notebook.lines()

    def test_a_run_that_starts_over_has_a_tracker_run_of_its_own(self, lab: Lab, notebook: Notebook) -> None:
        lab.killed("first", kill_at=7, committed=4, module=MODULE)
        lab.train("second", module=MODULE, ids=["two"], fresh=True)
        assert [step for name, step, _ in notebook.values("two") if name == "loss"] == STEPS

    def test_steps_of_a_different_size_are_not_mixed(self, lab: Lab, notebook: Notebook) -> None:
        lab.killed("first", kill_at=7, committed=4, module=MODULE, samples=24)
        again = lab.train("second", module=MODULE, ids=["two"], per_device_train_batch_size=2, samples=24)
        assert "(a step has a different size now)" in again.log
        assert [step for name, step, _ in notebook.values("two") if name == "loss"] == [
            2,
            4,
            6,
            8,
            *range(9, 25),
        ]

    def test_run_status_has_its_page(self, lab: Lab, notebook: Notebook) -> None:
        lab.train("first", module=MODULE)
        assert run_state(lab.catalog).trackers == {"notebook": "https://notebook.example/one"}


class TestLaunch:
    """Under `cloudtrain launch` a script without a word of ours has one tracker run, too."""

    def test_event_files_of_three_starts_are_one_curve(self, lab: Lab) -> None:
        launched: dict[str, Any] = {"module": "tests.integration._launched", "report_to": "tensorboard"}
        for kill_at, committed in ((7, 4), (10, 8)):
            lab.killed("one", kill_at=kill_at, committed=committed, **launched)
        lab.train("one", **launched)
        assert scalars(lab.machine("one")) == scalars_of(lab)


class TestTrouble:
    """A tracker that fails never harms training."""

    def test_a_service_that_is_down_is_named_once_without_its_token_and_catches_up_at_the_next_start(
        self, lab: Lab, notebook: Notebook, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NOTEBOOK_DOWN", "1")
        monkeypatch.setenv("NOTEBOOK_TOKEN", "hush-hush-hush")
        first = lab.killed("first", kill_at=7, committed=4, module=MODULE)
        assert first.log.count("The tracker notebook did not start") == 1
        assert "hush" not in first.log
        monkeypatch.delenv("NOTEBOOK_DOWN")
        lab.train("second", module=MODULE)
        assert [step for name, step, _ in notebook.values("one") if name == "loss"] == STEPS
        stored = b"".join(path.read_bytes() for path in Path(lab.run_url).rglob("*") if path.is_file())
        assert b"hush" not in stored

    def test_a_service_that_comes_back_gets_what_it_lacks(
        self, lab: Lab, notebook: Notebook, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NOTEBOOK_DOWN", "1")
        monkeypatch.setenv("NOTEBOOK_TOKEN", "hush-hush-hush")
        lab.train("first", module=MODULE, back_at=5)
        assert [step for name, step, _ in notebook.values("one") if name == "loss"] == STEPS

    def test_training_is_the_same_with_it_and_without(
        self, lab: Lab, notebook: Notebook, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NOTEBOOK_DOWN", "1")
        monkeypatch.setenv("NOTEBOOK_TOKEN", "hush-hush-hush")
        lab.train("first", module=MODULE)
        lab.plain()
        assert lab.difference("first") == 0.0
        assert lab.manifest(1, 12).exact is True

    def test_an_emergency_save_flushes_it(self, lab: Lab, notebook: Notebook) -> None:
        child = lab.start("first", module=MODULE, after=[["SignalAt", {"step": 5}]])
        assert child.wait() == 75, child.log
        assert {"flushed": True} in notebook.lines()
        lab.train("second", module=MODULE)
        assert [step for name, step, _ in notebook.values("one") if name == "loss"] == STEPS

    def test_a_damaged_record_is_followed_by_a_new_tracker_run(self, lab: Lab, notebook: Notebook) -> None:
        lab.killed("first", kill_at=7, committed=4, module=MODULE)
        lab.catalog.storage.write(f"{TRACKERS}/notebook-0001.json", b'{"id": "')
        lab.train("second", module=MODULE, ids=["two"])
        assert [step for name, step, _ in notebook.values("two") if name == "loss"] == STEPS


def test_without_a_tracker_nothing_is_read_or_written_for_one(lab: Lab) -> None:
    lab.train("first", save_strategy="epoch")
    assert not (Path(lab.run_url) / TRACKERS).exists()


class TestTensorBoard:
    def test_event_files_of_three_starts_are_one_curve(self, lab: Lab) -> None:
        for kill_at, committed in ((7, 4), (10, 8)):
            lab.killed("one", kill_at=kill_at, committed=committed, report_to="tensorboard")
        lab.train("one", report_to="tensorboard")
        assert scalars(lab.machine("one")) == scalars_of(lab)

    def test_on_a_new_machine_the_log_of_the_checkpoint_fills_the_curve(self, lab: Lab) -> None:
        lab.killed("one", kill_at=7, committed=4, report_to="tensorboard")
        for info in lab.catalog.storage.list(EVENTS):
            lab.catalog.storage.delete([info.path])
        lab.train("two", report_to="tensorboard")
        assert scalars(lab.machine("two")) == scalars_of(lab)

    def test_histograms_of_machines_that_are_gone_come_back_once(self, lab: Lab) -> None:
        told: dict[str, Any] = {"module": MODULE, "function": "train_with_histograms"}
        lab.killed("one", kill_at=7, committed=4, **told)
        lab.killed("two", kill_at=11, committed=8, **told)
        lab.train("three", **told)
        assert histograms_in(lab.machine("three")) == STEPS
        assert scalars(lab.machine("three")) == scalars_of(lab)
        assert histograms_in(Path(lab.run_url, EVENTS)) == STEPS, "the end is stored, too"
        assert lab.manifest(3, 12).exact is True


def scalars_of(lab: Lab) -> dict[str, list[tuple[int, float]]]:
    lab.plain(report_to="tensorboard")
    return scalars(lab.machine("plain"))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that TensorBoard shows of the one run below a folder, without those of the clock."""
    (run,) = (folder / "runs").iterdir()
    found = EventAccumulator(str(run), size_guidance={"scalars": 0})
    found.Reload()
    clock = {"train/train_runtime", "train/train_samples_per_second", "train/train_steps_per_second"}
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
        if tag not in clock | {"train/train_loss", "train/total_flos"}
    }
