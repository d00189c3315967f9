"""`checkpoint flush`: finish the uploads of an outbox, run by run, and say what became of each entry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints import flush as outbox_flush
from hf_cloudtrain.checkpoints.outbox import Outbox, OutboxEntry
from hf_cloudtrain.cli.arguments import open_catalog
from hf_cloudtrain.cli.output import Columns, fail, say, transfer
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.runtime.text import size_text

COLUMNS: Columns = {
    "checkpoint": lambda outcome: outcome.entry.title,
    ">attempt": lambda outcome: outcome.entry.key.attempt,
    ">size": lambda outcome: size_text(outcome.entry.size),
    "state": lambda outcome: outcome.state,
    "run": lambda outcome: outcome.entry.run_url,
}


@dataclass(frozen=True)
class Outcome:
    """What became of one entry."""

    entry: OutboxEntry
    state: str
    """`committed`; `waiting` for the files of other hosts; `kept` in the outbox, to try again; `lost`."""
    reason: str | None = None

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "run_url": self.entry.run_url,
            "title": self.entry.title,
            "attempt": self.entry.key.attempt,
            "step": self.entry.key.step,
            "file_count": len(self.entry.files),
            "size": self.entry.size,
            "state": self.state,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Report:
    """What became of an outbox."""

    outcomes: list[Outcome]
    unreadable: list[str]
    """Folders of entries that cannot be read: a warning has said why, and they do not count as uploaded."""

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
    """Upload and commit everything in the outbox of an output folder, whatever run it belongs to."""
    outbox = Outbox(directory)
    entries = outbox.entries()
    outcomes: list[Outcome] = []
    for url in dict.fromkeys(entry.run_url for entry in entries):
        outcomes += _flush_run(outbox, url, [entry for entry in entries if entry.run_url == url])
    known = {entry.home.name for entry in entries}
    homes = list(outbox.folder.iterdir()) if outbox.folder.is_dir() else []
    left = [str(home) for home in homes if not home.name.startswith(".") and home.name not in known]
    return Report(outcomes, sorted(left))


def _flush_run(outbox: Outbox, url: str, entries: list[OutboxEntry]) -> list[Outcome]:
    """Empty the outbox of one run. An error becomes a reason in the outcomes, so that the next run is flushed too."""
    damaged = {entry.home: reason for entry in entries if (reason := _changed(entry))}
    committed: set[Path] = set()
    incomplete: set[Path] = set()
    trouble = None
    try:
        catalog = open_catalog(url)
        catalog.storage.check()
        with transfer() as progress:
            committed = {entry.home for entry in outbox_flush.flush(catalog, outbox, progress)}
        keys = catalog.checkpoints()
        incomplete = {entry.home for entry in entries if entry.hosts > 1 and entry.key not in keys}
    except CloudTrainError as error:
        trouble = str(error)

    def outcome(entry: OutboxEntry) -> Outcome:
        if entry.home.exists():
            return Outcome(entry, "kept", trouble)
        if entry.home in damaged and entry.home not in committed:
            return Outcome(entry, "lost", damaged[entry.home])
        if entry.home in incomplete:
            return Outcome(entry, "waiting", "other hosts have not uploaded their files")
        return Outcome(entry, "committed")

    return [outcome(entry) for entry in entries]


def _changed(entry: OutboxEntry) -> str | None:
    try:
        entry.check_unchanged()
    except CloudTrainError as error:
        return str(error)
    return None
