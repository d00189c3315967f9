"""Storage is unreachable, slow, throttling or silent for a while: training is not blocked, and nothing is lost."""

from __future__ import annotations

import logging
import threading

import pytest

from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.errors import NotCommittedError, StoragePermissionError, StorageUnavailableError
from hf_cloudtrain.storage import retries, silence
from tests.faults.runs import DEADLINE, Machines, bytes_of, wait_until

SCALE = 1_000
"""How much faster time passes: ten minutes take 0.6 s."""
PAUSES, RETRY_PAUSES = upload_queue.PAUSES, retries.PAUSES
"""The real pauses; a fixture makes them shorter in these tests."""


def test_an_outage_of_ten_minutes_warns_once_and_everything_is_committed_afterwards(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upload_queue, "PAUSES", tuple(pause / SCALE for pause in PAUSES))
    monkeypatch.setattr(retries, "PAUSES", tuple(pause / SCALE for pause in RETRY_PAUSES))
    monkeypatch.setattr(upload_queue, "MAX_WAITING", 10)  # so that no entry is dropped for a newer one
    machine = machines.new()
    machine.start()
    machines.storage.fail("any", times=1_000_000)
    end_of_outage = threading.Timer(600 / SCALE, machines.storage.heal)
    end_of_outage.start()
    machine.save(5, best=True)
    machine.save(10, best=True)
    machine.save(15)
    end_of_outage.join()
    requests = machines.storage.count("manifest")  # each try begins with such a request
    machine.wait()
    assert machines.committed() == [(1, 5), (1, 10), (1, 15)]
    assert machines.restored("elsewhere") == bytes_of(15)
    # A try is six requests, and there are 5 + 15 + 30 + 9 x 60 seconds in ten minutes; pauses may be half as long.
    assert requests <= 6 * (12 * 2 + 3)
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (
        len([record for record in warned if "will be tried again; training continues" in record.getMessage()])
        == 1
    )


def test_an_upload_that_hangs_is_given_up_and_the_next_checkpoint_is_uploaded(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence, "SILENCE", 0.3)
    machine = machines.new()
    machine.start()
    machines.storage.hang("files", path="checkpoint-5/model.safetensors", times=1_000_000)
    machine.save(5)
    wait_until(lambda: machines.storage.count("files", "checkpoint-5/model.safetensors"), "the upload")
    machine.save(10)
    wait_until(lambda: (1, 10) in machines.committed(), "the next commit")
    wait_until(
        lambda: [key.step for key in machine.waiting()] == [5], "the removal of step 10 from the outbox"
    )
    machines.storage.heal()
    machine.wait()
    assert machines.committed() == [(1, 5), (1, 10)]


def test_an_upload_that_hangs_does_not_delay_the_end_beyond_its_deadline(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.hang("files", times=1_000_000)
    machine.save(5)
    with pytest.raises(NotCommittedError, match=r"checkpoint-5 .*cloudtrain checkpoint flush"):
        machine.checkpointer.wait(0.1)


def test_a_restore_that_hangs_ends_with_an_error(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    machines.storage.hang("fetch", times=1_000_000)
    monkeypatch.setattr(silence, "SILENCE", 0.2)
    with pytest.raises(StorageUnavailableError, match=r"download .*no answer and no byte"):
        machines.restored("elsewhere")


def test_credentials_that_are_renewed_late_lose_no_checkpoint(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.fail("any", StoragePermissionError("ExpiredToken"), times=1_000_000)
    machine.save(5)
    wait_until(lambda: machine.checkpointer.upload_queue.last_error, "a failed try")
    assert "tried again; training continues. ExpiredToken" in caplog.text
    machines.storage.heal()
    machine.checkpointer.wait(DEADLINE)
    assert machines.committed() == [(1, 5)]


def test_a_stale_listing_does_not_cause_a_second_upload(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.lie("late", "arrival")
    machine.save(5)
    machine.wait()
    assert machines.storage.count("files", "checkpoint-5/model.safetensors") == 1


def test_only_a_file_that_did_not_arrive_is_uploaded_again(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.corrupt("files", lambda data: data[:-1], path="checkpoint-5/trainer_state.json")
    machine.save(5)
    machine.wait()
    sent = {path: machines.storage.count("files", f"checkpoint-5/{path}") for path in bytes_of(5)}
    assert sent == {**dict.fromkeys(bytes_of(5), 1), "trainer_state.json": 2}
    assert machines.committed() == [(1, 5)]


def test_the_newest_checkpoint_is_found_by_its_pointer_if_a_listing_lacks_it(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    machines.storage.lie("late", "newest", times=1_000_000)
    machine.save(10)
    machine.checkpointer.wait(DEADLINE)
    assert machines.new("elsewhere").start() == 10
    assert "lacks 000001-0000000010, which exists" in caplog.text


def test_a_manifest_that_was_corrupted_in_transit_is_written_again(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.corrupt("commit")
    machine.save(5)
    machine.wait()
    assert machines.storage.count("commit") == 2
    assert machines.restored("elsewhere") == bytes_of(5)


def test_a_manifest_that_cannot_be_found_after_its_write_is_not_deleted(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.lie("missing", "manifest", times=4)
    machine.save(5)
    machine.wait()
    assert machines.storage.count("retire") == 0
    assert machines.restored("elsewhere") == bytes_of(5)
