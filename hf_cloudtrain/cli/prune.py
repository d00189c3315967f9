"""`checkpoint prune`: show what a policy would delete, and delete it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_cloudtrain.checkpoints import retention
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import finish_retiring, retiring
from hf_cloudtrain.cli.output import say, show_table
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.report.summary import CheckpointInfo, read_infos
from hf_cloudtrain.runtime.text import count_text, size_text

Row = tuple[CheckpointInfo, str]
"""A checkpoint, and what becomes of it."""

COLUMNS: Columns = {
    "checkpoint": lambda row: row[0].title,
    ">step": lambda row: row[0].record()["step"],
    ">attempt": lambda row: row[0].record()["attempt"],
    ">size": lambda row: row[0].manifest and size_text(row[0].manifest.size),
    "action": lambda row: row[1],
}


class Plan:
    """What a policy deletes from a run as it is now, and what it keeps."""

    def __init__(self, catalog: Catalog, policy: retention.Policy) -> None:
        self._catalog = catalog
        keys, self.protected = retention.prunable(catalog, policy)
        found = read_infos(catalog, keys)
        self.going = [info for info in found if info.manifest]
        self.damaged = [info for info in found if not info.manifest]
        """They stay: which files are theirs cannot be read."""

    def show(self) -> None:
        """The table on stdout."""
        rows = list(self._rows())
        if rows:
            show_table(COLUMNS, rows, spare=["attempt", "step", "size"], prose="action")

    def tell(self, *, dry_run: bool) -> None:
        """Warn about damaged manifests, and say what is not deleted."""
        for found in self.damaged:
            say(f"Warning: {found.damaged}")
        if not self.going:
            say("Nothing to delete.")
        elif dry_run:
            size = size_text(sum(found.manifest.size for found in self.going if found.manifest))
            what = count_text(len(self.going), "checkpoint")
            say(f"Dry run: {what} ({size}) would be deleted.")

    def carry_out(self) -> list[CheckpointInfo]:
        """Delete, oldest first; those that are gone now."""
        for key in retiring(self._catalog):
            finish_retiring(self._catalog, key)
        return [found for found in self.going if self._retire(found)]

    def record(self, gone: list[CheckpointInfo]) -> dict[str, Any]:
        """For `--json`."""
        return {
            "going": [found.record() for found in self.going],
            "deleted": [found.key for found in gone],
            "protected": {str(key): reason for key, reason in self.protected.items()},
            "damaged": [found.key for found in self.damaged],
        }

    def _rows(self) -> Iterator[Row]:
        yield from ((found, "delete") for found in self.going)
        yield from ((found, "keep: its manifest is damaged") for found in self.damaged)
        reasons = {str(key): reason for key, reason in self.protected.items()}
        for found in read_infos(self._catalog, self.protected):
            yield found, f"keep: {reasons[found.key]}"

    def _retire(self, found: CheckpointInfo) -> bool:
        key = found.checkpoint_key
        reason = retention.retire_unprotected(self._catalog, key) if key else None
        say(f"Kept {found.title}: {reason}" if reason else f"Deleted {found.title}.")
        return reason is None
