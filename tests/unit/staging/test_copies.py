"""Copies on more than one core: all bytes are there when `finish` returns, and nothing is copied after it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from hf_cloudtrain.staging import copies
from hf_cloudtrain.staging.copies import Copies
from hf_cloudtrain.staging.memory import StagingMemory

MIB = 2**20


@pytest.fixture
def memory() -> Iterator[StagingMemory]:
    memory = StagingMemory(64 * MIB)
    yield memory
    memory.close()


@pytest.fixture(params=[1, 4])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(copies, "_cores", lambda: request.param)
    monkeypatch.setattr(copies, "SMALL", 2**10)
    monkeypatch.setattr(copies, "CHUNK", 2**14 + 1)
    monkeypatch.setattr(copies, "WORTH_A_THREAD", 2**18)
    return int(request.param)


SIZES = [0, 1, 2**10 - 1, 2**10, 2**14 + 1, 2**14 + 2, 3 * 2**14, 2**20 + 77]


@pytest.mark.parametrize("at_once", [2**16, 2**30])
def test_each_copy_is_whole(
    at_once: int, cores: int, memory: StagingMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "AT_ONCE", at_once)
    sources = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in SIZES * 3]
    under_way = Copies(memory)
    offsets = [under_way.add(source.data_ptr(), source.nbytes, source) for source in sources]
    under_way.finish()
    for offset, source in zip(offsets, sources, strict=True):
        assert offset is not None
        assert bytes(memory.view(offset, source.nbytes)) == bytes(source.tolist())
    assert not [thread for thread in threading.enumerate() if thread.name == "cloudtrain-copy"]


def test_a_source_is_kept_until_it_is_copied(cores: int, memory: StagingMemory) -> None:
    """torch brings a tensor from a device into main memory, hands it over, and forgets it."""
    under_way, offsets = Copies(memory), []
    for value in range(20):
        source = torch.full((2**18,), value, dtype=torch.uint8)
        offsets.append(under_way.add(source.data_ptr(), source.nbytes, source))
        del source
    under_way.finish()
    for value, offset in enumerate(offsets):
        assert offset is not None
        assert set(bytes(memory.view(offset, 2**18))) == {value}


def test_without_room_there_is_no_copy(cores: int, memory: StagingMemory) -> None:
    source = torch.ones(2**12, dtype=torch.uint8)
    memory.capacity = 2**12
    under_way = Copies(memory)
    assert under_way.add(source.data_ptr(), 2**12, source) == 0
    assert under_way.add(source.data_ptr(), 2**12, source) is None
    assert memory.used == 2**12


def test_what_is_dropped_is_not_copied(cores: int, memory: StagingMemory) -> None:
    source = torch.ones(2**19, dtype=torch.uint8)
    under_way = Copies(memory)
    offset = under_way.add(source.data_ptr(), source.nbytes, source)
    under_way.drop()
    under_way.finish()
    assert offset == 0
    assert set(bytes(memory.view(0, 2**19))) == {0}


def test_this_thread_copies_all_if_no_other_can_be_started(
    memory: StagingMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(copies, "_cores", lambda: 4)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    source = torch.ones(40 * MIB, dtype=torch.uint8)
    under_way = Copies(memory)
    under_way.add(source.data_ptr(), source.nbytes, source)
    under_way.finish()
    assert torch.equal(torch.frombuffer(memory.view(0, 40 * MIB), dtype=torch.uint8), source)
