"""The shared memory: what fits, who sees it, and how much room a machine has."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from hf_cloudtrain.staging import memory as memory_module
from hf_cloudtrain.staging import saves
from hf_cloudtrain.staging.memory import ALIGNMENT, JOB_SPACE, StagingMemory, is_supported, room

GB = 2**30


def test_copies_are_aligned_and_stay_as_they_were() -> None:
    memory = StagingMemory(2**20)
    values = np.arange(100, dtype=np.uint8)
    first, second = memory.put(b"header"), memory.copy(values.ctypes.data, 100)
    values[:] = 0
    assert (first, second) == (0, ALIGNMENT)
    assert bytes(memory.view(first, 6)) == b"header"
    assert bytes(memory.view(second, 100)) == bytes(range(100))
    memory.close()


def test_what_does_not_fit_takes_nothing() -> None:
    memory = StagingMemory(100)
    assert memory.put(b"x" * 60) == 0
    assert memory.put(b"x" * 60) is None
    assert memory.used == 60
    assert memory.put(b"x" * 36) == 64
    assert memory.put(b"") is None, "the next address is behind the end"
    memory.close()


def test_a_different_mapping_of_the_same_memory_sees_the_bytes() -> None:
    memory = StagingMemory(2**16)
    memory.put(b"tensor")
    memory.put_job(b"description")
    other = StagingMemory(2**16, memory.fd)
    assert (bytes(other.view(0, 6)), bytes(other.view(2**16, 11))) == (b"tensor", b"description")
    other.close()
    assert os.fstat(memory.fd), "the descriptor is of the one that made it"
    memory.close()
    memory.close()


def test_a_description_that_is_too_long_is_refused() -> None:
    memory = StagingMemory(2**16)
    with pytest.raises(ValueError, match="description of a save"):
        memory.put_job(b"x" * (JOB_SPACE + 1))
    memory.close()


def test_populating_takes_the_memory_of_the_first_bytes() -> None:
    memory = StagingMemory(2**22)
    memory.populate(2**21)
    assert os.fstat(memory.fd).st_blocks * 512 in (0, 2**21), "0: a kernel before 5.14"
    memory.populate(2**30)  # no more than there is
    memory.close()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 100),
        ({"memory.max": "max"}, 100),
        (
            {
                "memory.max": 10 * GB,
                "memory.current": 7 * GB,
                "memory.stat": f"anon 5\ninactive_file {2 * GB}",
            },
            5,
        ),
        ({"memory.max": "nonsense"}, 100),
    ],
)
def test_room_respects_a_cgroup_of_version_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, object], expected: int
) -> None:
    machine(tmp_path, monkeypatch, "0::/")
    cgroup(tmp_path / "cgroup", files)
    assert room() == expected * GB - memory_module.SPARE


def test_room_respects_the_limit_of_a_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch, "0::/job/step")
    limit = {"memory.current": 2 * GB, "memory.stat": ""}
    cgroup(tmp_path / "cgroup/job/step", {**limit, "memory.max": "max"})
    cgroup(tmp_path / "cgroup/job", {**limit, "memory.max": 6 * GB})
    assert room() == 4 * GB - memory_module.SPARE


@pytest.mark.parametrize("where", ["cgroup/memory/docker/1", "cgroup/memory"])
def test_room_respects_a_cgroup_of_version_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In a container the root of the mount is the container's own cgroup."""
    machine(tmp_path, monkeypatch, "5:cpu:/docker/1\n4:memory:/docker/1\n0::/docker/1")
    limit = {"memory.limit_in_bytes": 3 * GB, "memory.usage_in_bytes": 2 * GB}
    cgroup(tmp_path / where, {**limit, "memory.stat": f"total_inactive_file {GB}\ninactive_file 5"})
    assert room() == 2 * GB - memory_module.SPARE


def test_room_is_never_negative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch, "0::/", available=0)
    assert room() == 0


def test_too_little_memory_is_a_reason_that_names_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, "0::/", available=2)
    assert saves.why_not(GB) is None
    assert saves.why_not(2 * GB) == "staging needs 2.7 GB of memory, and 1.6 GB can be taken"


def test_a_system_that_refuses_memfd_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_supported()

    def refuse(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert saves.why_not(1) == "this system has no anonymous shared memory (memfd)"
    monkeypatch.delattr(os, "memfd_create")
    assert not is_supported()


def machine(folder: Path, monkeypatch: pytest.MonkeyPatch, cgroups: str, available: int = 100) -> None:
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {available * GB // 1024} kB\n")
    (folder / "proc/self/cgroup").write_text(cgroups + "\n")
    monkeypatch.setattr(memory_module, "PROC", folder / "proc")
    monkeypatch.setattr(memory_module, "CGROUPS", folder / "cgroup")


def cgroup(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")
