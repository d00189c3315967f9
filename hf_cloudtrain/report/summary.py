"""One checkpoint as the command line and the page show it: its manifest, and what it is to the run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.retention import pins, protected
from hf_cloudtrain.checkpoints.titles import title_without_manifest
from hf_cloudtrain.errors import ManifestError, NoCheckpointError
from hf_cloudtrain.runtime.text import count_text, size_text
from hf_cloudtrain.runtime.threads import in_threads

MANIFESTS_AT_ONCE = 16
"""Read at the same time: a person waits for the list, and reading takes round trips rather than bandwidth."""


@dataclass(frozen=True)
class Roles:
    """Which checkpoints of a run are the newest, the best, pinned or protected."""

    keys: list[CheckpointKey]
    """All that exist, the newest last."""
    best: CheckpointKey | None
    protected: dict[CheckpointKey, str]
    """Those that are never deleted automatically, each with the reason."""
    pinned: frozenset[CheckpointKey] = frozenset()

    @classmethod
    def of(cls, catalog: Catalog) -> Roles:
        """As they are now."""
        pinned = frozenset(pins(catalog))
        return cls(catalog.checkpoints(), catalog.pointer("best"), protected(catalog), pinned)

    def losses(self, key: CheckpointKey) -> list[str]:
        """What the run loses with a checkpoint beside its files, one sentence each."""
        losses = []
        if self.keys[-1:] == [key]:
            before = self.keys[-2] if len(self.keys) > 1 else None
            start = (
                f"at step {before.step} instead of {key.step}" if before else "from the beginning, at step 0"
            )
            losses.append(f"It is the newest checkpoint, so the run would resume {start}.")
        if key == self.best:
            losses.append("It is the best checkpoint, and the run records no other one as best.")
        if key in self.pinned:
            losses.append("It is pinned.")
        if key in self.protected and not losses:
            losses.append(f"{self.protected[key][:1].upper()}{self.protected[key][1:]}.")
        return losses


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint or a folder saved by name, as read from storage."""

    key: str
    manifest: Manifest | None
    damaged: str | None = None
    """What is wrong with the manifest; None if it could be read."""

    @property
    def title(self) -> str:
        """Its folder; step and attempt in the same form if the manifest is damaged."""
        if self.manifest:
            return self.manifest.folder
        key = self.checkpoint_key
        return title_without_manifest(key) if key else self.key

    @property
    def checkpoint_key(self) -> CheckpointKey | None:
        """None for a folder saved by name."""
        return CheckpointKey.named(self.key)

    def record(self) -> dict[str, Any]:
        """For `--json`: what its own manifest says."""
        key, manifest = self.checkpoint_key, self.manifest
        return {
            "key": self.key,
            "folder": manifest.folder if manifest else None,
            "attempt": manifest.attempt if manifest else key and key.attempt,
            "step": manifest.step if manifest else key and key.step,
            "file_count": len(manifest.files) if manifest else None,
            "size": manifest.size if manifest else None,
        }

    def full_record(self, roles: Roles) -> dict[str, Any]:
        """The same, with how and when it was saved, and what it is to the run."""
        key, manifest = self.checkpoint_key, self.manifest
        return {
            **self.record(),
            "epoch": manifest.position.epoch if manifest else None,
            "created": manifest.created if manifest else None,
            "exact": manifest.exact if manifest else None,
            "inexact_reason": manifest.inexact_reason if manifest else None,
            "metrics": manifest.metrics if manifest else {},
            "newest": key is not None and roles.keys[-1:] == [key],
            "best": key is not None and key == roles.best,
            "pinned": key in roles.pinned,
            "protected": roles.protected.get(key) if key else None,
            "damaged": self.damaged,
        }

    def roles_in(self, roles: Roles) -> list[str]:
        """`newest`, `best`, `pinned`, or else why it is protected."""
        key = self.checkpoint_key
        if key is None:
            return []
        found = {
            "newest": roles.keys[-1:] == [key],
            "best": key == roles.best,
            "pinned": key in roles.pinned,
        }
        return [name for name, has in found.items() if has] or [
            reason for other, reason in roles.protected.items() if other == key
        ]


def read_infos(catalog: Catalog, keys: Iterable[CheckpointKey | str]) -> list[CheckpointInfo]:
    """Read manifests, damaged ones too, in the order of their keys; those deleted since the listing are left out."""
    (found,) = in_threads(lambda key: _read(catalog, key), (list(keys), MANIFESTS_AT_ONCE))
    return [info for info in found if info is not None]


def _read(catalog: Catalog, key: CheckpointKey | str) -> CheckpointInfo | None:
    try:
        manifest = NamedFolders(catalog).read(key) if isinstance(key, str) else catalog.read(key)
        return CheckpointInfo(str(key), manifest)
    except NoCheckpointError:
        return None
    except ManifestError as error:
        return CheckpointInfo(str(key), None, str(error))


def files_text(manifest: Manifest) -> str:
    """'12 files, 1.3 GB'."""
    return f"{count_text(len(manifest.files), 'file')}, {size_text(manifest.size)}"
