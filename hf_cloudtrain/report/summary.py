"""What the command line says about one checkpoint: as a record for `--json`, and as words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest, parse_checkpoint_key
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.retention import pins, protected
from hf_cloudtrain.errors import ManifestError, NoCheckpointError
from hf_cloudtrain.runtime.text import size_text, time_text


@dataclass(frozen=True)
class Standing:
    """Which checkpoints matter more than others, and why."""

    keys: list[CheckpointKey]
    """All that exist, the newest last."""
    best: CheckpointKey | None
    protected: dict[CheckpointKey, str]
    pinned: frozenset[CheckpointKey] = frozenset()

    @classmethod
    def of(cls, catalog: Catalog) -> Standing:
        """As the run is now."""
        return cls(
            catalog.checkpoints(), catalog.pointer("best"), protected(catalog), frozenset(pins(catalog))
        )

    def losses(self, key: CheckpointKey) -> list[str]:
        """What goes with a checkpoint beside its files, a sentence each; empty where nothing does."""
        losses = []
        if self.keys[-1:] == [key]:
            before = self.keys[-2] if len(self.keys) > 1 else None
            where = f"at step {before.step} instead of {key.step}" if before else "anew, at step 0"
            losses.append(f"It is the newest one, so the run would resume {where}.")
        if key == self.best:
            losses.append("It is the best one, and no other is recorded as such.")
        if key in self.pinned:
            losses.append("It is pinned.")
        if key in self.protected and not losses:
            losses.append(f"{self.protected[key][:1].upper()}{self.protected[key][1:]}.")
        return losses


@dataclass(frozen=True)
class Found:
    """A checkpoint or a folder saved by name, as it was found on storage."""

    key: str
    manifest: Manifest | None
    damaged: str | None = None
    """What is wrong with the manifest, if there is none to go by."""

    @property
    def title(self) -> str:
        """What a person calls it."""
        return self.manifest.folder if self.manifest else self.key

    @property
    def checkpoint_key(self) -> CheckpointKey | None:
        """None for a folder saved by name."""
        found = parse_checkpoint_key(self.key)
        return CheckpointKey(*found) if found else None

    def record(self) -> dict[str, Any]:
        """What `--json` says of it, and nothing that only a look at other records tells."""
        key, manifest = self.checkpoint_key, self.manifest
        return {
            "key": self.key,
            "folder": manifest.folder if manifest else None,
            "attempt": manifest.attempt if manifest else key and key.attempt,
            "step": manifest.step if manifest else key and key.step,
            "file_count": len(manifest.files) if manifest else None,
            "size": manifest.size if manifest else None,
        }

    def full_record(self, standing: Standing) -> dict[str, Any]:
        """The same, with when and how it was saved and what it is to the run."""
        key, manifest = self.checkpoint_key, self.manifest
        return {
            **self.record(),
            "epoch": manifest.position.epoch if manifest else None,
            "created": manifest.created if manifest else None,
            "exact": manifest.exact if manifest else None,
            "inexact_reason": manifest.inexact_reason if manifest else None,
            "metrics": manifest.metrics if manifest else {},
            "newest": key is not None and standing.keys[-1:] == [key],
            "best": key is not None and key == standing.best,
            "pinned": key in standing.pinned,
            "protected": standing.protected.get(key) if key else None,
            "damaged": self.damaged,
        }

    def row(self, standing: Standing) -> tuple[object, ...]:
        """Its line in the table of `list`."""
        record = self.record()
        manifest = self.manifest
        notes = self.role(standing)
        if manifest is None:
            notes.append("damaged manifest")
        elif not manifest.exact:
            notes.append("not exact")
        return (
            self.title,
            record["step"],
            record["attempt"],
            record["file_count"],
            size_text(manifest.size) if manifest else None,
            time_text(manifest.created) if manifest else None,
            ", ".join(notes),
        )

    def role(self, standing: Standing) -> list[str]:
        """What it is to the run, in few words."""
        key = self.checkpoint_key
        if key is None:
            return []
        words = [
            *(["newest"] if standing.keys[-1:] == [key] else []),
            *(["best"] if key == standing.best else []),
            *(["pinned"] if key in standing.pinned else []),
        ]
        return words or [reason for other, reason in standing.protected.items() if other == key]


def look_at(catalog: Catalog, key: CheckpointKey | str) -> Found | None:
    """Read one manifest, damaged or not; None where it was deleted since the listing."""
    try:
        return Found(str(key), NamedFolders(catalog).read(key) if isinstance(key, str) else catalog.read(key))
    except NoCheckpointError:
        return None
    except ManifestError as error:
        return Found(str(key), None, str(error))


def files_text(manifest: Manifest) -> str:
    """'12 files, 1.3 GB'."""
    count = len(manifest.files)
    return f"{count} file{'' if count == 1 else 's'}, {size_text(manifest.size)}"
