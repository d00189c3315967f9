"""How the uploads of this process stand: one object that the saving side writes to and that others read.

Checkpointer    what was saved last
UploadQueue     what it committed, and how fast
CommitWatch     what several hosts completed, as rank 0 saw it
-> tracker, preemption, exit record
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from hf_cloudtrain.checkpoints.manifest import CheckpointKey

REMEMBERED_COMMITS = 256
"""Commits that are kept for the tracker, which takes them at each heartbeat."""


@dataclass(frozen=True)
class Commit:
    """A checkpoint that was committed, and when; times are seconds since 1970 on this machine."""

    key: CheckpointKey
    saved: float
    committed: float
    size: int | None = None
    """Bytes, if one host has all of them."""


class UploadStatus:
    """How the uploads of one Checkpointer stand.

    Example:
        >>> status.last_committed
        CheckpointKey(attempt=3, step=500)
        >>> status.take_commits()     # each commit is handed out once
        [Commit(key=CheckpointKey(attempt=3, step=500), …)]
    """

    def __init__(self) -> None:
        self.last_saved: CheckpointKey | None = None
        self.last_saved_time: float | None = None
        """Seconds since 1970."""
        self.last_committed: CheckpointKey | None = None
        """The newest checkpoint that this process committed, or on rank 0 saw committed."""
        self.pace: tuple[int, float] | None = None
        """Bytes of the checkpoint that was uploaded last, and bytes per second; None before the first."""
        self._commits: deque[Commit] = deque(maxlen=REMEMBERED_COMMITS)
        self._lock = threading.Lock()

    def committed(self, commit: Commit) -> None:
        """Note a commit. Rank 0 may note one twice: from its own upload and from its watch."""
        with self._lock:
            if commit.key == self.last_committed:
                return
            self.last_committed = max(commit.key, self.last_committed or commit.key)
            self._commits.append(commit)

    def take_commits(self) -> list[Commit]:
        """The commits since the last call."""
        with self._lock:
            taken = list(self._commits)
            self._commits.clear()
        return taken
