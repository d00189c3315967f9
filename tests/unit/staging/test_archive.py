"""The archive of a staged torch.save is written without torch, and equals that of torch byte for byte."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from hf_cloudtrain.staging import archive, recorders
from hf_cloudtrain.staging.archive import names_of, suits, write_archive
from hf_cloudtrain.staging.job import StagedFile
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.staging.recorders import archive_options
from hf_cloudtrain.staging.window import Window

OPTIONS = {"crc32": True, "alignment": 64}


def of_sizes(sizes: list[int]) -> list[archive.Record]:
    head = [("data.pkl", b"pickle", 6), (".format_version", b"1", 1), ("byteorder", b"little", 6)]
    return [*head, *((f"data/{at}", bytes([at % 251]) * size, size) for at, size in enumerate(sizes))]


RECORDS = {
    "none": of_sizes([]),
    "one": of_sizes([40]),
    "empty ones": of_sizes([0, 5, 0, 0, 7]),
    "all lengths": of_sizes(list(range(200))),
    "2,000": of_sizes([8] * 2_000),
    "large": of_sizes([2**20 - 1, 2**20, 3 * 2**20 + 5]),
    "a signature of the format in the data": [*of_sizes([]), ("data/0", b"PK\7\10datadata", 12)],
    "no more than the signature": [*of_sizes([]), ("data/0", b"PK\7\10", 4), ("data/1", b"PK\7\10abc", 7)],
}


@pytest.mark.parametrize("alignment", [1, 64, 4096])
@pytest.mark.parametrize("name", ["state.pt", "rng_state_0.pth", "model", "optimizer.0.bin"])
@pytest.mark.parametrize("case", RECORDS)
def test_an_archive_is_byte_identical(case: str, name: str, alignment: int, tmp_path: Path) -> None:
    records, theirs, ours = RECORDS[case], tmp_path / "theirs" / name, tmp_path / "ours" / name
    for path in (theirs, ours):
        path.parent.mkdir()
    real = torch._C.PyTorchFileWriter(str(theirs), True, alignment)
    for record in records:
        real.write_record(*record)
    real.write_end_of_file()
    assert suits(str(ours), [size for _, _, size in records], {"crc32": True, "alignment": alignment})
    write_archive(ours, records, names_of(tuple(name for name, _, _ in records)), alignment)
    assert ours.read_bytes() == theirs.read_bytes()
    with zipfile.ZipFile(ours) as opened:
        assert opened.testzip() is None


@pytest.mark.parametrize(
    ("path", "sizes", "options"),
    [
        ("größe.pt", [5], OPTIONS),
        (".hidden", [5], OPTIONS),
        ("state.pt", [5], {"crc32": False, "alignment": 64}),
        ("state.pt", [5], {"crc32": True}),
        ("state.pt", [2**32], OPTIONS),
        ("state.pt", [2**31, 2**31], OPTIONS),
        ("state.pt", [0] * 2**16, OPTIONS),
    ],
)
def test_torch_writes_what_is_not_certain(path: str, sizes: list[int], options: dict[str, object]) -> None:
    assert not suits(path, sizes, options)
    assert suits("state.pt", [5], OPTIONS)


@pytest.mark.parametrize("alignment", [64, 4096])
def test_the_archives_of_this_writer_end_below_4_gib(alignment: int, tmp_path: Path) -> None:
    """Also with the longest name of a file and the most records: then no size and no offset needs a field of 8 bytes."""
    path, count = tmp_path / ("n" * 252 + ".pt"), 2_000
    records = [(f"data/{10_000 + at}", b"x", 1) for at in range(count)]
    write_archive(path, records, "0" * 20, alignment)
    beyond = path.stat().st_size / count - (1 + 512 + alignment)  # what `suits` does not count
    assert archive.LIMIT + max(0, beyond) * archive.MOST_RECORDS < 2**32 - 1


@pytest.mark.parametrize("change", ["different bytes", "no such class"])
def test_torch_writes_all_if_it_writes_in_a_different_way(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a later release may."""
    if change == "different bytes":
        monkeypatch.setattr(archive, "_VERSION", b"4\n")
    else:
        monkeypatch.delattr(torch._C, "PyTorchFileWriter")
    archive._is_as_torch.cache_clear()
    try:
        assert not suits("state.pt", [5], OPTIONS)
        assert archive_options("state.pt", [("data.pkl", 0, 5)])["names"] is None
    finally:
        archive._is_as_torch.cache_clear()


def test_a_staged_file_is_written_in_a_process_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer: its memory and its start depend on it."""
    monkeypatch.setattr(recorders, "SMALL_FILE", 0)
    memory, values = StagingMemory(2**20), {"a": torch.arange(99.0), "b": torch.ones(3, dtype=torch.int8)}
    (tmp_path / "ours").mkdir()
    window = Window(str(tmp_path / "ours"), memory)
    window.open()
    torch.save(values, tmp_path / "ours/state.pt")
    window.close()
    torch.save(values, tmp_path / "state.pt")
    program = f"""\
import sys
import hf_cloudtrain.staging.writer
from hf_cloudtrain.staging.job import StagedFile
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.staging.recorders import write_file
from pathlib import Path
write_file(Path({str(tmp_path / "ours/state.pt")!r}), StagedFile(**{vars(window.files[0])!r}), StagingMemory(2**20, {memory.fd}))
assert not {{"torch", "numpy", "transformers"}} & sys.modules.keys()
"""
    assert isinstance(window.files[0], StagedFile)
    subprocess.run([sys.executable, "-c", program], check=True, pass_fds=[memory.fd])
    memory.close()
    assert (tmp_path / "ours/state.pt").read_bytes() == (tmp_path / "state.pt").read_bytes()


def test_the_names_of_a_second_save_are_not_asked_again() -> None:
    names = tuple(name for name, _, _ in of_sizes([1] * 50))
    assert names_of(names) == names_of(tuple(names)) != names_of(names[:-1])
    file = io.BytesIO()
    assert archive._of_torch(of_sizes([1] * 50), file, 64)[:20] == names_of(names)
