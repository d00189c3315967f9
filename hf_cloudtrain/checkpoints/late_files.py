"""Saves whose files are not all written when they are handed over, as the Checkpointer sees them (`staging/` makes them)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from hf_cloudtrain.checkpoints.frozen import OutboxEntry


class LateFiles(Protocol):
    """What writes the files of a save in the background, and puts them into the outbox once they are whole."""

    def take(
        self,
        folder: Path,
        entry: OutboxEntry,
        since_ns: int,
        submit: Callable[[OutboxEntry], None],
        lose: Callable[[Exception], None],
    ) -> bool:
        """Take over a save; False if its files are all there, so that it needs no one to write them.

        Args:
            submit: called with the accepted entry.
            lose: called with the reason, if the files cannot be written.
        """

    def settle(self, timeout: float | None = None) -> None:
        """Wait until the save under way is whole, or after `timeout` seconds raise NotCommittedError."""

    def end(self) -> None:
        """Stop, once nothing is under way."""
