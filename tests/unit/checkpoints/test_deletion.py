"""Deleting one checkpoint. The law about it is tests/laws/test_law_10_retire.py."""

from __future__ import annotations

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import finish_retiring, retire, retiring
from hf_cloudtrain.checkpoints.host_parts import HostParts
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, FileEntry
from hf_cloudtrain.checkpoints.retention import pin
from hf_cloudtrain.errors import ManifestError
from tests.unit.checkpoints.manifests import DIGEST, KEY, claim, manifest_of


def test_a_deleted_checkpoint_leaves_only_its_claim(catalog: Catalog) -> None:
    """A process that still deletes there, or wakes up and writes there, must not meet files of another attempt."""
    claim(catalog, 1)
    before = {info.path for info in catalog.storage.list("")}
    catalog.storage.write("checkpoint-5/model", b"x")
    for save in (1, 2):
        parts = HostParts(catalog, KEY, "nonce", save=save, hosts=2)
        parts.put(0, [])
        parts.elect(0)
    catalog.commit(manifest_of(KEY))
    pin(catalog, KEY)
    catalog.storage.write("checkpoint-5/from a failed upload", b"x")
    assert retire(catalog, KEY)
    assert {info.path for info in catalog.storage.list("")} == before


def test_deleting_a_suffixed_folder_leaves_the_claim_of_the_plain_one(catalog: Catalog) -> None:
    claim(catalog, 1)
    other = CheckpointKey(2, 5)
    catalog.commit(manifest_of(other, folder=claim(catalog, 2)))
    retire(catalog, other)
    assert claim(catalog, 3) == "checkpoint-5.a3"


def test_a_deletion_that_is_stopped_is_finished_later(catalog: Catalog) -> None:
    files = tuple(FileEntry(f"file-{number}", 1, DIGEST) for number in range(20))
    for file in files:
        catalog.storage.write(f"checkpoint-5/{file.path}", b"x")
    catalog.storage.write("checkpoint-50/model", b"of another one")
    catalog.commit(manifest_of(KEY, files=files))
    answers = iter([True, False])
    assert not retire(catalog, KEY, proceed=lambda: next(answers))
    assert not catalog.holds(KEY)
    assert 0 < len(catalog.storage.list("checkpoint-5")) < len(files)
    assert retiring(catalog) == [KEY]
    assert finish_retiring(catalog, KEY)
    assert retiring(catalog) == []
    assert finish_retiring(catalog, KEY), "twice is fine: another process may do it, too"
    assert [info.path for info in catalog.storage.list("")] == ["checkpoint-50/model"]


def test_a_deletion_that_was_interrupted_before_the_manifest_was_deleted_has_not_happened(
    catalog: Catalog,
) -> None:
    catalog.commit(manifest_of(KEY))
    catalog.storage.write(f".cloudtrain/retiring/{KEY}.json", manifest_of(KEY).encode())
    assert not finish_retiring(catalog, KEY)
    assert catalog.holds(KEY)


def test_a_damaged_record_of_a_deletion_does_not_stop_other_deletions(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    path = f".cloudtrain/retiring/{KEY}.json"
    catalog.storage.write(path, b"{")
    assert finish_retiring(catalog, KEY)
    assert retiring(catalog) == []
    assert "cloudtrain run clean" in caplog.text


def test_a_manifest_that_names_the_folder_of_another_checkpoint_is_refused(catalog: Catalog) -> None:
    """A reader would take the files of the other one, and a deletion would delete them."""
    for folder in ("checkpoint-50", "checkpoint-5.a2", "checkpoint-5.a1x", "final"):
        data = manifest_of(KEY, folder=folder).encode()
        catalog.storage.write(".cloudtrain/checkpoints/000001-0000000005.json", data)
        with pytest.raises(ManifestError, match="belongs to another checkpoint"):
            retire(catalog, KEY)
        catalog.storage.write(f"{folder}/model", b"of another one")
        catalog.storage.write(".cloudtrain/retiring/000001-0000000006.json", data)
        assert finish_retiring(catalog, CheckpointKey(1, 6))
        assert catalog.storage.read(f"{folder}/model") == b"of another one"
