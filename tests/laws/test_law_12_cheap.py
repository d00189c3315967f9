"""Law 12, Cheap: no cost that grows with the number of past checkpoints, and no request during a step."""

from __future__ import annotations

from collections import Counter

import pytest

from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.testing import Call
from hf_cloudtrain.tracking.tracker import StepTracker
from tests.faults.runs import Machine, Machines, bytes_of


def write_old_manifests(machines: Machines, count: int) -> None:
    """Write `count` manifests of older checkpoints. They are empty, so only their names may be used."""
    for step in range(1, count + 1):
        machines.storage.write(f".cloudtrain/checkpoints/000001-{step:010d}.json", b"{}")


def test_law_12_finding_the_newest_of_1000_checkpoints_costs_one_list(machines: Machines) -> None:
    write_old_manifests(machines, 1_000)
    machines.storage.calls.clear()
    assert machines.catalog.newest() == CheckpointKey(1, 1_000)
    assert machines.storage.calls == [Call("list", ".cloudtrain/checkpoints")]


def test_law_12_a_restore_costs_one_list_one_pointer_one_manifest_and_its_own_files(
    machines: Machines,
) -> None:
    write_old_manifests(machines, 50)
    machine = machines.new(fresh=True)
    machine.start()
    machine.save(100)
    machine.wait()
    elsewhere = machines.new("elsewhere").checkpointer
    machines.storage.calls.clear()
    elsewhere.restore()
    of_the_probe = [call for call in machines.storage.calls if "/probe" in call.path]
    rest = [call for call in machines.storage.calls if call not in of_the_probe]
    assert sorted(rest) == sorted(
        [
            Call("list", ".cloudtrain/checkpoints"),
            Call("read", ".cloudtrain/last.json"),
            Call("read", ".cloudtrain/checkpoints/000001-0000000100.json"),
            *(Call("download", f"checkpoint-100/{path}") for path in bytes_of(100)),
        ]
    )
    assert len(of_the_probe) <= 7


def requests_of_a_save(machines: Machines, machine: Machine, step: int) -> Counter[str]:
    machines.storage.calls.clear()
    machine.save(step)
    machine.wait()
    return Counter(call.kind for call in machines.storage.calls)


def test_law_12_a_save_costs_the_same_with_many_checkpoints_as_with_few(machines: Machines) -> None:
    machine = machines.new(fresh=True)
    machine.start()
    requests_of_a_save(machines, machine, 1_001)
    few = requests_of_a_save(machines, machine, 1_002)
    write_old_manifests(machines, 200)
    assert requests_of_a_save(machines, machine, 1_003) == few


def test_law_12_a_start_costs_the_same_with_many_checkpoints_as_with_few(machines: Machines) -> None:
    def requests_of_a_start(name: str) -> int:
        machines.storage.calls.clear()
        machines.new(name).start()
        return machines.storage.count()

    machine = machines.new(fresh=True)
    machine.start()
    machine.save(1_001)
    machine.wait()
    few = requests_of_a_start("few")
    write_old_manifests(machines, 200)
    assert requests_of_a_start("many") == few


def test_law_12_a_failed_commit_does_not_upload_the_files_again(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.fail("create", path="*/checkpoints/*", times=6)  # all retries of the client
    machine.save(5)
    machine.wait()
    assert machines.storage.count("create", "*/checkpoints/*") == 7
    assert machines.storage.count("upload", "checkpoint-5/*") == len(bytes_of(5))


def test_law_12_a_second_try_uploads_only_the_missing_files(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.fail("upload", path="*/model.safetensors", times=6)
    machine.save(5)
    machine.wait()
    sent = Counter(call.path for call in machines.storage.calls if call.path.startswith("checkpoint-5/"))
    assert sent == {f"checkpoint-5/{path}": 1 for path in bytes_of(5)} | {"checkpoint-5/model.safetensors": 7}


def test_law_12_a_step_makes_no_request_and_waits_for_nothing(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracker's thread is never started here, so any request would come from the step itself."""
    tracker = StepTracker(machines.catalog, 1, first_step=0, total_steps=100)
    monkeypatch.setattr("time.sleep", pytest.fail)
    machines.storage.calls.clear()
    for step in range(1, 101):
        tracker.begin_step()
        tracker.end_step(step)
        tracker.log(step, {"loss": 0.5})
    assert machines.storage.calls == []
