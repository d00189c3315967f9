"""The Checkpointer in one process, on several ranks with one disk, and on several hosts. Ranks are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.exactness import Exactness
from hf_cloudtrain.checkpoints.host_parts import HostParts
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Position
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.errors import (
    CloudTrainError,
    ConfigurationError,
    NotCommittedError,
    PeerError,
    PositionError,
    RunHasCheckpointsError,
    StorageError,
)
from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.storage.local_backend import LocalBackend
from tests.faults.ranks import on_ranks
from tests.faults.runs import (
    DEADLINE,
    Machines,
    bytes_of,
    contents,
    wait_until,
    write_checkpoint,
    write_files,
)

Train = Callable[[Checkpointer, Ranks], object]


def on_one_host(machines: Machines, monkeypatch: pytest.MonkeyPatch, size: int, train: Train) -> list[object]:
    return on_ranks(size, lambda ranks: train(machines.new("out").checkpointer, ranks), monkeypatch)


def on_hosts(machines: Machines, monkeypatch: pytest.MonkeyPatch, size: int, train: Train) -> list[object]:
    """Each rank on a disk of its own."""
    return on_ranks(
        size, lambda ranks: train(machines.new(f"host-{ranks.rank}").checkpointer, ranks), monkeypatch
    )


def save_together(checkpointer: Checkpointer, ranks: Ranks) -> Path | None:
    """Resume, or save step 5 with a file of each rank; the restored folder, if any."""
    restored = checkpointer.restore(wanted=lambda path: path in {*bytes_of(5), f"rng_{ranks.rank}.pth"})
    checkpointer.begin(restored.manifest.step if restored else 0)
    if restored is None:
        folder = checkpointer.output_dir / "checkpoint-5"
        if ranks.is_leader:
            write_checkpoint(checkpointer.output_dir, 5, salt="" if ranks.is_main else "other host")
        ranks.barrier()
        write_files(folder, {f"rng_{ranks.rank}.pth": bytes([ranks.rank])})
        if not ranks.is_main and ranks.is_leader:  # sharded frameworks write no file twice
            for path in bytes_of(5):
                (folder / path).unlink()
        checkpointer.save(folder, Position(global_step=5))
        checkpointer.wait(20.0)
    return restored.path if restored else None


def test_all_ranks_are_one_attempt_and_one_of_them_uploads(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = on_one_host(
        machines,
        monkeypatch,
        3,
        lambda checkpointer, ranks: (
            save_together(checkpointer, ranks),
            checkpointer.attempt.number,
            checkpointer.upload_queue is not None,
        ),
    )
    assert answers == [(None, 1, True), (None, 1, False), (None, 1, False)]
    assert machines.catalog.attempts.numbers() == [1]
    assert machines.committed() == [(1, 5)]
    files = {file.path for file in machines.catalog.read(CheckpointKey(1, 5)).files}
    assert files == {*bytes_of(5), "rng_0.pth", "rng_1.pth", "rng_2.pth"}


def test_hosts_commit_one_checkpoint_of_all_their_files(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert on_hosts(machines, monkeypatch, 2, save_together) == [None, None]
    assert machines.committed() == [(1, 5)]
    files = {file.path for file in machines.catalog.read(CheckpointKey(1, 5)).files}
    assert files == {*bytes_of(5), "rng_0.pth", "rng_1.pth"}


def test_only_the_first_host_deletes_and_all_hosts_keep_every_nth_save(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other host commits the last checkpoint, after the first host's last pass."""

    def others_part_is_late(checkpointer: Checkpointer) -> None:
        upload_queue, attempt = checkpointer.upload_queue, checkpointer.attempt
        assert upload_queue is not None
        assert attempt is not None
        nonce = f"{attempt.nonce}-15"
        parts = HostParts(checkpointer.catalog, CheckpointKey(1, 15), nonce, save=1, hosts=2)
        wait_until(lambda: parts.missing() == [1], "the part of the first host")
        wait_until(
            lambda: not (upload_queue.pending() or upload_queue._retention.is_running),
            "the pass of the first host",
        )
        machines.gate.set()

    machines.storage.hold("upload", machines.gate, path="checkpoint-15/rng_1.pth")

    def train(checkpointer: Checkpointer, ranks: Ranks) -> tuple[bool, bool]:
        checkpointer.policy = Policy(1, keep_every_n_steps=10)
        checkpointer.begin(0)
        for step in (5, 10, 12, 15):
            folder = checkpointer.output_dir / f"checkpoint-{step}"
            write_files(folder, {f"rng_{ranks.rank}.pth": b"x"})
            checkpointer.save(folder, Position(global_step=step))
            if step == 15 and ranks.is_main:
                others_part_is_late(checkpointer)
            checkpointer.wait(DEADLINE)
        checkpointer.finish(DEADLINE)
        assert checkpointer.upload_queue is not None
        retention = checkpointer.upload_queue._retention
        assert retention is not None
        return retention.is_active, retention.policy.is_milestone(10)

    assert on_hosts(machines, monkeypatch, 2, train) == [(True, True), (False, True)]
    assert machines.committed() == [(1, 10), (1, 15)]
    assert not machines.catalog.storage.list(".cloudtrain/parts/000001-0000000005")


def test_a_first_host_without_files_deletes_old_checkpoints_of_the_others(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(checkpointer: Checkpointer, ranks: Ranks) -> None:
        checkpointer.policy = Policy(1)
        checkpointer.begin(0)
        for step in (5, 10, 15):
            folder = checkpointer.output_dir / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            if not ranks.is_main:
                write_files(folder, {"model": b"x"})
            ranks.barrier()
            checkpointer.save(folder, Position(global_step=step))
            checkpointer.wait(DEADLINE)

    assert on_hosts(machines, monkeypatch, 2, train) == [None, None]
    wait_until(lambda: not machines.catalog.holds(CheckpointKey(1, 5)), "the pass after the third save")
    assert machines.catalog.holds(CheckpointKey(1, 15))


def test_slow_hosts_still_send_every_nth_save(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(checkpointer: Checkpointer, ranks: Ranks) -> None:
        checkpointer.policy = Policy(1, keep_every_n_steps=10)
        checkpointer.begin(0)
        for step in (5, 10, 15, 25):
            folder = checkpointer.output_dir / f"checkpoint-{step}"
            write_files(folder, {f"rng_{ranks.rank}.pth": b"x"})
            checkpointer.save(folder, Position(global_step=step))
            if step == 5:
                wait_until(lambda: machines.storage.count("upload", "checkpoint-5/*"), "the first upload")
        ranks.barrier()
        machines.gate.set()
        checkpointer.finish(DEADLINE)

    machines.storage.hold("upload", machines.gate, path="checkpoint-*")
    assert on_hosts(machines, monkeypatch, 2, train) == [None, None]
    assert machines.committed() == [(1, 10), (1, 25)]


def test_each_host_restores_what_it_wants(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hosts(machines, monkeypatch, 2, save_together)
    for machine in machines.made:
        machine.rotate(5)
    folders = on_hosts(machines, monkeypatch, 2, save_together)
    for rank, folder in enumerate(folders):
        assert isinstance(folder, Path)
        assert contents(folder) == bytes_of(5) | {f"rng_{rank}.pth": bytes([rank])}
        assert f"host-{rank}" in str(folder)


def test_a_checkpoint_that_one_host_cannot_read_is_restored_on_no_host(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_hosts(machines, monkeypatch, 2, save_together)
    for machine in machines.made:
        machine.rotate(5)
    (machines.run / "checkpoint-5/rng_1.pth").write_bytes(b"x")
    answers = on_hosts(machines, monkeypatch, 2, save_together)
    assert [type(answer).__name__ for answer in answers] == ["CorruptCheckpointError"] * 2


def save_twice(
    machines: Machines, checkpointer: Checkpointer, ranks: Ranks, second_upload: threading.Event
) -> None:
    """The second save of a step comes when one host has uploaded its part of the first, and the other has not."""
    checkpointer.begin(0)
    if ranks.is_main:
        machines.storage.hold("upload", machines.gate, path="*/model-1")
        machines.storage.hold("upload", second_upload, path="*/model-0", call=2)
    ranks.barrier()
    for salt in (b"first", b"second"):
        folder = checkpointer.output_dir / salt.decode()
        write_files(folder, {f"model-{ranks.rank}": salt})
        checkpointer.save(folder, Position(global_step=5))
        if ranks.is_main and salt == b"first":
            wait_until(lambda: machines.catalog.storage.list(".cloudtrain/parts"), "the part of one host")
        ranks.barrier()
    machines.gate.set()
    if ranks.rank == 1:
        checkpointer.upload_queue.wait(20.0)  # its part is on storage
        second_upload.set()
    checkpointer.wait(20.0)


@pytest.mark.parametrize("slow", ["the second save of one host", "nothing"])
def test_a_step_that_hosts_saved_twice_is_committed_from_one_of_the_saves(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    second_upload = threading.Event()
    if slow == "nothing":
        second_upload.set()
    try:
        done = on_hosts(
            machines,
            monkeypatch,
            2,
            lambda checkpointer, ranks: save_twice(machines, checkpointer, ranks, second_upload),
        )
    finally:
        second_upload.set()
    assert done == [None, None]
    assert machines.committed() == [(1, 5)]
    found = machines.restored("elsewhere")
    assert found is not None
    assert set(found) == {"model-0", "model-1"}
    mixed = len(set(found.values())) > 1
    assert not (mixed and machines.catalog.read(CheckpointKey(1, 5)).exact), (
        "files of two moments are not an exact position"
    )


def test_hosts_commit_without_exclusive_create(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems refuse the condition instead of ignoring it; the answer of rank 0 holds for all ranks."""

    def refused(self: LocalBackend, path: str, data: bytes) -> None:
        raise NotImplementedError("mode='create'")

    monkeypatch.setattr(LocalBackend, "create", refused)
    assert on_hosts(machines, monkeypatch, 2, save_together) == [None, None]
    assert machines.committed() == [(1, 5)]


def test_an_error_on_one_rank_is_raised_on_all_ranks_with_its_type(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_one_host(machines, monkeypatch, 1, save_together)
    answers = on_one_host(machines, monkeypatch, 3, lambda checkpointer, ranks: checkpointer.begin(0))
    assert [type(answer) for answer in answers] == [RunHasCheckpointsError] * 3


def test_unreachable_storage_is_an_error_on_all_ranks(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.storage.fail("any", times=1_000)
    answers = on_one_host(machines, monkeypatch, 2, lambda checkpointer, ranks: checkpointer.restore())
    assert all(isinstance(answer, StorageError) for answer in answers)
    assert all("connection reset on purpose" in str(answer) for answer in answers)


def test_a_folder_that_cannot_be_written_is_an_error_on_all_ranks(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machines.run.parent / "out").write_text("a file is in the way")
    answers = on_one_host(machines, monkeypatch, 2, lambda checkpointer, ranks: checkpointer.begin(0))
    assert all(isinstance(answer, (PeerError, ConfigurationError, OSError)) for answer in answers)


def test_a_checkpoint_that_does_not_fit_is_refused_before_its_download(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()

    def refuse(manifest: object) -> None:
        raise PositionError("another world size")

    elsewhere = machines.new("elsewhere").checkpointer
    machines.storage.calls.clear()
    with pytest.raises(PositionError):
        elsewhere.restore(accept=refuse)
    assert machines.storage.count("download", "checkpoint-*") == 0


def test_a_suffixed_folder_is_restored_under_its_plain_name(machines: Machines) -> None:
    for name in ("first", "second"):
        machine = machines.new(name, fresh=True)
        machine.start()
        machine.save(5, salt=name)
        machine.wait()
    elsewhere = machines.new("elsewhere")
    assert elsewhere.start() == 5
    assert contents(elsewhere.output_dir / "checkpoint-5") == bytes_of(5, "second")
    assert machines.catalog.read(CheckpointKey(2, 5)).folder == "checkpoint-5.a2"


def test_a_resume_logs_why_it_is_not_exact(machines: Machines, caplog: pytest.LogCaptureFixture) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5, exactness=Exactness.no("no time was left for the evaluation"))
    machine.wait()
    caplog.clear()
    machines.new("elsewhere").start()
    why = "A resume will not equal an uninterrupted run: no time was left for the evaluation."
    assert [record.getMessage() for record in caplog.records] == [f"checkpoint-5: {why}"]


def test_a_framework_that_starts_over_begins_a_second_attempt_in_one_process(
    machines: Machines,
) -> None:
    """With a smaller batch after running out of memory, training begins at step 0 again, which is allowed."""
    machine = machines.new()
    machine.start()
    machine.save(5, salt="too large")
    wait_until(machines.catalog.checkpoints, "the commit")
    assert machine.checkpointer.begin(0, started_over=True).number == 2
    machine.save(5, salt="smaller")
    machine.wait()
    assert machines.committed() == [(1, 5), (2, 5)]
    assert machines.restored("elsewhere") == bytes_of(5, "smaller")


def test_a_second_training_in_one_process_that_starts_at_0_is_refused_as_any_other(
    machines: Machines,
) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    with pytest.raises(RunHasCheckpointsError):
        machine.checkpointer.begin(0)


def test_left_overs_of_another_run_are_named_and_stay(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.fail("upload", times=1_000)
    machine.save(5)
    wait_until(lambda: machine.checkpointer.upload_queue.last_error, "a failed try")
    machine.stop()

    other = Checkpointer(f"{machines.storage.url}-2", machine.output_dir)
    other.restore()
    assert f"checkpoint-5 of the run '{machines.storage.url}'" in caplog.text
    assert f"cloudtrain checkpoint flush {machine.output_dir}" in caplog.text
    assert machine.waiting() == [CheckpointKey(1, 5)]


def test_a_folder_is_committed_under_a_name_and_its_url_returned(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    write_files(machine.output_dir / "final-model", {"model.safetensors": b"final"})
    url = machine.checkpointer.save_folder(machine.output_dir / "final-model", "final")
    again = machine.checkpointer.save_folder(machine.output_dir / "final-model", "final")
    assert (url, again) == (f"{machines.storage.url}/final", f"{machines.storage.url}/final.2")
    assert contents(machines.run / "final") == {"model.safetensors": b"final"}
    assert machines.committed() == []


def test_a_folder_can_be_committed_before_any_training(machines: Machines) -> None:
    checkpointer = machines.new().checkpointer
    write_files(checkpointer.output_dir / "x", {"a": b"1"})
    assert checkpointer.save_folder(checkpointer.output_dir / "x", "data").endswith("/data")


def test_a_folder_that_is_not_uploaded_in_time_is_an_error_and_stays_in_the_outbox(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_DRAIN_TIMEOUT", "0.1")
    machine = machines.new()
    machine.start()
    write_files(machine.output_dir / "x", {"a": b"1"})
    machines.storage.fail("upload", times=1_000_000)
    with pytest.raises(NotCommittedError, match="final"):
        machine.checkpointer.save_folder(machine.output_dir / "x", "final")
    assert [entry.name for entry in machine.checkpointer.outbox.entries()] == ["final"]


def test_a_folder_name_like_that_of_a_checkpoint_is_refused(machines: Machines) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a folder"):
        machines.new().checkpointer.save_folder(machines.run, "checkpoint-5")


def test_metrics_that_are_not_json_do_not_end_the_training(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5, metrics={"loss": float("nan")})
    machine.save(10)
    machine.wait()
    assert (1, 10) in machines.committed()


def test_the_record_of_an_attempt_names_host_and_command(machines: Machines) -> None:
    machines.new().start()
    [attempt] = machines.catalog.attempts.read_all()
    assert {"host", "pid", "command", "python"} <= set(attempt.facts)
    assert attempt.started > 0


def test_storage_options_may_come_from_the_environment(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_RUN_URL", machines.storage.url)
    assert Checkpointer(None, machines.run.parent / "out").storage.url == machines.storage.url
    monkeypatch.setenv("HF_CLOUDTRAIN_STORAGE_OPTIONS", "[]")
    with pytest.raises(CloudTrainError, match="HF_CLOUDTRAIN_STORAGE_OPTIONS"):
        Checkpointer(None, machines.run.parent / "out")


def test_a_save_before_begin_is_an_error_that_says_so(machines: Machines) -> None:
    machine = machines.new()
    with pytest.raises(ConfigurationError, match=r"call begin\(\) before the first save\(\)"):
        machine.save(5)
    assert machine.waiting() == []
