"""The faults of `hf_cloudtrain.testing` happen, and only where they were configured."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import retire
from hf_cloudtrain.checkpoints.host_parts import HostParts
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.errors import ObjectNotFoundError, StoragePermissionError, StorageUnavailableError
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.testing import (
    CRASH_STATUS,
    DISK_POINTS,
    POINTS,
    Call,
    CrashPoint,
    FaultyDisk,
    FaultyStorage,
    flip_bit,
)
from hf_cloudtrain.tracking.records import StepRecords
from tests.faults.runs import DEADLINE, Machines, wait_until

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def storage(tmp_path: Path, no_pauses: None) -> FaultyStorage:
    return FaultyStorage(f"file://{tmp_path / 'run'}")


def test_without_a_fault_it_is_a_storage_that_records(storage: FaultyStorage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"data")
    storage.write("a/x", b"1")
    assert storage.create("a/y", b"2")
    assert storage.read("a/x") == b"1"
    digest = storage.upload(str(source), "b/file")
    assert storage.download("b/file", str(target), 4) == digest
    assert [info.path for info in storage.list("a")] == ["a/x", "a/y"]
    storage.delete(["a/x"])
    assert storage.calls == [
        Call("write", "a/x"),
        Call("create", "a/y"),
        Call("read", "a/x"),
        Call("upload", "b/file"),
        Call("download", "b/file"),
        Call("list", "a"),
        Call("delete", "a/x"),
    ]
    assert (storage.count(), storage.count("read"), storage.count("any", "a/*")) == (7, 1, 4)


def test_the_chosen_call_fails_and_is_tried_again(storage: FaultyStorage) -> None:
    storage.fail("write", call=2)
    for number in range(3):
        storage.write(f"{number}", b"x")
    assert [call.path for call in storage.calls] == ["0", "1", "1", "2"]


def test_a_lasting_error_is_raised(storage: FaultyStorage) -> None:
    storage.fail("write", StoragePermissionError("refused"))
    with pytest.raises(StoragePermissionError, match="refused"):
        storage.write("x", b"1")
    with pytest.raises(ObjectNotFoundError):
        storage.read("x")


def test_a_long_outage_is_unavailable_storage_until_heal(storage: FaultyStorage) -> None:
    storage.fail("any", times=1_000)
    with pytest.raises(StorageUnavailableError):
        storage.write("x", b"1")
    storage.heal()
    storage.write("x", b"1")


def test_only_matching_paths_are_affected(storage: FaultyStorage) -> None:
    storage.fail("write", StoragePermissionError("refused"), path="*/y", times=1_000)
    storage.write("a/x", b"1")
    with pytest.raises(StoragePermissionError):
        storage.write("a/y", b"1")


def test_a_lost_answer_is_a_call_that_succeeded(storage: FaultyStorage) -> None:
    storage.lose_answer("create")
    assert storage.create("x", b"mine"), "what is there is ours"
    assert storage.count("create") == 2
    storage.lose_answer("delete")
    storage.delete(["x"])
    assert storage.list("") == []


def test_a_held_call_waits_for_its_event(storage: FaultyStorage) -> None:
    until = threading.Event()
    storage.hold("write", until)
    thread = threading.Thread(target=storage.write, args=("x", b"1"))
    thread.start()
    wait_until(lambda: storage.count("write"), "the call")
    assert storage.list("") == []
    until.set()
    thread.join(DEADLINE)
    assert storage.read("x") == b"1"


def test_bytes_change_in_transit_without_an_error(storage: FaultyStorage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"data")
    storage.corrupt("upload")
    digest = storage.upload(str(source), "x")
    assert (tmp_path / "run/x").read_bytes() == flip_bit(b"data")
    assert storage.upload(str(source), "x") == digest
    assert storage.download("x", str(target), 4) == digest

    storage.corrupt("download")
    assert storage.download("x", str(target), 4) != digest
    assert target.read_bytes() == flip_bit(b"data")
    storage.corrupt("write", lambda data: data[:-1])
    storage.write("y", b"1234")
    assert storage.read("y") == b"123"
    storage.corrupt("read")
    assert storage.read("y") == flip_bit(b"123")


def test_a_flipped_bit_is_one_bit() -> None:
    assert (int.from_bytes(flip_bit(b"data"), "big") ^ int.from_bytes(b"data", "big")).bit_count() == 1
    assert flip_bit(b"") != b""


def test_everywhere_affects_every_storage_of_that_run_and_no_other(
    storage: FaultyStorage, tmp_path: Path
) -> None:
    same, other = Storage(storage.url), Storage(f"file://{tmp_path / 'other'}")
    storage.fail("write", StoragePermissionError("refused"), times=1_000)
    with storage.everywhere():
        other.write("x", b"1")
        for met in (same, storage):
            with pytest.raises(StoragePermissionError):
                met.write("x", b"1")
        assert storage.count("write") == 2, "each request counts once"
    same.write("x", b"1")


def test_a_request_may_be_named_by_its_purpose(storage: FaultyStorage) -> None:
    storage.fail("commit", StoragePermissionError("refused"), times=1_000)
    storage.create(".cloudtrain/claims/checkpoint-5.json", b"1")
    with pytest.raises(StoragePermissionError):
        storage.create(".cloudtrain/checkpoints/000001-0000000005.json", b"1")
    assert (storage.count("claim"), storage.count("commit"), storage.count("pointer")) == (1, 2, 0)


def test_a_run_makes_every_named_request(machines: Machines) -> None:
    """Or a crash point could not be reached. Several hosts make parts; the tracker makes heartbeats and steps."""
    machine = machines.new()
    machine.start()
    machine.save(5, best=True)
    machine.wait()
    machines.restored("elsewhere")
    machines.catalog = Catalog(machines.storage)
    retire(machines.catalog, CheckpointKey(1, 5))
    HostParts(machines.catalog, CheckpointKey(1, 7), "nonce", save=1, hosts=2).put(0, [])
    machines.catalog.attempts.write_progress(1, {})
    StepRecords(machines.catalog.storage).write(1, 1, b"")
    assert [point for point in POINTS if not machines.storage.count(point)] == []


def test_an_unknown_name_is_an_error_that_lists_the_names(storage: FaultyStorage) -> None:
    with pytest.raises(ValueError, match=r"Unknown request 'comit'\. Use one of: any, read, .*commit"):
        storage.fail("comit")
    with pytest.raises(ValueError, match=r"Unknown disk point 'acept'\. Use one of: accept, "):
        CrashPoint("out", point="acept")


def test_wrong_answers_are_given_and_change_nothing_else(storage: FaultyStorage, tmp_path: Path) -> None:
    storage.write("a/x", b"12")
    storage.lie("missing", "read")
    with pytest.raises(ObjectNotFoundError):
        storage.read("a/x")
    storage.lie("missing", "list")
    assert storage.list("a") == []
    storage.lie("missing", "download")
    with pytest.raises(ObjectNotFoundError):
        storage.download("a/x", str(tmp_path / "target"), 2)
    storage.lie("late", "list")
    storage.write("a/y", b"1")
    assert [info.path for info in storage.list("a")] == ["a/x"]
    storage.lie("size", "list")
    assert [info.size for info in storage.list("a")] == [1, 0]
    storage.lie("exists", "create")
    assert storage.create("a/z", b"1"), "asked again, it says the truth"
    assert [info.size for info in storage.list("a")] == [2, 1, 1]


def test_a_slow_request_takes_longer_and_succeeds(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    storage.slow("write", 2.5)
    storage.write("x", b"1")
    assert (storage.read("x"), waited) == (b"1", [2.5])


def test_heal_breaks_a_request_that_hangs(storage: FaultyStorage) -> None:
    storage.hang("write")
    thread = threading.Thread(target=storage.write, args=("x", b"1"))
    thread.start()
    wait_until(lambda: storage.count("write"), "the call")
    assert thread.is_alive()
    storage.heal()
    thread.join(DEADLINE)
    assert storage.read("x") == b"1", "the client tried again"


def test_a_faulty_disk_refuses_changes_from_the_chosen_one_on(tmp_path: Path) -> None:
    with FaultyDisk(tmp_path, errno.EROFS, at=2, times=2) as disk:
        (tmp_path / "a").mkdir()
        with pytest.raises(OSError, match="Read-only file system") as raised:
            (tmp_path / "b").mkdir()
        assert raised.value.errno == errno.EROFS
        with pytest.raises(OSError, match="Read-only file system"):
            (tmp_path / "a").rename(tmp_path / "c")
        (tmp_path / "d").mkdir()
    (tmp_path / "e").mkdir()
    assert (disk.refused, sorted(path.name for path in tmp_path.iterdir())) == (2, ["a", "d", "e"])


def test_a_full_disk_still_permits_deletion(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    with FaultyDisk(tmp_path) as disk:
        with pytest.raises(OSError, match="No space left on device"):
            (tmp_path / "y").write_bytes(b"1")
        (tmp_path / "x").rename(tmp_path / "z")
        (tmp_path / "z").read_bytes()
        (tmp_path / "z").unlink()
    assert disk.refused == 1


def test_changes_of_a_disk_have_names(machines: Machines) -> None:
    seen = {}
    machine = machines.new()
    with contextlib.ExitStack() as stack:
        disks = {
            point: stack.enter_context(FaultyDisk(machine.output_dir, errno.EIO, times=0, point=point))
            for point in DISK_POINTS
        }
        machine.start()
        machine.save(5)
        machine.wait()
        machine.rotate(5)
        machine.stop()
        machines.new().checkpointer.restore()
        seen = {point: len(disk.seen) for point, disk in disks.items()}
    assert seen == {"freeze": 1, "accept": 1, "forget": 1, "restored": 1}


CRASHES = """
import sys
from hf_cloudtrain.testing import CrashPoint, FaultyStorage
storage = FaultyStorage(sys.argv[1])
storage.crash("write", call=2, after=sys.argv[2] == "after")
storage.write("first", b"1")
storage.write("second", b"2")
"""


@pytest.mark.parametrize(("when", "there"), [("before", ["first"]), ("after", ["first", "second"])])
def test_a_crash_ends_the_process_before_or_after_the_call(
    tmp_path: Path, when: str, there: list[str]
) -> None:
    ended = subprocess.run([sys.executable, "-c", CRASHES, str(tmp_path), when], cwd=ROOT, check=False)
    assert ended.returncode == CRASH_STATUS
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_a_crash_point_counts_changes_below_its_folder(tmp_path: Path) -> None:
    below, beside = tmp_path / "below", tmp_path / "below-not"
    beside.mkdir()
    with CrashPoint(below) as point:
        below.mkdir()
        (below / "a").write_bytes(b"1")
        (below / "a").read_bytes()
        (below / "a").rename(below / "b")
        (below / "c").hardlink_to(below / "b")
        (below / "b").unlink()
        (beside / "x").write_bytes(b"1")
    (below / "late").write_bytes(b"1")
    assert point.seen == ["os.mkdir", "open", "os.rename", "os.link", "os.remove"]


POINT = """
import os, sys
from hf_cloudtrain.testing import CrashPoint
with CrashPoint(sys.argv[1], at=2):
    for name in "abc":
        os.mkdir(os.path.join(sys.argv[1], name))
"""


def test_a_crash_point_ends_the_process_just_before_its_change(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", POINT, str(tmp_path)], cwd=ROOT, check=False)
    assert ended.returncode == CRASH_STATUS
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
