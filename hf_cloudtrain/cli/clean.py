"""Deleting what is left over of a run: what there is, what may go, and what became of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.leftovers import LeftOver, Watch, find, remove
from hf_cloudtrain.cli.output import confirm, say, show_table
from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.runtime.text import duration_text, size_text

WORDS = {
    "deletion": "half deleted",
    "upload": "never committed",
    "save": "replaced save",
    "file": "unfinished file",
    "probe": "probe of a start",
}


def clean(catalog: Catalog, *, dry_run: bool, yes: bool, quiet: bool) -> list[dict[str, Any]]:
    """Show what is left over, and delete it once that is confirmed; what became of each thing.

    Args:
        quiet: no table, because stdout is for JSON.
    """
    cleaning = Cleaning(catalog)
    if not quiet:
        cleaning.show()
    if not cleaning.found:
        say("Nothing is left over.")
    elif dry_run:
        say("Nothing was deleted.")
    else:
        confirm(f"Delete what is left over from {redact(catalog.storage.url)!r}?", yes)
        cleaning.carry_out()
    return cleaning.records()


class Cleaning:
    """What is left over of one run; each thing goes at once, after a watch, or not at all."""

    def __init__(self, catalog: Catalog) -> None:
        self.found = find(catalog)
        self._catalog = catalog
        self._states: dict[tuple[str, str], tuple[str, str | None]] = {}

    def rows(self) -> Iterator[tuple[object, ...]]:
        """The lines of the table."""
        for left in self.found:
            verdict = "goes" if left.free else "goes, unless it moves"
            yield left.name, WORDS[left.what], left.attempt, left.count, size_text(left.size), verdict

    def show(self) -> None:
        """The table on stdout."""
        if self.found:
            columns = ("left over", "what", "attempt", "objects", "size", "")
            show_table(columns, self.rows(), numbers=("attempt", "objects", "size"))

    def records(self) -> list[dict[str, Any]]:
        """What `--json` says."""
        records = []
        for left in self.found:
            state, reason = self._states.get((left.what, left.name), ("found", None))
            record = {"what": left.what, "name": left.name, "attempt": left.attempt, "objects": left.count}
            records.append({**record, "size": left.size, "free": left.free, "state": state, "reason": reason})
        return records

    def carry_out(self) -> None:
        """Delete what may go; words on stderr say what became of each."""
        for left in self.found:
            if left.free:
                self._remove(left)
        others = [left for left in self.found if not left.free]
        if not others:
            return
        watch = Watch(self._catalog, others)
        say(f"Watching for {duration_text(watch.seconds)} whether anybody still works on the rest.")
        gone = {(left.what, left.name) for left in others}
        for left, reason in watch.wait():
            gone.discard((left.what, left.name))
            if reason is None:
                self._remove(left)
            else:
                self._note(left, "kept", reason)
        for left in others:
            if (left.what, left.name) in gone:
                self._note(left, "kept", "it is finished now, or somebody else has removed it")

    def _remove(self, left: LeftOver) -> None:
        if remove(self._catalog, left):
            self._note(left, "deleted", None)
        else:
            self._note(
                left,
                "kept",
                "it was committed a moment ago; `cloudtrain checkpoint verify` looks at its files",
            )

    def _note(self, left: LeftOver, state: str, reason: str | None) -> None:
        self._states[left.what, left.name] = (state, reason)
        if reason is None:
            say(f"Deleted {left.name} ({WORDS[left.what]}, {size_text(left.size)}).")
        else:
            say(f"{left.name} stays: {reason}.")
