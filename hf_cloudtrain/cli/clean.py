"""`run clean` and `data clean`: show what is left over, delete it once that is confirmed, and say what became of it."""

from __future__ import annotations

from typing import Any

from hf_cloudtrain.checkpoints import leftovers
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.leftovers import LeftOver
from hf_cloudtrain.cli.output import confirm, say, show_table
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.runtime.text import duration_text, size_text

KINDS = {
    "deletion": "interrupted deletion",
    "upload": "uncommitted upload",
    "save": "replaced save",
    "file": "unfinished file",
    "probe": "startup probe",
}
COLUMNS: Columns = {
    "left over": lambda left: left.name,
    "what": lambda left: KINDS[left.what],
    ">attempt": lambda left: left.attempt,
    ">objects": lambda left: left.count,
    ">size": lambda left: size_text(left.size),
    "action": lambda left: "delete" if left.free else "delete if idle",
}


def clean(catalog: Catalog, *, dry_run: bool, yes: bool, quiet: bool) -> list[dict[str, Any]]:
    """Delete what is left over of a run or a store; the records for `--json`.

    Args:
        quiet: no table, because stdout is for JSON.
    """
    found = leftovers.find(catalog)
    outcomes: dict[LeftOver, tuple[str, str | None]] = dict.fromkeys(found, ("found", None))
    if found and not quiet:
        show_table(COLUMNS, found, spare=["attempt", "objects", "size"])
    if not found:
        say("Nothing is left over.")
    elif dry_run:
        say("Dry run: nothing was deleted.")
    else:
        confirm(f"Delete what is left over from {redact(catalog.storage.url)!r}?", yes)
        for left, reason in leftovers.clean(catalog, found, _say_watching):
            outcomes[left] = ("kept" if reason else "deleted", reason)
            what = f"{left.name} ({KINDS[left.what]}, {size_text(left.size)})"
            say(f"Kept {what}: {reason}." if reason else f"Deleted {what}.")
    return [_record(left, *outcome) for left, outcome in outcomes.items()]


def _say_watching(seconds: float) -> None:
    say(f"Watching the rest for {duration_text(seconds)}: what a process still writes to is kept.")


def _record(left: LeftOver, state: str, reason: str | None) -> dict[str, Any]:
    return {
        "what": left.what,
        "name": left.name,
        "attempt": left.attempt,
        "objects": left.count,
        "size": left.size,
        "free": left.free,
        "state": state,
        "reason": reason,
    }
