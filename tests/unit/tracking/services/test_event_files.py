"""Event files are stored in parts that TensorBoard reads, and come back whole on a machine that lacks them."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.paths import EVENTS
from hf_cloudtrain.errors import ObjectNotFoundError
from hf_cloudtrain.storage.backend import ObjectInfo
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.services import event_files
from hf_cloudtrain.tracking.services.event_files import EventFiles
from hf_cloudtrain.tracking.services.runs import TrackerRun

RUN = TrackerRun("tensorboard", "runs/one", 1)
TOP = f"{EVENTS}/tensorboard-{hashlib.sha256(b'runs/one').hexdigest()[:8]}"
NAME = f"events.out.tfevents.1790000000.{socket.gethostname()}.{os.getpid()}.0"
OF_ANOTHER = "events.out.tfevents.1790000000.host.17.0"


@pytest.fixture
def storage(catalog: Catalog) -> Storage:
    return catalog.storage


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[SummaryWriter]:
    with SummaryWriter(str(tmp_path / "one")) as made:
        yield made


def files(storage: Storage, folder: Path, writer: SummaryWriter | None = None) -> EventFiles:
    return EventFiles(storage, RUN, folder, (lambda: None) if writer is None else writer.flush)


def names(storage: Storage) -> list[str]:
    return [info.path.removeprefix(f"{TOP}/") for info in storage.list(TOP)]


def steps(folder: Path, tag: str = "weights") -> list[int]:
    found = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    found.Reload()
    return [event.step for event in found.Histograms(tag)]


def log(writer: SummaryWriter, *wanted: int) -> None:
    for step in wanted:
        writer.add_histogram("weights", np.arange(100.0), step)


def test_histograms_of_a_machine_that_is_gone_come_back(
    storage: Storage, tmp_path: Path, writer: SummaryWriter
) -> None:
    here = files(storage, tmp_path / "one", writer)
    log(writer, 1, 2, 3)
    assert here.store() is False
    log(writer, 4)
    here.store()
    (path,) = (tmp_path / "one").iterdir()
    assert names(storage) == [path.name]
    files(storage, tmp_path / "two").fetch()
    assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
    assert steps(tmp_path / "two") == [1, 2, 3, 4]


def test_a_large_file_is_stored_in_parts_each_byte_a_few_times_and_each_part_is_readable(
    storage: Storage, tmp_path: Path, writer: SummaryWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_files, "PART_BYTES", 5_000)
    sent: list[int] = []
    write = Storage.write
    monkeypatch.setattr(
        Storage, "write", lambda self, path, data: (sent.append(len(data)), write(self, path, data))[1]
    )
    here = files(storage, tmp_path / "one", writer)
    for step in range(40):
        log(writer, step)
        while here.store():
            pass
    (path,) = (tmp_path / "one").iterdir()
    assert names(storage)[:2] == [path.name, f"{path.name}.part0002"]
    assert max(sent) < 5_000 + 2_000, "a part, and the record that fills it"
    assert sum(sent) < path.stat().st_size * 4
    files(storage, tmp_path / "two").fetch()
    assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
    assert steps(tmp_path / "run" / TOP) == list(range(40)), "as `tensorboard --logdir` reads them"


def test_what_waited_for_long_is_stored_part_by_part(
    storage: Storage, tmp_path: Path, writer: SummaryWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_files, "PART_BYTES", 5_000)
    here = files(storage, tmp_path / "one", writer)
    log(writer, *range(20))
    assert here.store() is True
    assert len(names(storage)) == 1
    while here.store():
        pass
    files(storage, tmp_path / "two").fetch()
    assert steps(tmp_path / "two") == list(range(20))


def test_a_record_that_is_half_written_waits(storage: Storage, tmp_path: Path, writer: SummaryWriter) -> None:
    log(writer, 1)
    writer.flush()
    (path,) = (tmp_path / "one").iterdir()
    whole = path.read_bytes()
    other = tmp_path / "two"
    other.mkdir()
    (other / NAME).write_bytes(whole + whole[-40:-5])
    here = files(storage, other)
    here.store()
    assert storage.read(f"{TOP}/{NAME}") == whole


def test_a_file_of_this_machine_stays_and_its_rest_is_stored(
    storage: Storage, tmp_path: Path, writer: SummaryWriter
) -> None:
    log(writer, 1)
    files(storage, tmp_path / "one", writer).store()
    log(writer, 2)
    writer.flush()
    (path,) = (tmp_path / "one").iterdir()
    whole = path.read_bytes()
    os.utime(path, (0, 0))
    again = files(storage, tmp_path / "one")
    again.fetch()
    assert path.read_bytes() == whole
    again.store()
    files(storage, tmp_path / "two").fetch()
    assert steps(tmp_path / "two") == [1, 2]


def test_a_folder_that_is_recorded_again_under_the_next_number_comes_back(
    storage: Storage, tmp_path: Path
) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / NAME).write_bytes((0).to_bytes(8, "little") + bytes(8))
    files(storage, folder).store()
    shared = TrackerRun("tensorboard", RUN.id, 2, is_shared=True)
    EventFiles(storage, shared, tmp_path / "new machine", lambda: None).fetch()
    assert (tmp_path / "new machine" / NAME).exists()


def test_only_event_files_of_this_training_are_stored(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    record = (0).to_bytes(8, "little") + bytes(8)
    for name in (NAME, OF_ANOTHER, f"images/{NAME}", "notes.txt", ".env", f"{NAME}.old"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(record)
    os.utime(folder / f"{NAME}.old", (0, 0))
    secret = tmp_path / "secret"
    secret.write_bytes(record)
    (folder / "events.out.tfevents.link").symlink_to(secret)
    files(storage, folder).store()
    assert names(storage) == [NAME, f"images/{NAME}"]


@pytest.mark.parametrize(
    "path",
    [
        f"../../{OF_ANOTHER}",
        f"_cloudtrain/{OF_ANOTHER}",
        "model.safetensors",
        f"{OF_ANOTHER}/x",
        f"{OF_ANOTHER}.part0002",
    ],
)
def test_what_else_is_there_is_not_written_to_this_disk(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path / "run"))
    listed = [ObjectInfo(f"{TOP}/{path}", 1)]
    monkeypatch.setattr(Storage, "list", lambda self, prefix: listed)
    monkeypatch.setattr(Storage, "read", lambda self, path, size: b"x")
    files(storage, tmp_path / "a" / "b").fetch()
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == []


def test_a_file_that_cannot_be_read_leaves_nothing_half_written(
    storage: Storage, tmp_path: Path, writer: SummaryWriter
) -> None:
    log(writer, 1)
    files(storage, tmp_path / "one", writer).store()
    listed = storage.list(TOP)
    storage.delete(info.path for info in listed)

    class Lagging(Storage):
        def list(self, prefix: str) -> list[ObjectInfo]:
            return listed

    with pytest.raises(ObjectNotFoundError):
        files(Lagging(storage.url), tmp_path / "two").fetch()
    assert list((tmp_path / "two").iterdir()) == []
