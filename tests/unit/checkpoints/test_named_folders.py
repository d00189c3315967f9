"""Folders that are saved by name."""

from __future__ import annotations

import dataclasses

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.errors import NoCheckpointError
from tests.unit.checkpoints.manifests import manifest_of


def test_versions_of_a_named_folder_do_not_overwrite_each_other(catalog: Catalog) -> None:
    assert NamedFolders(catalog).begin("final", "nonce-1") == ("final-000001", "final")
    assert NamedFolders(catalog).begin("final", "nonce-1") == ("final-000001", "final"), (
        "the same save tried again"
    )
    assert NamedFolders(catalog).begin("final", "nonce-2") == ("final-000002", "final.2")
    for number, folder in ((1, "final"), (2, "final.2")):
        made = manifest_of(CheckpointKey(0, 0), folder=folder)
        assert NamedFolders(catalog).commit(dataclasses.replace(made, key=f"final-{number:06d}"))
    assert NamedFolders(catalog).keys() == ["final-000001", "final-000002"]
    assert NamedFolders(catalog).read("final-000002").folder == "final.2"
    assert catalog.checkpoints() == [], "a named folder is not a checkpoint"
    with pytest.raises(NoCheckpointError, match="no folder 'last-000001'"):
        NamedFolders(catalog).read("last-000001")
