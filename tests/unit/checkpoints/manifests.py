"""Manifests and claims that the tests of this folder commit."""

from __future__ import annotations

import dataclasses

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, FileEntry, Manifest, Position

DIGEST = "xxh3-128:" + "0" * 32
KEY = CheckpointKey(1, 5)


def manifest_of(key: CheckpointKey, nonce: str = "nonce", **changes: object) -> Manifest:
    whole = Manifest(
        key=str(key),
        folder=f"checkpoint-{key.step}",
        attempt=key.attempt,
        step=key.step,
        nonce=nonce,
        files=(FileEntry("model", 1, DIGEST),),
        position=Position(global_step=key.step),
    )
    return dataclasses.replace(whole, **changes)


def claim(catalog: Catalog, attempt: int, step: int = 5, *, exclusive: bool = True) -> str:
    return catalog.claim(CheckpointKey(attempt, step), f"nonce-{attempt}", exclusive=exclusive)
