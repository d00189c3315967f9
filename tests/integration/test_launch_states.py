"""`cloudtrain launch` with `Accelerator.save_state` in a plain script: uploaded, restored where the script looks, and resumed."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from safetensors.numpy import load_file

from hf_cloudtrain.launch.notes import read_notes
from tests.integration._lab import Lab
from tests.integration._zygote import Child
from tests.integration.test_door import lines

STATES = "tests.integration._launched_states"


def train(lab: Lab, machine: str, function: str = "run", **arguments: Any) -> Child:
    return lab.train(machine, function, module=STATES, **arguments)


def killed(lab: Lab, machine: str, **arguments: Any) -> Child:
    child = lab.start(machine, "run", module=STATES, **arguments)
    assert child.wait() == -signal.SIGKILL, child.log
    return child


def folders(lab: Lab) -> list[tuple[str, str]]:
    read = (lab.catalog.read(key) for key in lab.catalog.checkpoints())
    return [(manifest.key, manifest.origin["state_folder"]) for manifest in read]


def test_a_script_that_loads_its_latest_folder_resumes_on_an_empty_disk(lab: Lab) -> None:
    train(lab, "plain", run_url=None)
    killed(lab, "first", kill_at=7, committed=6)
    child = train(lab, "second", resume="latest")
    assert child.value["first"] == 6
    assert lab.difference("second") == 0.0
    said = lines(child.log)
    assert said[0].startswith("`cloudtrain launch` has hooked save_state() and load_state() of Accelerator: ")
    assert "attempt 2: resumes from checkpoint-6 (attempt 1, exact: not verified) at step 6;" in said[1]
    assert folders(lab)[:3] == [
        ("000001-0000000002", "step_2"),
        ("000001-0000000004", "step_4"),
        ("000001-0000000006", "step_6"),
    ]
    assert lab.steps() == [2, 4, 6, 8, 10, 12]
    assert lab.manifest(2, 8).exact is None
    assert lab.problems() == []
    assert lab.outbox("second") == []


def test_law_9_a_script_that_loads_nothing_is_stopped_at_its_first_step(lab: Lab) -> None:
    train(lab, "first")
    notes = lab.folder / "notes"
    log = lab.fails("second", "run", module=STATES, notes=str(notes))
    assert "has a checkpoint, 'step_12', but the script trains from step 0" in log
    assert lab.catalog.attempts.numbers() == [1]
    assert [one.what for one in read_notes(str(notes))][-1] == "refused"


def test_law_9_without_the_notes_of_a_launch_it_is_stopped_at_its_first_save(lab: Lab) -> None:
    train(lab, "first")
    log = lab.fails("second", "run", module=STATES)
    assert "but training starts at step 0. Start it with its own option" in log


def test_an_older_folder_that_the_script_names_is_restored_when_it_loads_it(lab: Lab) -> None:
    train(lab, "first")
    child = train(lab, "second", resume="step_4")
    assert "attempt 2: resumes from checkpoint-4" in child.log
    assert child.value["first"] == 4
    assert lab.difference("second", "first") == 0.0


def test_a_folder_that_the_run_does_not_have_is_the_error_of_accelerate(lab: Lab) -> None:
    log = lab.fails("first", "run", module=STATES, resume="step_5")
    assert "has no state named 'step_5'" in log
    assert "folder does not exist" in log


def test_one_folder_may_be_written_again_and_again(lab: Lab) -> None:
    log = train(lab, "first", names="state").log
    assert "cannot be committed" not in log
    assert lab.problems() == []
    assert lab.steps()[-1] == 12
    final = load_file(lab.machine("first") / "state" / "model.safetensors")
    assert (load_file(lab.folder / "first.safetensors")["weight"] == final["weight"]).all()


@pytest.mark.parametrize("only_main", [False, True])
def test_ranks_that_all_save_and_a_rank_0_that_saves_alone(lab: Lab, only_main: bool) -> None:
    arguments = {"module": STATES, "only_main": only_main, "silence": 0.5}
    ranks = lab.start_ranks("first", "run", **arguments)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].log
    found = {file.path for file in lab.catalog.read(lab.catalog.checkpoints()[-1]).files}
    assert ("random_states_1.pkl" in found) == (not only_main)
    assert ["has hooked" in rank.log for rank in ranks] == [True, False]
    assert len(lab.steps()) == 3


def test_sigterm_ends_the_script_after_its_uploads(lab: Lab) -> None:
    child = lab.start("first", "run", module=STATES, signal_at=6)
    assert child.wait() == 75, child.log
    assert "SIGTERM: leaving, after the uploads." in child.log
    assert lab.steps() == [2, 4, 6]
    assert lab.outbox("first") == []


def test_a_folder_that_a_kill_has_left_half_written_moves_away(lab: Lab) -> None:
    killed(lab, "first", kill_at=6, committed=4, cut_off=True)
    assert (lab.machine("first") / "step_6").is_dir()
    child = train(lab, "first", resume="latest")
    assert "step_6' was not written to its end; moved to" in child.log
    assert child.value["first"] == 4
    assert (lab.machine("first") / "_cloudtrain" / "stale" / "step_6").is_dir()


def test_a_last_state_that_cannot_be_stored_is_an_error_of_the_launch(lab: Lab) -> None:
    notes = lab.folder / "notes"
    child = train(
        lab,
        "first",
        breaks_storage_at=11,
        notes=str(notes),
        env={"HF_CLOUDTRAIN_DRAIN_TIMEOUT": "1"},
    )
    assert "not-stored" in [one.what for one in read_notes(str(notes))]
    assert "cloudtrain checkpoint flush" in child.log


def test_folders_that_accelerate_names_itself(lab: Lab) -> None:
    train(lab, "first", automatic=True)
    assert [name for _, name in folders(lab)] == [f"project/checkpoints/checkpoint_{n}" for n in range(6)]
    assert not (lab.machine("first") / "project" / "checkpoints" / "_cloudtrain").exists()


@pytest.mark.parametrize(("automatic", "steps"), [(True, [10, 12]), (False, [2, 4, 6, 8, 10, 12])])
def test_the_limit_of_accelerate_holds_on_storage_where_it_does_on_the_disk(
    lab: Lab, automatic: bool, steps: list[int]
) -> None:
    train(lab, "first", automatic=automatic, limit=2)
    assert lab.steps() == steps


def test_train_loop_is_left_alone(lab: Lab) -> None:
    child = train(lab, "first", "loop")
    assert "cloudtrain launch" not in child.log
    assert lab.steps()[-1] == 4
