"""Law 2, Whole: no restored file is used before all are verified; a damaged checkpoint is reported and skipped."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain.errors import CloudTrainError, CorruptCheckpointError, ManifestError
from hf_cloudtrain.storage.digest import file_digest
from hf_cloudtrain.testing import flip_bit
from tests.faults.runs import Machines, bytes_of, contents, wait_until

NEWEST = "000001-0000000010"
MODEL = "checkpoint-10/model.safetensors"
MANIFEST = f".cloudtrain/checkpoints/{NEWEST}.json"


@pytest.fixture
def run(machines: Machines) -> Path:
    """A run with checkpoints of steps 5 and 10."""
    machine = machines.new()
    machine.start()
    for step in (5, 10):
        machine.save(step)
        machine.wait()
    machine.stop()
    return machines.run


def test_law_2_the_manifest_names_every_file_with_size_and_digest(run: Path) -> None:
    record = json.loads((run / MANIFEST).read_text())
    files = {item["path"]: (item["size"], item["digest"]) for item in record["files"]}
    folder = run / "checkpoint-10"
    assert files == {path: (len(data), file_digest(folder / path)) for path, data in contents(folder).items()}
    assert set(files) == set(bytes_of(10))


def remove(path: Path) -> None:
    path.unlink()


def change(how: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(how(path.read_bytes())), None)[1]


DAMAGES = {
    "a flipped bit": (MODEL, change(flip_bit)),
    "a small file's flipped bit": ("checkpoint-10/trainer_state.json", change(flip_bit)),
    "cut short": (MODEL, change(lambda data: data[:-1])),
    "cut to nothing": (MODEL, change(lambda data: b"")),
    "too long": (MODEL, change(lambda data: data + b"x")),
    "an empty file that has content": ("checkpoint-10/empty", change(lambda data: b"x")),
    "a missing file": (MODEL, remove),
    "a missing empty file": ("checkpoint-10/empty", remove),
    "a manifest cut short": (MANIFEST, change(lambda data: data[: len(data) // 2])),
    "an empty manifest": (MANIFEST, change(lambda data: b"")),
    "a manifest that is not JSON": (MANIFEST, change(lambda data: b"<Error>SlowDown</Error>")),
    "a manifest that is an object without a format": (MANIFEST, change(lambda data: b"{}")),
    "a manifest whose format is damaged": (
        MANIFEST,
        change(lambda data: data.replace(b"hf_cloudtrain.manifest/1", b"hf_cloudtrain.manifesu/1")),
    ),
    "a manifest of a different checkpoint": (
        MANIFEST,
        change(lambda data: data.replace(NEWEST.encode(), b"000001-0000000011")),
    ),
    "a wrong size": (MANIFEST, change(lambda data: data.replace(b'"size": 0', b'"size": 1'))),
    "a path outside the folder": (MANIFEST, change(lambda data: data.replace(b'"empty"', b'"../../empty"'))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_law_2_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_restored(
    machines: Machines, run: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, break_it = DAMAGES[damage]
    break_it(run / path)

    assert machines.restored("elsewhere") == bytes_of(5)
    warnings = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert any(
        "checkpoint-10 (attempt 1) is damaged; trying the one before" in warning for warning in warnings
    )
    assert not (run.parent / "elsewhere/checkpoint-10").exists()


def test_law_2_restore_stops_if_all_checkpoints_are_damaged(machines: Machines, run: Path) -> None:
    for step in (5, 10):
        change(flip_bit)(run / f"checkpoint-{step}/model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"All 2 checkpoints.*checkpoint verify.*fresh=True"):
        machines.restored("elsewhere")


def test_law_2_a_manifest_of_a_newer_version_stops_the_restore(machines: Machines, run: Path) -> None:
    change(lambda data: data.replace(b"hf_cloudtrain.manifest/1", b"hf_cloudtrain.manifest/2"))(
        run / MANIFEST
    )
    with pytest.raises(ManifestError, match="Upgrade hf_cloudtrain"):
        machines.restored("elsewhere")


def test_law_2_no_checkpoint_folder_appears_before_every_file_is_verified(
    machines: Machines, run: Path
) -> None:
    machines.storage.hold("download", machines.gate, path="*/model.safetensors")
    machine = machines.new("elsewhere")
    restoring = threading.Thread(target=machine.start)
    restoring.start()
    wait_until(
        lambda: machines.storage.count("download", "checkpoint-10/*") == len(bytes_of(10)), "all requests"
    )
    wait_until(lambda: list(machine.output_dir.rglob("trainer_state.json")), "the first downloaded file")
    assert not list(machine.output_dir.glob("checkpoint-*"))
    machines.gate.set()
    restoring.join()
    assert contents(machine.output_dir / "checkpoint-10") == bytes_of(10)


def test_law_2_bytes_corrupted_during_the_upload_are_never_used(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    machines.storage.corrupt("upload", path=MODEL)
    machine.save(10)
    machine.wait()
    assert machines.restored("elsewhere") == bytes_of(5)


def test_law_2_a_file_truncated_during_the_upload_is_uploaded_again(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.corrupt("upload", lambda data: data[:-1], path=MODEL)
    machine.save(10)
    machine.wait()
    assert machines.storage.count("upload", MODEL) == 2
    assert machines.committed() == [(1, 10)]


def test_law_2_bytes_corrupted_during_the_download_are_never_used(machines: Machines, run: Path) -> None:
    machines.storage.corrupt("download", path="checkpoint-*/model.safetensors", times=1_000)
    with pytest.raises(CorruptCheckpointError, match="All 2"):
        machines.restored("elsewhere")
    assert not list((run.parent / "elsewhere").glob("checkpoint-*"))


def test_law_2_a_truncated_local_copy_is_not_used(machines: Machines, run: Path) -> None:
    local = run.parent / "out/checkpoint-10"
    change(lambda data: data[:100])(local / "model.safetensors")
    assert machines.restored("out") == bytes_of(10)


def test_law_2_a_local_copy_with_different_bytes_is_not_used(machines: Machines, run: Path) -> None:
    change(flip_bit)(run.parent / "out/checkpoint-10/trainer_state.json")
    assert machines.restored("out") == bytes_of(10)


def test_law_2_a_complete_local_copy_is_used_without_a_download(machines: Machines, run: Path) -> None:
    machines.storage.calls.clear()
    assert machines.restored("out") == bytes_of(10)
    assert machines.storage.count("download", "checkpoint-*") == 0


def test_law_2_unreachable_storage_is_an_error_and_not_a_damaged_checkpoint(
    machines: Machines, run: Path
) -> None:
    machines.storage.fail("download", path="checkpoint-10/*", times=1_000)
    with pytest.raises(CloudTrainError, match="connection reset"):
        machines.restored("elsewhere")


def test_law_2_a_folder_that_cannot_be_listed_is_an_error_and_not_an_empty_run(
    machines: Machines, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def broken(path: str) -> object:
        if str(path).endswith(".cloudtrain/checkpoints"):
            raise OSError(5, "Input/output error", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(OSError, match="Input/output error"):
        machines.restored("elsewhere")
