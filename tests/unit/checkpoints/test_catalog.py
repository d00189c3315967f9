"""Which checkpoints exist, record by record. The laws about it are in tests/laws."""

from __future__ import annotations

import json

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, FileEntry
from hf_cloudtrain.errors import ManifestError, NoCheckpointError, StorageUnavailableError
from tests.faults.runs import Machines
from tests.unit.checkpoints.manifests import DIGEST, KEY, claim, manifest_of


def test_an_error_for_a_missing_checkpoint_names_it_and_the_list_command(catalog: Catalog) -> None:
    with pytest.raises(NoCheckpointError, match=r"'000001-0000000005' in .*cloudtrain checkpoint list"):
        catalog.read(KEY)


def test_a_manifest_under_the_name_of_another_checkpoint_is_refused(catalog: Catalog) -> None:
    data = manifest_of(KEY, attempt=2).encode()
    catalog.storage.write(".cloudtrain/checkpoints/000001-0000000005.json", data)
    with pytest.raises(ManifestError, match="is of attempt 2, step 5"):
        catalog.read(KEY)


def test_a_repeated_commit_of_the_same_save_succeeds_without_a_second_checkpoint(catalog: Catalog) -> None:
    assert catalog.commit(manifest_of(KEY))
    assert catalog.commit(manifest_of(KEY)), "the same save again: its first answer may have been lost"
    assert catalog.commit(manifest_of(KEY, created=5.0)), "equal nonces are one save"
    assert not catalog.commit(manifest_of(KEY, nonce="other"))
    assert catalog.read(KEY).created == 0.0


def test_a_commit_counts_although_every_answer_is_lost(machines: Machines) -> None:
    machines.storage.lose_answer("create", path="*/checkpoints/*", times=1)
    machines.storage.fail("create", call=2, times=100, path="*/checkpoints/*")
    assert Catalog(machines.storage).commit(manifest_of(KEY))


def test_a_commit_that_failed_is_an_error(machines: Machines) -> None:
    machines.storage.fail("create", times=100, path="*/checkpoints/*")
    with pytest.raises(StorageUnavailableError):
        Catalog(machines.storage).commit(manifest_of(KEY))
    assert machines.catalog.checkpoints() == []


def test_a_manifest_that_could_not_be_read_back_is_not_committed(catalog: Catalog) -> None:
    files = (FileEntry("../away", 1, DIGEST),)
    with pytest.raises(ManifestError):
        catalog.commit(manifest_of(KEY, files=files))
    assert catalog.checkpoints() == []


def test_the_first_attempt_to_claim_a_step_gets_the_plain_name(catalog: Catalog) -> None:
    assert claim(catalog, 2) == "checkpoint-5"
    assert claim(catalog, 1) == "checkpoint-5.a1"
    assert claim(catalog, 2) == "checkpoint-5", "the same attempt continues in its own folder"
    assert claim(catalog, 3) == "checkpoint-5.a3"
    assert claim(catalog, 3, step=6) == "checkpoint-6"


def test_without_exclusive_create_only_attempt_1_may_take_the_plain_name(catalog: Catalog) -> None:
    assert claim(catalog, 2, exclusive=False) == "checkpoint-5.a2"
    assert claim(catalog, 1, exclusive=False) == "checkpoint-5"


def test_pointers_name_a_checkpoint_and_move(catalog: Catalog) -> None:
    assert catalog.pointer("best") is None
    catalog.point("best", KEY, 0.5)
    catalog.point("best", CheckpointKey(1, 10), 0.6)
    assert catalog.pointer("best") == CheckpointKey(1, 10)
    assert json.loads(catalog.storage.read(".cloudtrain/best.json"))["metric"] == 0.6
