"""The ownership of one attempt, and its messages. The law about it is tests/laws/test_law_6_one_writer.py."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.ownership import Ownership
from hf_cloudtrain.errors import OvertakenError
from tests.faults.runs import Machines, wait_until


@pytest.fixture
def ownership(catalog: Catalog) -> Ownership:
    """Of attempt 1, the newest so far."""
    return Ownership(catalog, catalog.attempts.begin(10.0, 0, None, {}))


def begun(catalog: Catalog, **record: Any) -> None:
    """Attempt 2, with a record that anybody may have written."""
    catalog.storage.write(".cloudtrain/attempts/000002.json", json.dumps(record).encode())


def test_a_check_costs_one_list(machines: Machines) -> None:
    catalog = Catalog(machines.storage)
    ownership = Ownership(catalog, catalog.attempts.begin(10.0, 0, None, {}))
    machines.storage.calls.clear()
    assert ownership.look() is None
    assert [call.kind for call in machines.storage.calls] == ["list"]


def test_no_request_is_made_once_the_newer_attempt_is_known(machines: Machines) -> None:
    catalog = Catalog(machines.storage)
    ownership = Ownership(catalog, Attempt(1, "nonce"))
    catalog.attempts.begin(10.0, 0, None, {})
    begun(catalog)
    assert ownership.look() == 2
    machines.storage.calls.clear()
    with pytest.raises(OvertakenError):
        ownership.check()
    assert machines.storage.calls == []


def test_the_background_check_survives_any_error(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", "0.02")
    ownership = Ownership(catalog, catalog.attempts.begin(10.0, 0, None, {}))
    real, calls = catalog.attempts.overtaken_by, []

    def breaks(number: int) -> int | None:
        calls.append(number)
        if len(calls) < 4:
            raise KeyError("of a client")
        return real(number)

    monkeypatch.setattr(catalog.attempts, "overtaken_by", breaks)
    begun(catalog)
    ownership.start()
    wait_until(lambda: ownership.overtaken_by == 2, "the newer attempt")
    assert sum("KeyError" in record.getMessage() for record in caplog.records) == 1


def test_an_overtaken_attempt_stays_overtaken_if_the_newer_record_is_removed(
    catalog: Catalog, ownership: Ownership
) -> None:
    begun(catalog)
    ownership.look()
    catalog.storage.delete([".cloudtrain/attempts/000002.json"])
    assert ownership.look() == 2


def test_the_error_names_both_attempts_and_what_to_do(catalog: Catalog, ownership: Ownership) -> None:
    begun(catalog, started=1_790_000_000.0, facts={"host": "gpu-12"})
    ownership.look()
    assert str(ownership.error("Kept: checkpoint-5. ")) == (
        f"Attempt 1 of {catalog.storage.url!r} was overtaken by attempt 2, which began on host 'gpu-12' at 2026-09-21 "
        "14:13:20 UTC by its clock. Stopping this attempt; it will not write any more checkpoints. Kept: "
        "checkpoint-5. Let attempt 2 continue, or end it before you start the run again."
    )


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "by attempt 2. "),
        ({"started": "soon"}, "by attempt 2. "),
        ({"started": 1e300}, "by attempt 2. "),
        ({"facts": {"host": "\x1b[2J\n" + "x" * 500}}, r"on host '\x1b[2J\n" + "x" * 95 + "'. "),
    ],
)
def test_an_untrusted_record_does_no_harm(
    catalog: Catalog, ownership: Ownership, record: dict[str, Any], words: str
) -> None:
    begun(catalog, **record)
    assert ownership.look() == 2
    assert words in str(ownership.error())


def test_an_attempt_that_has_ended_is_not_overtaken(catalog: Catalog, ownership: Ownership) -> None:
    ownership.end()
    begun(catalog)
    assert ownership.look() is None
    ownership.note(2)
    assert ownership.overtaken_by is None
