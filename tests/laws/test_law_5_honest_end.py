"""Law 5, Honest end: training ends when its last checkpoint is committed, or with an error that says how to finish."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.flush import flush
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.errors import NotCommittedError
from hf_cloudtrain.runtime.progress import Progress
from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.testing import flip_bit
from tests.faults.ranks import on_ranks
from tests.faults.runs import Machines, bytes_of, wait_until, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = 0.2
"""Seconds of a wait that is meant to fail."""


def test_law_5_the_end_waits_for_the_last_commit(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.fail("upload", path="*/model.safetensors", times=3)
    machine.save(5)
    machine.wait()
    assert machines.committed() == [(1, 5)]


def test_law_5_with_storage_down_the_end_is_an_error_that_names_the_flush_command(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.fail("any", times=1_000_000)
    machine.save(5)
    with pytest.raises(NotCommittedError) as told:
        machine.checkpointer.wait(SHORT)
    message = str(told.value)
    assert "checkpoint-5 (attempt 1)" in message
    assert f"cloudtrain checkpoint flush {machine.output_dir}" in message
    assert "connection reset on purpose" in message

    machine.stop()
    machines.storage.heal()
    flush(machines.catalog, machine.checkpointer.outbox, Progress())
    assert machines.committed() == [(1, 5)]


def test_law_5_a_run_that_saved_nothing_does_not_end_green(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    with pytest.raises(NotCommittedError, match="without saving any checkpoint"):
        machine.wait()


def test_law_5_a_last_save_that_could_not_be_kept_does_not_end_green(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine.checkpointer.outbox, "accept", full)
    machine.save(10)
    with pytest.raises(NotCommittedError, match=r"000001-0000000010.*No space left on device"):
        machine.wait()


def test_law_5_a_manifest_that_vanished_does_not_end_green(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    wait_until(machines.catalog.checkpoints, "the commit")
    machines.storage.delete([".cloudtrain/checkpoints/000001-0000000005.json"])
    with pytest.raises(NotCommittedError, match=r"000001-0000000005, is not on"):
        machine.wait()


def test_law_5_a_resume_with_nothing_left_to_train_ends_green(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    again = machines.new("again")
    again.start()
    again.wait()


def test_law_5_the_end_fails_on_all_ranks_together(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 alone moves bytes; the others must not go on to the next thing as if all were well."""

    def train(ranks: Ranks) -> None:
        checkpointer = machines.new().checkpointer
        checkpointer.restore()
        checkpointer.begin(0)
        if ranks.is_main:
            machines.storage.fail("any", times=1_000_000)
            write_checkpoint(checkpointer.output_dir, 5)
        checkpointer.save(checkpointer.output_dir / "checkpoint-5", Position(global_step=5))
        checkpointer.wait(SHORT)

    answers = on_ranks(3, train, monkeypatch)
    assert [type(answer) for answer in answers] == [NotCommittedError] * 3
    assert all("cloudtrain checkpoint flush" in str(answer) for answer in answers)


def test_law_5_a_file_written_again_in_place_during_its_upload_is_never_committed(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    """torch.save to the same path writes through the hard link."""
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    machines.storage.hold("upload", machines.gate, path="checkpoint-10/*")
    folder = machine.save(10)
    wait_until(lambda: machines.storage.count("upload", "checkpoint-10/*"), "the upload")
    model = folder / "model.safetensors"
    model.write_bytes(flip_bit(model.read_bytes()))
    machines.gate.set()

    with pytest.raises(NotCommittedError, match="000001-0000000010"):
        machine.wait()
    assert "'model.safetensors' of checkpoint-10" in caplog.text
    assert "was written again after it was saved" in caplog.text
    assert machines.committed() == [(1, 5)]
    assert machines.restored("elsewhere") == bytes_of(5)


def test_law_5_a_second_save_of_a_step_before_its_commit_wins(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.hold("upload", machines.gate, path="checkpoint-*")
    machine.save(5, salt="first")
    wait_until(lambda: machines.storage.count("upload", "checkpoint-5/*"), "the upload of the first")
    machine.rotate(5)
    machine.save(5, salt="second")
    machines.gate.set()
    machine.wait()
    assert machines.committed() == [(1, 5)]
    assert machines.restored("elsewhere") == bytes_of(5, "second")


def test_law_5_a_second_save_of_a_step_after_its_commit_is_no_new_checkpoint(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5, salt="first")
    machine.wait()
    requests = machines.storage.count()
    machine.save(5, salt="second")
    assert machine.waiting() == []
    assert machines.storage.count() == requests
    assert machines.restored("elsewhere") == bytes_of(5, "first")


ENDS_EARLY = """
import contextlib, os, signal, sys
from pathlib import Path
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.storage import retries
from hf_cloudtrain.testing import FaultyStorage
from tests.faults.runs import Machine

folder, end, down = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "down"
retries.PAUSES = (0.5,)  # only a process that waits for the upload sees its second try
cloud = FaultyStorage(f"file://{folder}/run")
contextlib.ExitStack().enter_context(keep := cloud.everywhere())
machine = Machine(folder / "out", cloud.url)
machine.start()
cloud.fail("upload", path="*/model.safetensors", times=1_000 if down else 1)
machine.save(5)
if end == "waited and went on":
    with contextlib.suppress(CloudTrainError):
        machine.checkpointer.wait(0.01)
    machine.save(6)
    raise RuntimeError("the script broke later")
if end == "exception":
    raise RuntimeError("the script broke")
if end == "Ctrl-C":
    os.kill(os.getpid(), signal.SIGINT)
if end == "sys.exit":
    sys.exit(3)
"""


def ends_early(folder: Path, end: str, storage: str = "up", timeout: str = "60") -> str:
    """What a training script says that ends without waiting."""
    ended = subprocess.run(
        [sys.executable, "-c", ENDS_EARLY, str(folder), end, storage],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={"HF_CLOUDTRAIN_DRAIN_TIMEOUT": timeout, "PATH": "/usr/bin:/bin"},
        timeout=100,
        check=False,
    )
    assert (ended.returncode == 0) == (end == "end of the script")
    return ended.stderr


@pytest.mark.parametrize("end", ["exception", "Ctrl-C", "sys.exit", "end of the script"])
def test_law_5_a_script_that_ends_without_waiting_still_commits(machines: Machines, end: str) -> None:
    said = ends_early(machines.run.parent, end)
    assert "Finishing the upload" in said
    assert machines.committed() == [(1, 5)]


def test_law_5_a_script_that_waited_in_vain_and_saved_again_still_commits(machines: Machines) -> None:
    said = ends_early(machines.run.parent, "waited and went on")
    assert "Finishing the upload" in said
    assert machines.committed()[-1] == (1, 6)


def test_law_5_a_script_that_ends_with_storage_down_names_the_flush_command(machines: Machines) -> None:
    said = ends_early(machines.run.parent, "exception", storage="down", timeout="0.2")
    assert "RuntimeError: the script broke" in said
    assert f"cloudtrain checkpoint flush {machines.run.parent / 'out'}" in said
    flush(machines.catalog, machines.new("out").checkpointer.outbox, Progress())
    assert machines.committed() == [(1, 5)]
