"""Who gives which file to a checkpoint, where hosts have disks of their own.

Each disk gives the files that it alone holds. A file of one name on several disks is given by the lowest: every node
may have written its own `config.json`. This is agreed before anything is sent, because two hosts must not write one
object.

A save costs one small meeting of the ranks: a digest of the names a disk holds, and whether it still sends the save
before. The names themselves travel only when a digest has changed; with steps in them left out, that is the first time.

A checkpoint counts only if every host sends its part, so a save that comes while any host still sends is held by all
of them: they begin with it when somebody waits for the end, and the next save takes its place. Left to itself, each
host would skip another one, and on a slow link no set would ever be whole.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hf_cloudtrain.errors import PeerError
from hf_cloudtrain.runtime.ranks import Ranks

Look = Callable[[], tuple[Iterable[str], Iterable[str]]]
"""Gives the names of the files that are on this disk, and of those of them that were written for this save."""


@dataclass(frozen=True)
class Share:
    """One disk's part of a checkpoint."""

    wanted: Callable[[str], bool] | None = lambda path: True
    """Which files it gives, by path; None: it gives nothing."""
    host: int = 0
    """Its number among those that give something."""
    givers: tuple[str, ...] = ("",)
    """Those that give something, in words."""
    hold: bool = False
    """Whether some host still sends an earlier save."""


class HostShares:
    """Agrees, save by save, on what each disk gives.

    Args:
        world: the ranks, which all call `agree`.

    Example:
        >>> share = Shares(world).agree(lambda: (names, names), busy=uploader.is_busy, step=500)
        >>> share.wanted("config.json")
        True
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._digests: list[str] = []
        self._writers: dict[str, int] = {}
        """Which disk wrote a file last, by name."""
        self._given: set[str] = set()
        self._givers: list[int] = []
        self._hosts: list[str] = []

    def agree(self, look: Look, busy: Callable[[], bool], step: int | None = None) -> Share:
        """What this disk gives to the save that all ranks have just written.

        Args:
            step: a number in the names that changes from save to save.

        Raises:
            PeerError: a disk cannot be read, so the checkpoint cannot become whole.
        """
        ranks = self._ranks
        if len(ranks.leaders) == 1:
            return Share()
        found: list[tuple[str, ...]] = []
        answers = ranks.each_leader(lambda: _snapshot(look, busy, step, found), "look at the checkpoint")
        for rank, (_, _, problem) in zip(ranks.leaders, answers, strict=True):
            if problem:
                raise PeerError(f"Rank {rank} could not look at the checkpoint: {problem}")
        digests = [digest for digest, _, _ in answers]
        if digests != self._digests:
            lists = ranks.each_leader(lambda: (platform.node(), found[0], found[1]), "tell what it holds")
            self._share_out([(there, written) for _, there, written in lists])
            self._hosts = [host for host, _, _ in lists]
            self._digests = digests
        return self._mine(step, any(is_busy for _, is_busy, _ in answers))

    def _share_out(self, found: list[tuple[tuple[str, ...], ...]]) -> None:
        for host, (_, written) in reversed(list(enumerate(found))):
            # A name that several disks have written is the first one's.
            self._writers.update(dict.fromkeys(written, host))
        given = [
            {name for name in there if self._writers.get(name, 0) == host}
            for host, (there, _) in enumerate(found)
        ]
        # Where nobody has anything, the first one says so.
        self._givers = [host for host, names in enumerate(given) if names] or [0]
        if self._ranks.is_leader:
            self._given = given[self._ranks.leaders.index(self._ranks.rank)]

    def _mine(self, step: int | None, hold: bool) -> Share:
        leaders = self._ranks.leaders
        givers = tuple(f"rank {leaders[host]} on {self._hosts[host]!r}" for host in self._givers)
        hosts = [leaders[host] for host in self._givers]
        if self._ranks.rank not in hosts:
            return Share(None, 0, givers, hold)
        given = self._given
        return Share(lambda path: _without(step, path) in given, hosts.index(self._ranks.rank), givers, hold)


def _snapshot(
    look: Look, busy: Callable[[], bool], step: int | None, found: list[tuple[str, ...]]
) -> tuple[str, bool, str]:
    """(digest of the names, busy, problem); the names themselves go to `found`."""
    try:
        there, written = look()
        found[:] = (tuple(sorted(_without(step, name) for name in names)) for names in (there, written))
    except FileNotFoundError:
        found[:] = ((), ())  # it has written nothing
    except OSError as error:
        return "", False, str(error)
    text = "\n\n".join("\n".join(names) for names in found)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest(), busy(), ""


def _without(step: int | None, name: str) -> str:
    """The name with the step's number taken out: by a character that no clean path has, so that names stay apart."""
    return name if step is None else re.sub(rf"(?<!\d){step}(?!\d)", "\0", name)
