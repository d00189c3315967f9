"""What is said after a command that failed: how it ended, what is safe, and what the same command does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cloudtrain.launch import afterwards
from hf_cloudtrain.launch.afterwards import what_is_safe
from hf_cloudtrain.launch.notes import Note
from tests.faults.runs import Machines


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with Machines(tmp_path) as made:
        yield made


def note(number: int = 1) -> Note:
    return Note(7, "trains", json.dumps({"number": number, "output_dir": "out", "command": "train.py"}))


def said(machines: Machines, code: int = 137, number: int = 1) -> str:
    return what_is_safe(machines.storage.url, [note(number)], code).replace(machines.storage.url, "URL")


def test_the_newest_checkpoint_is_named_with_its_run(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    for step in (5, 10):
        machine.save(step)
    machine.wait()
    assert said(machines) == (
        "The command was ended by SIGKILL. checkpoint-10 (attempt 1) is safe in 'URL', and the same command resumes from it."
    )
    assert said(machines, code=1).startswith("The command ended with exit code 1. checkpoint-10 ")


def test_what_only_this_disk_has_is_named(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    machines.storage.hold("upload", machines.gate)
    machine.save(10)
    assert said(machines) == (
        "The command was ended by SIGKILL. checkpoint-5 (attempt 1) is safe in 'URL', and the same command resumes from it. "
        "Only on this disk: checkpoint-10. A start here uploads it first; so does "
        f"`cloudtrain checkpoint flush {machine.output_dir}`."
    )


def test_a_run_without_a_checkpoint_starts_at_step_0(machines: Machines) -> None:
    machines.new().start()
    assert said(machines, code=143) == (
        "The command was ended by SIGTERM. 'URL' has no checkpoint yet, so the same command starts at step 0."
    )


def test_of_several_trainings_the_last_one_counts(machines: Machines) -> None:
    assert "'URL/trainer-2' has no checkpoint yet" in said(machines, number=2)


def test_a_storage_that_does_not_answer_holds_up_the_exit_code_for_seconds_only(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(afterwards, "PATIENCE", 0.0)
    machines.new().start()
    machines.storage.hold("list", machines.gate)
    assert (
        said(machines)
        == "The command was ended by SIGKILL. The storage does not tell what is safe: no answer"
    )
