"""Deleting old checkpoints from the command line: what would go, and then that it goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import finish_retiring, retire, retiring
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.retention import Policy, protected, to_retire
from hf_cloudtrain.cli.output import say, show_table
from hf_cloudtrain.errors import ManifestError, NoCheckpointError
from hf_cloudtrain.report.summary import Found, look_at
from hf_cloudtrain.runtime.text import size_text
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.client import READS_AT_ONCE


@dataclass(frozen=True)
class Plan:
    """What goes from a run, and what stays and why."""

    catalog: Catalog
    going: list[Found]
    damaged: list[Found]
    """They would go, but nobody can read which files are theirs."""
    protected: dict[CheckpointKey, str]
    """Of those that stay, the ones that would go by number alone, each with the reason in words."""

    def rows(self) -> Iterator[tuple[object, ...]]:
        """The lines of the table."""
        for found in self.going:
            size = size_text(found.manifest.size) if found.manifest else None
            record = found.record()
            yield found.title, record["step"], record["attempt"], size, "goes"
        for found in self.damaged:
            yield found.title, None, None, None, "stays: its manifest is damaged"
        for key, reason in self.protected.items():
            yield str(key), key.step, key.attempt, None, f"stays: {reason}"

    def show(self) -> None:
        """The table on stdout."""
        rows = list(self.rows())
        if rows:
            show_table(
                ("checkpoint", "step", "attempt", "size", ""), rows, numbers=("step", "attempt", "size")
            )

    def tell(self, *, dry_run: bool) -> None:
        """The words on stderr."""
        for found in self.damaged:
            say(f"Warning: {found.damaged}")
        if not self.going:
            say("Nothing to delete.")
        elif dry_run:
            size = sum(found.manifest.size for found in self.going if found.manifest)
            say(f"Nothing was deleted; without --dry-run {len(self.going)} would be, {size_text(size)}.")

    def carry_out(self) -> list[Found]:
        """Delete, the oldest first, each looked at once more; those that are gone now."""
        for key in retiring(self.catalog):
            finish_retiring(self.catalog, key)
        return [found for found in self.going if self._retire(found)]

    def record(self, gone: list[Found]) -> dict[str, Any]:
        """What `--json` says."""
        return {
            "going": [found.record() for found in self.going],
            "deleted": [found.key for found in gone],
            "protected": {str(key): reason for key, reason in self.protected.items()},
            "damaged": [found.key for found in self.damaged],
        }

    def _retire(self, found: Found) -> bool:
        key = found.checkpoint_key
        assert key is not None
        reason = protected(self.catalog).get(key)  # a training may go on meanwhile
        if reason is not None:
            say(f"{found.title} stays: {reason}, since a moment ago.")
            return False
        try:
            retire(self.catalog, key)
        except NoCheckpointError:
            pass  # the training's own limit was faster
        except ManifestError as error:
            say(f"{found.title} stays: {error}")
            return False
        say(f"Deleted {found.title} (attempt {key.attempt}).")
        return True


def plan(catalog: Catalog, policy: Policy) -> Plan:
    """What a policy lets go of a run as it is now."""
    keys = catalog.checkpoints()
    kept = protected(catalog)
    by_number = to_retire(keys, policy, protected=())
    going = to_retire(keys, policy, kept)
    (looked,) = in_threads(lambda key: look_at(catalog, key), (going, READS_AT_ONCE))
    found = [item for item in looked if item is not None]
    return Plan(
        catalog,
        going=[item for item in found if item.manifest],
        damaged=[item for item in found if not item.manifest],
        protected={key: kept[key] for key in by_number if key in kept},
    )
