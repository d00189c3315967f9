"""What people call a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.titles import Titles
from hf_cloudtrain.storage.client import Storage
from tests.recorded import commit


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    found = Catalog(Storage(str(tmp_path)))
    commit(found, CheckpointKey(1, 300), 0.0)
    commit(found, CheckpointKey(2, 300), 0.0, folder="checkpoint-300.a2")
    return found


def test_a_title_is_the_folder(catalog: Catalog) -> None:
    titles = Titles(catalog)
    assert titles.of(CheckpointKey(1, 300)) == "checkpoint-300"
    assert titles.of("000002-0000000300") == "checkpoint-300.a2"
    assert titles.of("final-000001") == "final-000001"


def test_a_manifest_is_read_once(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = Catalog.read
    monkeypatch.setattr(Catalog, "read", lambda self, key: reads.append(key) or read(self, key))
    titles = Titles(catalog)
    titles.read([CheckpointKey(1, 300), None, CheckpointKey(2, 300)])
    assert (
        titles.in_text("000001-0000000300, then 000002-0000000300")
        == "checkpoint-300, then checkpoint-300.a2"
    )
    assert len(reads) == 2


def test_a_checkpoint_without_a_readable_manifest_has_step_and_attempt_until_it_is_committed(
    catalog: Catalog,
) -> None:
    titles = Titles(catalog)
    assert titles.of(CheckpointKey(2, 400)) == "checkpoint-400.a2"
    commit(catalog, CheckpointKey(2, 400), 0.0)
    assert titles.of(CheckpointKey(2, 400)) == "checkpoint-400"
