"""Which host gives which file to a checkpoint, if hosts have disks of their own.

Each disk gives the files that it alone holds. If several disks hold a file of one name, the lowest gives it: every node
may have written its own `config.json`. The ranks agree on this before anything is sent, because two hosts must not write
one object.

A save costs one small exchange between the ranks: a digest of the names that a disk holds, and whether it is still sending
an earlier save. The names themselves are exchanged only when a digest has changed; without the steps in them, that is the
first time.

A checkpoint counts only if every host sends its part. So a save that comes while any host is still sending is held by all
of them: they begin with it when a process waits for the end, and the next save replaces it. If each host decided alone, it
would skip a different save, and on a slow link no set would ever be complete.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from hf_cloudtrain.checkpoints.commit_watch import CommitWatch
from hf_cloudtrain.checkpoints.frozen import ALL_FILES, OutboxEntry, Wanted
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.upload_queue import UploadQueue
from hf_cloudtrain.errors import PeerError
from hf_cloudtrain.runtime.ranks import Ranks

Look = Callable[[], tuple[Iterable[str], Iterable[str]]]
"""Finds the names of the files that are on this disk, and of those of them that were written for this save."""


@dataclass(frozen=True)
class Share:
    """What this disk gives to a save; everything, if it is the only one."""

    entry: OutboxEntry
    wanted: Wanted | None = ALL_FILES
    """Which files it gives, by path; None: it gives nothing."""
    hold: bool = False
    """Whether some host is still sending an earlier save."""
    givers: tuple[str, ...] = ("",)
    """The hosts that give something, for messages."""


class HostShares:
    """Agrees, save by save, on what each disk gives. All ranks call `agree`.

    Args:
        watch: on rank 0, watches until the save is committed.
        step_in_names: whether names of files may contain the step, and so change from save to save.
    """

    def __init__(self, ranks: Ranks, watch: CommitWatch | None, *, step_in_names: bool) -> None:
        self._ranks = ranks
        self._watch = watch
        self._step_in_names = step_in_names
        self._digests: list[str] = []
        self._writers: dict[str, int] = {}
        """Which disk wrote a file last, by name."""
        self._given: set[str] = set()
        self._givers: list[int] = []
        self._hosts: list[str] = []
        self._last: CheckpointKey | None = None
        self._saves = 0
        """How often the last step was saved."""

    def agree(self, entry: OutboxEntry, look: Look, queue: UploadQueue | None) -> Share:
        """What this disk gives to the save that all ranks have just written.

        Args:
            queue: the uploads of this disk, on the rank that does them.

        Raises:
            PeerError: a disk cannot be read, so the checkpoint cannot become whole.
        """
        ranks = self._ranks
        self._saves = self._saves + 1 if entry.key == self._last else 1
        self._last = entry.key
        if self._saves > 1:
            entry = replace(entry, save=self._saves, nonce=f"{entry.nonce}-{self._saves}")
        step = entry.key.step if self._step_in_names else None
        found: list[tuple[str, ...]] = []
        answers = ranks.each_leader(lambda: _snapshot(look, queue, step, found), "look at the checkpoint")
        for rank, (_, _, problem) in zip(ranks.leaders, answers, strict=True):
            if problem:
                raise PeerError(f"Rank {rank} could not look at the checkpoint: {problem}")
        digests = [digest for digest, _, _ in answers]
        if digests != self._digests:
            lists = ranks.each_leader(lambda: (platform.node(), found[0], found[1]), "list its files")
            self._share_out([(there, written) for _, there, written in lists])
            self._hosts = [host for host, _, _ in lists]
            self._digests = digests
        share = self._mine(entry, step, any(busy for _, busy, _ in answers))
        if self._watch is not None:
            self._watch.expect(share.entry, share.givers)
        return share

    def _share_out(self, found: list[tuple[tuple[str, ...], ...]]) -> None:
        for host, (_, written) in reversed(list(enumerate(found))):
            # A name that several disks have written belongs to the first one.
            self._writers.update(dict.fromkeys(written, host))
        given = [
            {name for name in there if self._writers.get(name, 0) == host}
            for host, (there, _) in enumerate(found)
        ]
        # If no disk has anything, the first one reports it.
        self._givers = [host for host, names in enumerate(given) if names] or [0]
        if self._ranks.is_leader:
            self._given = given[self._ranks.leaders.index(self._ranks.rank)]

    def _mine(self, entry: OutboxEntry, step: int | None, hold: bool) -> Share:
        leaders, rank = self._ranks.leaders, self._ranks.rank
        givers = tuple(f"rank {leaders[host]} on {self._hosts[host]!r}" for host in self._givers)
        hosts = [leaders[host] for host in self._givers]
        entry = replace(entry, hosts=len(givers), host=hosts.index(rank) if rank in hosts else 0)
        if rank not in hosts:
            return Share(entry, None, hold, givers)
        given = self._given
        return Share(entry, lambda path: _without(step, path) in given, hold and len(givers) > 1, givers)


def _snapshot(
    look: Look, queue: UploadQueue | None, step: int | None, found: list[tuple[str, ...]]
) -> tuple[str, bool, str]:
    """(digest of the names, busy, problem); the names themselves go to `found`."""
    try:
        there, written = look()
        found[:] = (tuple(sorted(_without(step, name) for name in names)) for names in (there, written))
    except FileNotFoundError:
        found[:] = ((), ())  # it has written nothing
    except OSError as error:
        return "", False, str(error)
    busy = queue is not None and queue.is_busy()
    text = "\n\n".join("\n".join(names) for names in found)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest(), busy, ""


def _without(step: int | None, name: str) -> str:
    """The name without the step's number: a character that no clean path has replaces it, so that names stay distinct."""
    return name if step is None else re.sub(rf"(?<!\d){step}(?!\d)", "\0", name)
