"""TODO docstring."""

from __future__ import annotations

from dataclasses import dataclass

from hf_cloudtrain.checkpoints.manifest import (
    CheckpointKey,
)


@dataclass(frozen=True)
class Commit:
    """A checkpoint that came to exist, and when; times are seconds since 1970 on this machine."""

    key: CheckpointKey
    saved: float
    committed: float
    size: int | None = None
    """Bytes, where one host has all of them."""


@dataclass(frozen=True)
class Uploads:
    """How the uploads of a process stand."""

    saved: CheckpointKey | None = None
    """What was saved last."""
    saved_time: float | None = None
    commits: tuple[Commit, ...] = ()
    """Since somebody asked before."""


REMEMBERED_COMMITS = 256
"""Commits that wait for somebody to ask about them; who asks does so at each heartbeat."""
