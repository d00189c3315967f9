"""Trouble at every request of a run in turn: one that passes is not noticed, one that stays loses nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain.catalog import CheckpointKey
from hf_cloudtrain.errors import CloudTrainError, StoragePermissionError
from hf_cloudtrain.testing import FaultyStorage
from tests.faults.aftermath import what_goes_wrong_next
from tests.faults.runs import DEADLINE, Machines, bytes_of

FOR_EVER = 1_000_000


def whole_run(machines: Machines, accepted: list[int], timeout: float = DEADLINE) -> None:
    """Start, save, rotate, save the best, commit, retire, restore on another machine."""
    machine = machines.new("out")
    machine.start()
    machine.save(5)
    accepted.append(5)
    machine.checkpointer.wait(timeout)
    machine.rotate(5)
    machine.save(10, best=True)
    accepted.append(10)
    machine.checkpointer.wait(timeout)
    machine.checkpointer.catalog.retire(CheckpointKey(1, 5))
    elsewhere = machines.new("elsewhere")
    assert elsewhere.start() == 10


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> range:
    """The numbers of all requests of an undisturbed run."""
    with Machines(tmp_path_factory.mktemp("undisturbed")) as machines:
        whole_run(machines, [])
        return range(1, machines.storage.count() + 1)


def each(
    requests: range, folder: Path, caplog: pytest.LogCaptureFixture, check: Callable[[Machines, int], str]
) -> None:
    """Check a run for the fault at each of its requests, and show all that is wrong."""
    caplog.set_level(logging.CRITICAL)
    problems = []
    for number in requests:
        with Machines(folder / str(number)) as machines:
            if problem := check(machines, number):
                problems.append(f"request {number}, {machines.storage.calls[number - 1]}: {problem}")
    assert not problems, "\n".join(problems)
    assert len(requests) > 40, "the sweep saw the whole run"


PASSING = [ConnectionResetError("reset by peer"), TimeoutError("timed out"), OSError("503 Slow Down")]

ONCE: dict[str, Callable[[FaultyStorage, int], None]] = {
    "a failure": lambda storage, number: storage.fail(
        "any", PASSING[number % len(PASSING)], call=number, times=2
    ),
    "a lost answer": lambda storage, number: storage.lose_answer("any", call=number),
}


@pytest.mark.parametrize("trouble", ONCE)
def test_trouble_that_passes_is_not_noticed_at_any_request(
    requests: range, tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    def check(machines: Machines, number: int) -> str:
        ONCE[trouble](machines.storage, number)
        try:
            whole_run(machines, [])
        except CloudTrainError as error:
            return f"it was noticed: {error!r}"
        if machines.committed() != [(1, 10)]:
            return f"committed: {machines.committed()}"
        if machines.catalog.pointer("best") != CheckpointKey(1, 10):
            return "the best is not remembered"
        return "" if machines.restored("third") == bytes_of(10) else "other bytes"

    each(requests, tmp_path, caplog, check)


STAYS: dict[str, Callable[[FaultyStorage, int], None]] = {
    "an outage": lambda storage, number: storage.fail("any", call=number, times=FOR_EVER),
    "an outage with lost answers": lambda storage, number: storage.lose_answer(
        "any", call=number, times=FOR_EVER
    ),
    "credentials that expire": lambda storage, number: storage.fail(
        "any", StoragePermissionError("ExpiredToken"), call=number, times=FOR_EVER
    ),
}


@pytest.mark.parametrize("trouble", STAYS)
def test_trouble_that_stays_from_any_request_on_loses_nothing_that_was_accepted(
    requests: range, tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    def check(machines: Machines, number: int) -> str:
        accepted: list[int] = []
        STAYS[trouble](machines.storage, number)
        try:
            whole_run(machines, accepted, timeout=0.05)
        except CloudTrainError:
            pass  # it says so, which is right; what matters is what is left
        else:
            return "it was not noticed"
        for machine in machines.made:
            machine.stop()
        machines.storage.heal()
        machines.committed()
        return what_goes_wrong_next(machines, accepted[-1] if accepted else 0)

    each(requests, tmp_path, caplog, check)
