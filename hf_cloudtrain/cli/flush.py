"""Finishing the uploads of one outbox, run by run, and what became of each entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints import flush as outbox_flush
from hf_cloudtrain.checkpoints.outbox import Outbox, OutboxEntry
from hf_cloudtrain.cli.arguments import open_catalog
from hf_cloudtrain.cli.output import fail, say, transfer
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.runtime.text import size_text


@dataclass(frozen=True)
class Outcome:
    """What became of one entry."""

    entry: OutboxEntry
    state: str
    """`committed`; `waiting`: only the parts of other hosts are missing; `kept`: still here, try again; `lost`."""
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """What became of an outbox."""

    entries: list[Outcome]
    unreadable: list[str]
    """Folders of entries that nobody can read. A warning has named the reason; they must not pass for uploaded."""

    def record(self) -> dict[str, Any]:
        """What `--json` says."""
        return {
            "entries": [
                {
                    "run_url": outcome.entry.run_url,
                    "title": outcome.entry.title,
                    "attempt": outcome.entry.key.attempt,
                    "step": outcome.entry.key.step,
                    "file_count": len(outcome.entry.files),
                    "size": outcome.entry.size,
                    "state": outcome.state,
                    "reason": outcome.reason,
                }
                for outcome in self.entries
            ],
            "unreadable": self.unreadable,
        }

    def rows(self) -> Iterator[tuple[object, ...]]:
        """The lines of the table."""
        for outcome in self.entries:
            entry = outcome.entry
            yield entry.title, entry.key.attempt, size_text(entry.size), outcome.state, entry.run_url

    def tell(self, directory: Path) -> None:
        """The words; ends the command with exit code 1 where something is not on storage."""
        if not self.entries and not self.unreadable:
            say(f"Nothing waits for its upload in {str(directory)!r}.")
        for outcome in self.entries:
            if outcome.state == "waiting":
                say(
                    f"{outcome.entry.title}: this host's part is on storage. Run this on the other hosts too."
                )
        left = [outcome for outcome in self.entries if outcome.state in ("kept", "lost")]
        if left or self.unreadable:
            names = [f"{outcome.entry.title} ({outcome.state})" for outcome in left] + self.unreadable
            # Why an entry is lost was said when it was found.
            reasons = dict.fromkeys(str(o.reason) for o in left if o.reason and o.state == "kept")
            fail(f"Not on storage: {', '.join(names)}. {' '.join(reasons)}".strip())


def flush(directory: Path) -> Report:
    """Upload and commit what the outbox of an output folder holds, of all runs."""
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
    """Empty the outbox of one run; trouble is told in the outcomes, so that the next run gets its turn."""
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
            return Outcome(entry, "waiting", "the parts of other hosts are missing")
        return Outcome(entry, "committed")

    return [outcome(entry) for entry in entries]


def _changed(entry: OutboxEntry) -> str | None:
    try:
        entry.check_unchanged()
    except CloudTrainError as error:
        return str(error)
    return None
