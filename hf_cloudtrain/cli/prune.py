"""`checkpoint prune`: show what a policy would delete, and delete it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_cloudtrain.cli.output import say, show_table
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.report.prune import PrunePlan
from hf_cloudtrain.report.summary import CheckpointInfo, read_infos
from hf_cloudtrain.runtime.text import size_text

Row = tuple[CheckpointInfo, str]
"""A checkpoint, and what becomes of it."""

COLUMNS: Columns = {
    "checkpoint": lambda row: row[0].title,
    ">step": lambda row: row[0].record()["step"],
    ">attempt": lambda row: row[0].record()["attempt"],
    ">size": lambda row: row[0].manifest and size_text(row[0].manifest.size),
    "action": lambda row: row[1],
}


class Plan(PrunePlan):
    """The same at a terminal."""

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
            say(f"Dry run: {self.going_text} would be deleted.")

    def delete(self) -> list[CheckpointInfo]:
        """Delete, and say so of each; those that are gone now."""
        gone = []
        for found, reason in self.carry_out():
            say(f"Kept {found.title}: {reason}" if reason else f"Deleted {found.title}.")
            gone += [] if reason else [found]
        return gone

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
        for found in read_infos(self.catalog, self.protected):
            yield found, f"keep: {reasons[found.key]}"
