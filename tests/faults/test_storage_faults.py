"""A fault at each request of a run in turn: a short one has no visible effect, a permanent one loses nothing."""

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
from tests.faults.aftermath import first_broken_promise
from tests.faults.runs import DEADLINE, Machines, bytes_of, one_fast

FOR_EVER = 1_000_000


def whole_run(machines: Machines, accepted: list[int], timeout: float = DEADLINE) -> None:
    """Start, save, rotate, save the best, commit, retire, restore on a different machine."""
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
    """The storage of a run without faults."""
    with Machines(tmp_path_factory.mktemp("undisturbed")) as machines:
        whole_run(machines, [])
        assert machines.storage.count() > 40, "the sweeps must cover the whole run"
        return machines.storage


@pytest.fixture
def requests(undisturbed: FaultyStorage) -> range:
    """The numbers of all requests of the run."""
    return range(1, undisturbed.count() + 1)


@pytest.fixture
def one_of_each_sort(undisturbed: FaultyStorage) -> list[int]:
    """The number of the first request of each sort, for sweeps that are too slow to try every request."""
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
    """Check a run with the fault at each of its requests, and report every problem."""
    caplog.set_level(logging.CRITICAL)
    problems = []
    for number in requests:
        with Machines(folder / str(number)) as machines:
            if problem := check(machines, number):
                problems.append(f"request {number}, {machines.storage.calls[number - 1]}: {problem}")
    assert not problems, "\n".join(problems)


SHORT_ERRORS = [ConnectionResetError("reset by peer"), TimeoutError("timed out"), OSError("503 Slow Down")]

ONCE: dict[str, Callable[[FaultyStorage, int], None]] = {
    "a failure": lambda storage, number: storage.fail(
        "any", SHORT_ERRORS[number % len(SHORT_ERRORS)], call=number, times=2
    ),
    "a lost answer": lambda storage, number: storage.lose_answer("any", call=number),
}


@pytest.mark.slow
@pytest.mark.parametrize("trouble", one_fast(ONCE))
def test_a_short_fault_at_any_request_has_no_visible_effect(
    requests: range, tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    def check(machines: Machines, number: int) -> str:
        ONCE[trouble](machines.storage, number)
        try:
            whole_run(machines, [])
        except CloudTrainError as error:
            return f"the run failed: {error!r}"
        if machines.committed() != [(1, 10)]:
            return f"committed: {machines.committed()}"
        if machines.catalog.pointer("best") != CheckpointKey(1, 10):
            return "the best pointer is wrong"
        return "" if machines.restored("third") == bytes_of(10) else "the restored files differ"

    each(requests, tmp_path, caplog, check)


Lie = Callable[[FaultyStorage, Any, int], None]

LIES: dict[str, tuple[tuple[str, ...], Lie]] = {
    "credentials have expired": (
        ("create", "upload", "list"),
        lambda storage, kind, n: storage.fail(kind, PermissionError("ExpiredToken"), call=n),
    ),
    "an existing object is not found": (
        ("read", "download", "list"),
        lambda storage, kind, n: storage.lie("missing", kind, call=n),
    ),
    "a missing object exists": (("create",), lambda storage, kind, n: storage.lie("exists", kind, call=n)),
    "listings as at the start": (("list",), lambda storage, kind, n: storage.lie("late", kind, call=n)),
    "wrong sizes": (("list",), lambda storage, kind, n: storage.lie("size", kind, call=n)),
    "different bytes are returned": (
        ("read", "download"),
        lambda storage, kind, n: storage.corrupt(kind, call=n),
    ),
    "different bytes are stored": (("commit",), lambda storage, kind, n: storage.corrupt(kind, call=n)),
}
"""A wrong answer: to which kinds of requests it is given, and how to set it for the n-th of them."""


@pytest.mark.parametrize("lie", one_fast(LIES))
def test_one_wrong_answer_has_no_effect_or_is_reported_before_anything_is_lost(
    undisturbed: FaultyStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture, lie: str
) -> None:
    """The probe at the start may report it, and so may a deletion that the user requests."""
    kinds, set_lie = LIES[lie]
    cases = [(kind, n) for kind in kinds for n in range(1, undisturbed.count(kind) + 1)]

    def check(machines: Machines, number: int) -> str:
        accepted: list[int] = []
        set_lie(machines.storage, *cases[number])
        try:
            whole_run(machines, accepted)
        except CloudTrainError as error:
            last = machines.storage.calls[-1]
            machines.storage.heal()
            if "/probe" not in last.path and not isinstance(error, (NoCheckpointError, ManifestError)):
                return f"{cases[number]}: the run failed: {error!r}"
            for machine in machines.made:
                machine.stop()
            return first_broken_promise(machines, accepted[-1] if accepted else 0)
        machines.storage.heal()
        if machines.committed() != [(1, 10)]:
            return f"{cases[number]}: committed {machines.committed()}"
        return (
            ""
            if machines.restored("third") == bytes_of(10)
            else f"{cases[number]}: the restored files differ"
        )

    each(range(len(cases)), tmp_path, caplog, check)


PERMANENT: dict[str, Callable[[FaultyStorage, int], None]] = {
    "an outage": lambda storage, number: storage.fail("any", call=number, times=FOR_EVER),
    "an outage with lost answers": lambda storage, number: storage.lose_answer(
        "any", call=number, times=FOR_EVER
    ),
    "credentials that expire": lambda storage, number: storage.fail(
        "any", StoragePermissionError("ExpiredToken"), call=number, times=FOR_EVER
    ),
}


@pytest.mark.slow
def test_a_request_without_an_answer_is_retried(
    one_of_each_sort: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(silence, "SILENCE", 0.3)

    def check(machines: Machines, number: int) -> str:
        machines.storage.hang("any", call=number)
        try:
            whole_run(machines, [])
        except CloudTrainError as error:
            return f"the run failed: {error!r}"
        if machines.committed() != [(1, 10)]:
            return f"committed: {machines.committed()}"
        return "" if machines.restored("third") == bytes_of(10) else "the restored files differ"

    each(one_of_each_sort, tmp_path, caplog, check)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", one_fast(PERMANENT))
def test_a_permanent_fault_from_any_request_on_loses_no_accepted_checkpoint(
    requests: range, tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    def check(machines: Machines, number: int) -> str:
        accepted: list[int] = []
        PERMANENT[trouble](machines.storage, number)
        try:
            whole_run(machines, accepted, timeout=0.05)
        except CloudTrainError:
            pass  # the error is expected; the state that is left matters
        else:
            return "the fault was not reported"
        for machine in machines.made:
            machine.stop()
        machines.storage.heal()
        machines.committed()
        return first_broken_promise(machines, accepted[-1] if accepted else 0)

    each(requests, tmp_path, caplog, check)


SILENT_OR_WRONG: dict[str, Callable[[FaultyStorage, int], None]] = {
    "no answer": lambda storage, number: storage.hang("any", call=number, times=FOR_EVER),
    "an existing object is not found": lambda storage, number: storage.lie(
        "missing", call=number, times=FOR_EVER
    ),
    "listings as at the start": lambda storage, number: storage.lie("late", call=number, times=FOR_EVER),
}


@pytest.mark.slow
@pytest.mark.parametrize("trouble", one_fast(SILENT_OR_WRONG))
def test_storage_that_is_silent_or_wrong_from_any_request_on_loses_no_accepted_checkpoint(
    one_of_each_sort: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    """A run that the wrong answers do not affect may succeed; then its checkpoints must be right."""

    def check(machines: Machines, number: int) -> str:
        accepted: list[int] = []
        SILENT_OR_WRONG[trouble](machines.storage, number)
        reported = False
        with monkeypatch.context() as patched:
            patched.setattr(silence, "SILENCE", 0.05 if trouble == "no answer" else silence.SILENCE)
            try:
                whole_run(machines, accepted, timeout=0.05)
            except CloudTrainError:
                reported = True
        machines.storage.heal()
        for machine in machines.made:
            machine.stop()
        if not reported and machines.committed() != [(1, 10)]:
            return f"the fault was not reported, and {machines.committed()} is committed"
        return first_broken_promise(machines, accepted[-1] if accepted else 0)

    each(one_of_each_sort, tmp_path, caplog, check)
