"""What several hosts give to one checkpoint, and which of them commits it.

    <run URL>/.cloudtrain/parts/000003-0000000500/
        folder.json         exclusive create: where all of them send their files
        0-of-2.json         the files that one host has sent; it sends nothing more
        committer.json      exclusive create: which host commits
        save-2/…            the same, if the step was saved again before its commit

A host writes its part and lists the others' once. Listings are consistent with writes on every store we use, so the host
that writes last sees a whole set, and no host needs to ask again. If several finish at one moment, one of them is elected:
reading all parts is the only work that grows with their number.

A host makes, besides one request a file and the listing of the checkpoint's folder, at most `MOST_REQUESTS` requests and one
LIST of the parts (a page holds 1,000 names), whatever the number of hosts. The host that commits makes one more a host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.manifest import (
    MAX_FILES,
    CheckpointKey,
    FileEntry,
    decode_record,
    encode_record,
)
from hf_cloudtrain.checkpoints.paths import PARTS
from hf_cloudtrain.errors import ManifestError, ObjectNotFoundError
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.names import clean_path

MOST_REQUESTS = 16
"""Small records that one host reads or writes for its part, without retries."""
READS_AT_ONCE = 32
"""Parts read at once: 1,000 of them take a second at 30 ms each."""


class HostParts:
    """The parts of one save of a checkpoint.

    Args:
        nonce: of the save, the same on all hosts.
        save: how often the step had been saved then, this save included. What a part names is never written again, so each
            save has its own parts and its own folder.
        hosts: how many give a part.

    Example:
        >>> parts = HostParts(catalog, key, nonce, save=1, hosts=2)
        >>> folder = parts.folder(exclusive=True)
        >>> parts.put(0, files)
        >>> parts.missing()
        [1]
    """

    def __init__(self, catalog: Catalog, key: CheckpointKey, nonce: str, *, save: int, hosts: int) -> None:
        self._catalog = catalog
        self._storage = catalog.storage
        self._key = key
        self._nonce = nonce
        self._save = save
        self._hosts = hosts
        self._records = f"{PARTS}/{key}" if save == 1 else f"{PARTS}/{key}/save-{save}"

    @classmethod
    def of(cls, catalog: Catalog, entry: OutboxEntry) -> HostParts:
        """The parts of the save that an entry belongs to."""
        return cls(catalog, entry.key, entry.nonce, save=entry.save, hosts=entry.hosts)

    def send(
        self, entry: OutboxEntry, send_files: Callable[[str], list[FileEntry]]
    ) -> tuple[str, list[FileEntry] | None]:
        """Send this host's files: the folder, and the files of all hosts, or None if another host commits them."""
        folder = self.folder(exclusive=entry.exclusive)
        if self._hosts == 1:
            return folder, send_files(folder)
        # What a part names may be committed by another host at any moment, and is not written again.
        if not self.has(entry.host):
            self.put(entry.host, send_files(folder))
        commits = not self.missing() and self.elect(entry.host)
        return folder, self.files() if commits else None

    def folder(self, *, exclusive: bool) -> str:
        """Where all hosts send their files: decided once, because a claim may be gone when the next host asks."""
        path = f"{self._records}/folder.json"
        decided = self._read_folder(path) if self._hosts > 1 else None
        if decided is not None:
            return decided
        if self._save == 1:
            folder = self._catalog.claim(self._key, self._nonce, exclusive=exclusive)
        else:
            folder = f"checkpoint-{self._key.step}.a{self._key.attempt}.{self._save}"
        if self._hosts == 1 or self._storage.create(
            path, encode_record({"nonce": self._nonce, "folder": folder})
        ):
            return folder
        return self._read_folder(path) or folder

    def put(self, host: int, files: list[FileEntry]) -> None:
        """Record what a host has sent. After that it sends nothing more."""
        record = {"nonce": self._nonce, "files": [dataclasses.asdict(entry) for entry in files]}
        self._storage.write(self._path(host), encode_record(record))

    def has(self, host: int) -> bool:
        """Whether a host's part of this save is recorded."""
        try:
            self._files(host)
        except (ObjectNotFoundError, ManifestError):
            return False
        return True

    def missing(self) -> list[int]:
        """The hosts whose part is not recorded, by one LIST."""
        there = {info.path for info in self._storage.list(self._records)}
        return [host for host in range(self._hosts) if self._path(host) not in there]

    def elect(self, host: int) -> bool:
        """Whether this host commits: the first that asks, and always the same one."""
        record = {"nonce": self._nonce, "host": host}
        return self._storage.create(f"{self._records}/committer.json", encode_record(record))

    def files(self) -> list[FileEntry]:
        """All hosts' files, sorted by path. Raises ManifestError if a part is damaged, or belongs to a different save."""
        (parts,) = in_threads(self._files, (range(self._hosts), READS_AT_ONCE))
        return sorted((entry for part in parts for entry in part), key=lambda entry: entry.path)

    def _path(self, host: int) -> str:
        return f"{self._records}/{host}-of-{self._hosts}.json"

    def _files(self, host: int) -> list[FileEntry]:
        what = f"part {self._path(host)!r}"
        record = decode_record(self._storage.read(self._path(host)), what)
        if record.get("nonce") != self._nonce:
            raise ManifestError(f"The {what} belongs to a different save.")
        items = record.get("files")
        if not isinstance(items, list) or len(items) > MAX_FILES:
            raise ManifestError(f"The {what} is damaged: 'files' is not a list of files.")
        return [FileEntry.parse(item, what) for item in items]

    def _read_folder(self, path: str) -> str | None:
        what = f"record {path!r}"
        try:
            record = decode_record(self._storage.read(path), what)
        except ObjectNotFoundError:
            return None
        folder = record.get("folder")
        if not isinstance(folder, str) or not self._key.may_be_in(clean_path(folder)):
            raise ManifestError(
                f"The {what} names the folder {str(folder)[:100]!r}, which belongs to another checkpoint."
            )
        return folder
