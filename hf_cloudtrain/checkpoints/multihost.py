"""The saves of a run whose hosts have disks of their own. A run on one host, or on one shared disk, never comes here.

host_shares.py    before the upload: which disk gives which file
host_parts.py     during the upload: what each host has sent, and which host commits
commit_watch.py   after the upload: rank 0 sees that the checkpoint exists
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.commit_watch import CommitWatch
from hf_cloudtrain.checkpoints.host_shares import HostShares, Look
from hf_cloudtrain.checkpoints.outbox import OutboxEntry
from hf_cloudtrain.checkpoints.upload_status import UploadStatus
from hf_cloudtrain.errors import NotCommittedError
from hf_cloudtrain.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

LAST_LOOK = 60.0
"""Seconds that a process which ends early waits for the parts of other hosts: they may be gone."""


@dataclass(frozen=True)
class Part:
    """What one disk gives to a save."""

    entry: OutboxEntry
    wanted: Callable[[str], bool] | None = lambda path: True
    """Which files it gives, by path; None: it gives nothing."""
    lost: bool = False
    """Whether the save is lost, because a disk could not be read."""
    hold: bool = False
    """Whether to send it only when a process waits for the end; the next save replaces it until then."""


class ManyHosts:
    """The hosts of one run. All ranks call `part`; only rank 0 watches for commits."""

    def __init__(self, catalog: Catalog, ranks: Ranks, uploads: UploadStatus) -> None:
        self._shares = HostShares(ranks)
        self._uploads = uploads
        self._watch = CommitWatch(catalog, uploads) if ranks.is_main else None

    def part(
        self, entry: OutboxEntry, look: Look, is_busy: Callable[[], bool], step: int | None, *, keep: bool
    ) -> Part:
        """Agree on what this disk gives to the save that all ranks have just written.

        Args:
            look: see `HostShares.agree`, as `is_busy` and `step`.
            keep: whether the save must not be held, because it is a best or a pinned one.

        Raises:
            PeerError: a disk cannot be read, so the checkpoint cannot become whole.
        """
        share = self._shares.agree(look, is_busy, step)
        entry = replace(entry, host=share.host, hosts=len(share.givers))
        if self._watch is not None and entry.key != self._uploads.last_committed:
            self._watch.expect(entry, share.givers)
        return Part(entry, share.wanted, hold=share.hold and entry.hosts > 1 and not keep)

    def wait(self, seconds: float, is_over: Callable[[], bool]) -> None:
        """Return when the newest save is committed, or when `is_over`. Raises NotCommittedError after `seconds`."""
        if self._watch is not None:
            self._watch.wait(seconds, is_over)

    def drain(self) -> None:
        """Wait for the other hosts' parts before this process ends; never raises."""
        if self._watch is not None:
            try:
                self._watch.wait(min(LAST_LOOK, env.drain_timeout()))
            except NotCommittedError as error:
                logger.error("%s", error)

    def close(self) -> None:
        """Stop watching."""
        if self._watch is not None:
            self._watch.close()
