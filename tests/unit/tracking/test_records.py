"""Step records on storage, by attempt and in order."""

from __future__ import annotations

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.tracking.records import StepRecords


def test_step_records_are_read_in_order_by_attempt(catalog: Catalog) -> None:
    for attempt, batch in ((1, 2), (1, 10_000), (1, 1), (2, 1)):
        StepRecords(catalog.storage).write(attempt, batch, f"{attempt}/{batch}".encode())
    catalog.storage.write(".cloudtrain/steps/000001-x.jsonl", b"no batch")
    assert StepRecords(catalog.storage).read()[1] == [b"1/1", b"1/2", b"1/10000"]
    assert StepRecords(catalog.storage).read()[2] == [b"2/1"]
    assert StepRecords(catalog.storage).read().get(3, []) == []
