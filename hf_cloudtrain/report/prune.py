"""What a retention policy deletes from a run now, and what it keeps: shown first, and then carried out exactly."""

from __future__ import annotations

from collections.abc import Iterator

from hf_cloudtrain.checkpoints import retention
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import finish_retiring, retiring
from hf_cloudtrain.report.summary import CheckpointInfo, read_infos
from hf_cloudtrain.runtime.text import count_text, size_text


class PrunePlan:
    """What a policy deletes from a run as it is now, and what it keeps."""

    def __init__(self, catalog: Catalog, policy: retention.Policy) -> None:
        self.catalog = catalog
        keys, self.protected = retention.prunable(catalog, policy)
        found = read_infos(catalog, keys)
        self.going = [info for info in found if info.manifest]
        self.damaged = [info for info in found if not info.manifest]
        """They stay: which files are theirs cannot be read."""

    @property
    def going_text(self) -> str:
        """'5 checkpoints (2.2 GB)'."""
        size = size_text(sum(found.manifest.size for found in self.going if found.manifest))
        return f"{count_text(len(self.going), 'checkpoint')} ({size})"

    def carry_out(self) -> Iterator[tuple[CheckpointInfo, str | None]]:
        """Delete, oldest first; each checkpoint, and why it was kept if something protects it by now."""
        for left in retiring(self.catalog):
            finish_retiring(self.catalog, left)
        for found in self.going:
            key = found.checkpoint_key
            yield found, retention.retire_unprotected(self.catalog, key) if key else None
