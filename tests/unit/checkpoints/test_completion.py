"""That training is over counts until a newer attempt saves, or more is planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.completion import Completion
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.paths import COMPLETE
from hf_cloudtrain.storage.client import Storage
from tests.unit.checkpoints.manifests import manifest_of


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/run")


@pytest.mark.parametrize(("attempt", "counts"), [(1, True), (2, True), (3, False)])
def test_it_counts_until_a_newer_attempt_saves(storage: Storage, attempt: int, counts: bool) -> None:
    written = Completion(2, 9, {"num_train_epochs": 3.0, "max_steps": 12.0})
    written.write(storage)
    found = Completion.of(storage, manifest_of(CheckpointKey(attempt, 8)))
    assert found == (written if counts else None)


def test_a_run_without_the_record_is_not_complete(storage: Storage) -> None:
    assert Completion.of(storage, manifest_of(CheckpointKey(1, 8))) is None


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"[]",
        b'{"attempt": 1}',
        b'{"attempt": 1, "global_step": -1, "planned": {}}',
        b'{"attempt": "1", "global_step": 8, "planned": {}}',
        b'{"attempt": 1, "global_step": 8, "planned": []}',
    ],
)
def test_a_damaged_record_does_not_count(storage: Storage, record: bytes) -> None:
    storage.write(COMPLETE, record)
    assert Completion.of(storage, manifest_of(CheckpointKey(1, 8))) is None


@pytest.mark.parametrize(
    ("planned", "holds"),
    [
        ({"num_train_epochs": 3.0}, True),
        ({"num_train_epochs": 2.0}, True),
        ({"num_train_epochs": 3.5}, False),
        ({"max_steps": 12.0}, True),
        ({"max_steps": 13.0}, False),
    ],
)
def test_it_holds_until_more_is_planned(planned: dict[str, float], holds: bool) -> None:
    assert Completion(2, 9, {"num_train_epochs": 3.0, "max_steps": 12.0}).holds_for(planned) is holds
