"""Trouble at every request of a run in turn: one that passes is not noticed, one that stays loses nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.deletion import retire
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.errors import CloudTrainError, ManifestError, NoCheckpointError, StoragePermissionError
from hf_cloudtrain.storage import silence
from hf_cloudtrain.testing import FaultyStorage
from tests.faults.aftermath import what_goes_wrong_next
from tests.faults.runs import DEADLINE, Machines, bytes_of, one_fast

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
    retire(machine.checkpointer.catalog, CheckpointKey(1, 5))
    elsewhere = machines.new("elsewhere")
    assert elsewhere.start() == 10


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> FaultyStorage:
    """The storage of a run without trouble."""
    with Machines(tmp_path_factory.mktemp("undisturbed")) as machines:
        whole_run(machines, [])
        assert machines.storage.count() > 40, "the sweeps see the whole run"
        return machines.storage


@pytest.fixture
def requests(undisturbed: FaultyStorage) -> range:
    """The numbers of all requests."""
    return range(1, undisturbed.count() + 1)


@pytest.fixture
def places(undisturbed: FaultyStorage) -> list[int]:
    """The number of the first request of each sort: where each takes time, a few must stand for all."""
    sorts: dict[tuple[str, str], int] = {}
    for number, call in enumerate(undisturbed.calls, start=1):
        sorts.setdefault((call.kind, re.sub(r"probe-\w+|\d+", "", call.path)), number)
    return list(sorts.values())


def each(
    requests: Iterable[int],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    check: Callable[[Machines, int], str],
) -> None:
    """Check a run for the fault at each of its requests, and show all that is wrong."""
    caplog.set_level(logging.CRITICAL)
    problems = []
    for number in requests:
        with Machines(folder / str(number)) as machines:
            if problem := check(machines, number):
                problems.append(f"request {number}, {machines.storage.calls[number - 1]}: {problem}")
    assert not problems, "\n".join(problems)


PASSING = [ConnectionResetError("reset by peer"), TimeoutError("timed out"), OSError("503 Slow Down")]

ONCE: dict[str, Callable[[FaultyStorage, int], None]] = {
    "a failure": lambda storage, number: storage.fail(
        "any", PASSING[number % len(PASSING)], call=number, times=2
    ),
    "a lost answer": lambda storage, number: storage.lose_answer("any", call=number),
}


@pytest.mark.parametrize("trouble", one_fast(ONCE))
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


Lie = Callable[[FaultyStorage, Any, int], None]

LIES: dict[str, tuple[tuple[str, ...], Lie]] = {
    "credentials have expired": (
        ("create", "upload", "list"),
        lambda storage, kind, n: storage.fail(kind, PermissionError("ExpiredToken"), call=n),
    ),
    "what is there is not found": (
        ("read", "download", "list"),
        lambda storage, kind, n: storage.lie("missing", kind, call=n),
    ),
    "what is not there exists": (("create",), lambda storage, kind, n: storage.lie("exists", kind, call=n)),
    "as it was at the start": (("list",), lambda storage, kind, n: storage.lie("late", kind, call=n)),
    "other sizes": (("list",), lambda storage, kind, n: storage.lie("size", kind, call=n)),
    "other bytes come back": (("read", "download"), lambda storage, kind, n: storage.corrupt(kind, call=n)),
    "other bytes are stored": (("commit",), lambda storage, kind, n: storage.corrupt(kind, call=n)),
}
"""What is said that is not so, about which requests, and how the n-th of them is told so."""


@pytest.mark.parametrize("lie", one_fast(LIES))
def test_one_wrong_answer_is_not_noticed_or_said_before_anything_is_lost(
    undisturbed: FaultyStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture, lie: str
) -> None:
    """Said at the start, where a probe finds out whether the storage is to be trusted, and to who deletes by hand."""
    kinds, tell = LIES[lie]
    cases = [(kind, n) for kind in kinds for n in range(1, undisturbed.count(kind) + 1)]

    def check(machines: Machines, number: int) -> str:
        accepted: list[int] = []
        tell(machines.storage, *cases[number])
        try:
            whole_run(machines, accepted)
        except CloudTrainError as error:
            met = machines.storage.calls[-1]
            machines.storage.heal()
            if "/probe-" not in met.path and not isinstance(error, (NoCheckpointError, ManifestError)):
                return f"{cases[number]} was noticed: {error!r}"
            for machine in machines.made:
                machine.stop()
            return what_goes_wrong_next(machines, accepted[-1] if accepted else 0)
        machines.storage.heal()
        if machines.committed() != [(1, 10)]:
            return f"{cases[number]}: committed {machines.committed()}"
        return "" if machines.restored("third") == bytes_of(10) else f"{cases[number]}: other bytes"

    each(range(len(cases)), tmp_path, caplog, check)


STAYS: dict[str, Callable[[FaultyStorage, int], None]] = {
    "an outage": lambda storage, number: storage.fail("any", call=number, times=FOR_EVER),
    "an outage with lost answers": lambda storage, number: storage.lose_answer(
        "any", call=number, times=FOR_EVER
    ),
    "credentials that expire": lambda storage, number: storage.fail(
        "any", StoragePermissionError("ExpiredToken"), call=number, times=FOR_EVER
    ),
}


@pytest.mark.slow
def test_a_request_that_is_never_answered_is_made_again(
    places: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence, "SILENCE", 0.3)

    def check(machines: Machines, number: int) -> str:
        machines.storage.hang("any", call=number)
        try:
            whole_run(machines, [])
        except CloudTrainError as error:
            return f"it was noticed: {error!r}"
        if machines.committed() != [(1, 10)]:
            return f"committed: {machines.committed()}"
        return "" if machines.restored("third") == bytes_of(10) else "other bytes"

    each(places, tmp_path, caplog, check)


@pytest.mark.parametrize("trouble", one_fast(STAYS))
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


STAYS_UNSEEN: dict[str, Callable[[FaultyStorage, int], None]] = {
    "no answer": lambda storage, number: storage.hang("any", call=number, times=FOR_EVER),
    "what is there is not found": lambda storage, number: storage.lie("missing", call=number, times=FOR_EVER),
    "listings as at the start": lambda storage, number: storage.lie("late", call=number, times=FOR_EVER),
}


@pytest.mark.parametrize("trouble", one_fast(STAYS_UNSEEN))
def test_a_storage_that_says_nothing_or_lies_from_any_request_on_loses_nothing_that_was_accepted(
    places: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    """What a lie does not touch may end well, and then it is right."""

    def check(machines: Machines, number: int) -> str:
        accepted: list[int] = []
        STAYS_UNSEEN[trouble](machines.storage, number)
        noticed = False
        with monkeypatch.context() as patched:
            patched.setattr(silence, "SILENCE", 0.05 if trouble == "no answer" else silence.SILENCE)
            try:
                whole_run(machines, accepted, timeout=0.05)
            except CloudTrainError:
                noticed = True
        machines.storage.heal()
        for machine in machines.made:
            machine.stop()
        if not noticed and machines.committed() != [(1, 10)]:
            return f"it was not noticed, and committed is {machines.committed()}"
        return what_goes_wrong_next(machines, accepted[-1] if accepted else 0)

    each(places, tmp_path, caplog, check)
