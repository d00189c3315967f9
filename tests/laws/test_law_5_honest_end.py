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
"""Seconds of a wait that must time out."""


def test_law_5_the_end_waits_for_the_last_commit(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.fail("upload", path="*/model.safetensors", times=3)
    machine.save(5)
    machine.wait()
    assert machines.committed() == [(1, 5)]


def test_law_5_during_an_outage_training_ends_with_an_error_that_names_the_flush_command(
    machines: Machines,
) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.fail("any", times=1_000_000)
    machine.save(5)
    with pytest.raises(NotCommittedError) as raised:
        machine.checkpointer.wait(SHORT)
    message = str(raised.value)
    assert "checkpoint-5 (attempt 1)" in message
    assert f"cloudtrain checkpoint flush {machine.output_dir}" in message
    assert "connection reset on purpose" in message

    machine.stop()
    machines.storage.heal()
    flush(machines.catalog, machine.checkpointer.outbox, Progress())
    assert machines.committed() == [(1, 5)]


def test_law_5_a_run_that_saved_nothing_ends_with_an_error(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    with pytest.raises(NotCommittedError, match="without saving any checkpoint"):
        machine.wait()


def test_law_5_a_run_whose_last_save_failed_ends_with_an_error(
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


def test_law_5_a_run_whose_last_manifest_was_deleted_ends_with_an_error(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    # Not as soon as the manifest is there: it is read back, and one that is gone by then is committed again.
    queue = machine.checkpointer.upload_queue
    assert queue is not None
    queue.wait(60)
    machines.storage.delete([".cloudtrain/checkpoints/000001-0000000005.json"])
    with pytest.raises(NotCommittedError, match=r"000001-0000000005, is not on"):
        machine.wait()


def test_law_5_a_resume_with_nothing_left_to_train_ends_without_an_error(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    again = machines.new("again")
    assert again.start() == 5
    again.wait()
    assert machines.committed() == [(1, 5)]


def test_law_5_all_ranks_raise_the_error_at_the_end(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only rank 0 uploads, but the other ranks must not continue as if the upload had succeeded."""

    def train(ranks: Ranks) -> None:
        checkpointer = machines.new().checkpointer
        checkpointer.restore()
        checkpointer.begin(0)
        if ranks.is_main:
            machines.storage.fail("any", times=1_000_000)
            write_checkpoint(checkpointer.output_dir, 5)
        checkpointer.save(checkpointer.output_dir / "checkpoint-5", Position(global_step=5))
        checkpointer.wait(SHORT)

    results = on_ranks(3, train, monkeypatch)
    assert [type(result) for result in results] == [NotCommittedError] * 3
    assert all("cloudtrain checkpoint flush" in str(result) for result in results)


def test_law_5_a_file_rewritten_in_place_during_its_upload_is_never_committed(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    """`torch.save` to the same path writes through the hard link."""
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
    wait_until(lambda: machines.storage.count("upload", "checkpoint-5/*"), "the upload of the first save")
    machine.rotate(5)
    machine.save(5, salt="second")
    machines.gate.set()
    machine.wait()
    assert machines.committed() == [(1, 5)]
    assert machines.restored("elsewhere") == bytes_of(5, "second")


def test_law_5_a_second_save_of_a_committed_step_is_ignored(machines: Machines) -> None:
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
retries.PAUSES = (0.5,)  # only a process that waits for the upload makes the second try
cloud = FaultyStorage(f"file://{folder}/run")
contextlib.ExitStack().enter_context(keep := cloud.everywhere())
machine = Machine(folder / "out", cloud.url)
machine.start()
cloud.fail("upload", path="*/model.safetensors", times=1_000 if down else 1)
machine.save(5)
if end == "wait timed out":
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


def stderr_of_script(folder: Path, end: str, storage: str = "up", timeout: str = "60") -> str:
    """The messages of a training script that ends without waiting."""
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
    messages = stderr_of_script(machines.run.parent, end)
    assert "Finishing the upload" in messages
    assert machines.committed() == [(1, 5)]


def test_law_5_a_script_whose_wait_timed_out_and_that_saved_again_still_commits(machines: Machines) -> None:
    messages = stderr_of_script(machines.run.parent, "wait timed out")
    assert "Finishing the upload" in messages
    assert machines.committed()[-1] == (1, 6)


def test_law_5_a_script_that_ends_during_an_outage_names_the_flush_command(machines: Machines) -> None:
    messages = stderr_of_script(machines.run.parent, "exception", storage="down", timeout="0.2")
    assert "RuntimeError: the script broke" in messages
    assert f"cloudtrain checkpoint flush {machines.run.parent / 'out'}" in messages
    flush(machines.catalog, machines.new("out").checkpointer.outbox, Progress())
    assert machines.committed() == [(1, 5)]
