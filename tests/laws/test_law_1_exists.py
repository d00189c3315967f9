"""Law 1, Exists: a checkpoint exists if and only if its manifest does."""

from __future__ import annotations

import pytest

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.storage.local_backend import LocalBackend
from hf_cloudtrain.testing import Call
from tests.faults.runs import Machines, bytes_of, wait_until, write_checkpoint

MANIFESTS = "*/checkpoints/*"


def test_law_1_exists_if_and_only_if_its_manifest_does(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.hold("create", machines.gate, path=MANIFESTS)
    machine.save(5)
    wait_until(lambda: machines.storage.count("create", MANIFESTS), "the commit")

    assert (machines.run / "checkpoint-5/model.safetensors").is_file(), "every byte is uploaded"
    assert machines.committed() == []
    assert machines.restored("before") is None

    machines.gate.set()
    machine.wait()
    assert machines.committed() == [(1, 5)]
    assert machines.restored("after") == bytes_of(5)

    machines.storage.delete([".cloudtrain/checkpoints/000001-0000000005.json"])
    assert machines.committed() == []
    assert machines.restored("deleted") is None


def test_law_1_the_claim_is_created_first_and_the_manifest_last_and_once(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()

    kinds = ("create", "write", "upload", "delete")
    calls = [call for call in machines.storage.calls if call.kind in kinds]
    claim = calls.index(Call("create", ".cloudtrain/claims/checkpoint-5.json"))
    commit = calls.index(Call("create", ".cloudtrain/checkpoints/000001-0000000005.json"))
    uploads = [index for index, call in enumerate(calls) if call.path.startswith("checkpoint-5/")]
    assert len(uploads) == len(bytes_of(5))
    assert claim < min(uploads) <= max(uploads) < commit
    assert machines.storage.count("create", MANIFESTS) == 1, "created once and never changed"
    assert machines.storage.count("write", MANIFESTS) + machines.storage.count("delete", MANIFESTS) == 0


def test_law_1_one_list_finds_all_checkpoints(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    for step in (5, 10, 15):
        machine.save(step)
        machine.wait()

    machines.storage.calls.clear()
    assert machines.catalog.newest() == CheckpointKey(1, 15)
    assert machines.storage.calls == [Call("list", ".cloudtrain/checkpoints")]


@pytest.mark.parametrize("first", [1, 2])
def test_law_1_attempts_that_save_the_same_step_write_two_folders(machines: Machines, first: int) -> None:
    old, new = machines.new("old"), machines.new("new")
    for machine in (old, new):
        machine.start()
    order = (old, new) if first == 1 else (new, old)
    for machine in order:
        machine.save(5, salt=machine.output_dir.name)
        machine.land()

    assert machines.committed() == [(1, 5), (2, 5)]
    folders = {key.attempt: machines.catalog.read(key).folder for key in machines.catalog.checkpoints()}
    second = 3 - first
    assert folders == {first: "checkpoint-5", second: f"checkpoint-5.a{second}"}
    assert machines.restored("elsewhere") == bytes_of(5, "new")


def test_law_1_a_second_save_never_overwrites_a_committed_file(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.hold("create", machines.gate, path=MANIFESTS)
    machine.save(5, salt="first")
    wait_until(lambda: machines.storage.count("create", MANIFESTS), "the commit of the first save")

    accept = machine.checkpointer.outbox.accept

    def accept_late(*args: object, **options: object) -> object:
        """The first save is committed just after the second one was requested."""
        machines.gate.set()
        wait_until(lambda: not machine.checkpointer.upload_queue.pending(), "the end of the first save")
        return accept(*args, **options)

    monkeypatch.setattr(machine.checkpointer.outbox, "accept", accept_late)
    machine.save(5, salt="second")
    machine.wait()
    assert machines.committed() == [(1, 5)]


def test_law_1_a_checkpoint_whose_process_died_after_the_commit_is_not_uploaded_again(
    machines: Machines,
) -> None:
    machine = machines.new()
    machine.start()
    machine.checkpointer.outbox.remove = lambda entry: None  # it dies before it removes the committed entry
    machine.save(5)
    machine.wait()
    assert machine.waiting() == [CheckpointKey(1, 5)]
    machine.stop()

    machines.storage.calls.clear()
    again = machines.new()
    assert again.start() == 5
    assert machines.storage.count("upload", "checkpoint-5/*") == 0
    assert again.waiting() == []
    assert machines.committed() == [(1, 5)]


def test_law_1_without_exclusive_create_attempts_above_1_use_their_suffix(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(LocalBackend, "create", LocalBackend.write)  # as a store that ignores the condition
    first, second = machines.new("first"), machines.new("second")
    first.start()
    assert "best effort" in caplog.text
    second.start()
    for machine in (second, first):
        machine.save(5, salt=machine.output_dir.name)
        machine.land()

    folders = {key.attempt: machines.catalog.read(key).folder for key in machines.catalog.checkpoints()}
    assert folders == {1: "checkpoint-5", 2: "checkpoint-5.a2"}
    assert machines.committed() == [(1, 5), (2, 5)]


def test_law_1_an_interrupted_upload_continues_in_its_own_folder(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.fail("upload", path="*/model.safetensors", times=1_000)
    machine.save(5)
    wait_until(lambda: machine.checkpointer.upload_queue.last_error, "a failed try")
    machine.stop()
    machines.storage.heal()

    assert machines.new().start() == 5
    assert machines.catalog.read(CheckpointKey(1, 5)).folder == "checkpoint-5"
    assert machines.committed() == [(1, 5)]


def test_law_1_two_starts_at_once_take_different_attempt_numbers(machines: Machines) -> None:
    first, second = machines.new("first").checkpointer, machines.new("second").checkpointer
    numbers = first.catalog.attempts.numbers

    def numbers_while_the_second_starts() -> list[int]:
        found = numbers()
        if not second.attempt:
            second.begin(0)
        return found

    first.catalog.attempts.numbers = numbers_while_the_second_starts
    assert first.begin(0).number == 2
    assert second.attempt.number == 1


def test_law_1_a_folder_without_a_manifest_is_not_a_checkpoint(machines: Machines) -> None:
    write_checkpoint(machines.run, 7)
    assert machines.committed() == []
    checkpointer: Checkpointer = machines.new().checkpointer
    assert checkpointer.restore() is None
