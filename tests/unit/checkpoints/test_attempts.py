"""Attempts: their numbers, their records, and their heartbeats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_cloudtrain.checkpoints.attempts import run_urls
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.storage.client import Storage
from tests.faults.runs import Machines
from tests.unit.checkpoints.manifests import KEY

if TYPE_CHECKING:
    import pytest


def test_attempts_are_numbered_from_1_and_remember_how_they_began(catalog: Catalog) -> None:
    first = catalog.attempts.begin(10.0, 0, None, {"host": "a"})
    second = catalog.attempts.begin(20.0, 5, KEY, {"host": "b"})
    assert (first.number, second.number) == (1, 2)
    assert catalog.attempts.read_all() == [first, second]
    assert second.resumed_from == KEY
    assert second.global_step == 5


def test_the_first_attempt_records_the_run_and_later_ones_do_not_change_it(catalog: Catalog) -> None:
    assert catalog.attempts.run_facts() is None
    catalog.attempts.begin(10.0, 0, None, {"host": "a"})
    catalog.attempts.begin(20.0, 0, None, {"host": "b"})
    assert catalog.attempts.run_facts() == {"created": 10.0, "host": "a"}


def test_a_lost_answer_at_the_start_does_not_take_a_second_number(machines: Machines) -> None:
    catalog = Catalog(machines.storage)
    machines.storage.lose_answer("create", path="*/attempts/*")
    assert catalog.attempts.begin(10.0, 0, None, {}).number == 1
    assert catalog.attempts.numbers() == [1]


def test_an_attempt_with_a_damaged_record_is_skipped_with_a_warning(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    catalog.attempts.begin(10.0, 0, None, {})
    for number, data in enumerate([b"", b"[]", b'{"started": "soon"}', b'{"resumed_from": 5}'], start=2):
        catalog.storage.write(f".cloudtrain/attempts/{number:06d}.json", data)
    assert [attempt.number for attempt in catalog.attempts.read_all()] == [1]
    assert len(caplog.records) == 4
    assert catalog.attempts.begin(20.0, 0, None, {}).number == 6, "its number stays taken"


def test_a_newer_attempt_overtakes_an_older_one(catalog: Catalog) -> None:
    assert catalog.attempts.overtaken_by(1) is None
    for _ in range(3):
        catalog.attempts.begin(10.0, 0, None, {})
    assert catalog.attempts.overtaken_by(1) == 3
    assert catalog.attempts.overtaken_by(3) is None


def test_a_heartbeat_is_read_back(catalog: Catalog) -> None:
    assert catalog.attempts.read_progress(1) is None
    catalog.attempts.write_progress(1, {"step": 5})
    catalog.attempts.write_progress(1, {"step": 6})
    assert catalog.attempts.read_progress(1) == {"step": 6}


def test_runs_below_a_folder_are_found_by_their_records(catalog: Catalog) -> None:
    catalog.attempts.begin(10.0, 0, None, {})
    above = catalog.storage.url.rpartition("/")[0]
    other = Catalog(Storage(f"{above}/deeper/run 2"))
    other.attempts.begin(10.0, 0, None, {})
    assert sorted(run_urls(Storage(above))) == ["deeper/run 2", "run"]
