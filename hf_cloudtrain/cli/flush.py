"""`checkpoint flush`: finish the uploads of an outbox, and show what became of each entry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.flush import Outcome, flush_all_runs
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.cli.output import fail, say, show_table, transfer
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.runtime.text import size_text

COLUMNS: Columns = {
    "checkpoint": lambda outcome: outcome.entry.title,
    ">attempt": lambda outcome: outcome.entry.key.attempt,
    ">size": lambda outcome: size_text(outcome.entry.size),
    "state": lambda outcome: outcome.state,
    "run": lambda outcome: outcome.entry.run_url,
}


@dataclass(frozen=True)
class Report:
    """What became of an outbox."""

    outcomes: list[Outcome]
    unreadable: list[str]
    """Folders of entries that cannot be read: a warning has said why, and they do not count as uploaded."""

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        return {"entries": [_record(outcome) for outcome in self.outcomes], "unreadable": self.unreadable}

    def show(self) -> None:
        """The table on stdout."""
        if self.outcomes:
            show_table(COLUMNS, self.outcomes, spare=["attempt", "size", "run"])

    def tell(self, directory: Path) -> None:
        """Write the messages; exit with code 1 if anything is not on storage."""
        if not self.outcomes and not self.unreadable:
            say(f"No pending uploads in {str(directory)!r}.")
        for outcome in self.outcomes:
            if outcome.state == "waiting":
                say(f"{outcome.entry.title}: this host is done. Run the same command on the other hosts.")
        left = [outcome for outcome in self.outcomes if outcome.state in ("kept", "lost")]
        if left or self.unreadable:
            names = [f"{outcome.entry.title} ({outcome.state})" for outcome in left] + self.unreadable
            # A warning has said why an entry is lost.
            reasons = dict.fromkeys(str(o.reason) for o in left if o.reason and o.state == "kept")
            fail(f"Not on storage: {', '.join(names)}. {' '.join(reasons)}".strip())


def flush(directory: Path) -> Report:
    """Upload and commit everything in the outbox of an output folder."""
    outbox = Outbox(directory)
    known = {entry.home.name for entry in outbox.entries()}
    outcomes = flush_all_runs(outbox, transfer)
    homes = list(outbox.folder.iterdir()) if outbox.folder.is_dir() else []
    left = [str(home) for home in homes if not home.name.startswith(".") and home.name not in known]
    return Report(outcomes, sorted(left))


def _record(outcome: Outcome) -> dict[str, Any]:
    entry = outcome.entry
    return {
        "run_url": entry.run_url,
        "title": entry.title,
        "attempt": entry.key.attempt,
        "step": entry.key.step,
        "file_count": len(entry.files),
        "size": entry.size,
        "state": outcome.state,
        "reason": outcome.reason,
    }
