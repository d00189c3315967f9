"""An upload of a dataset: this machine records it until it is committed, so that an interrupted upload continues.

    <cache>/sending/<store>-<name>.json     nonce of the upload, and a digest of the sizes, inodes and times of its files
    <cache>/sending/<store>-<name>.lock     held by the process that uploads; released when that process ends

The same nonce claims the same folder again. Objects that arrived there are not uploaded again unless a file has changed;
then they are deleted, and a new folder is claimed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.frozen import AcceptedFile, OutboxEntry
from hf_cloudtrain.checkpoints.manifest import decode_record, encode_record
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.datasets.cache import exclusive
from hf_cloudtrain.errors import ManifestError
from hf_cloudtrain.runtime.files import write_whole
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.digest import file_digest

HASHES_AT_ONCE = 4
"""Files hashed at once: xxh3 is faster than most disks."""


@dataclass(frozen=True)
class Upload:
    """One upload of a dataset from this machine.

    Example:
        >>> with sending(cache, catalog, entry) as (upload, entry):
        ...     there = upload.arrived(entry)
        ...     manifest = send_folder(catalog, entry, progress, there)
        ...     upload.forget()
    """

    catalog: Catalog
    record: Path
    """The file that records it."""
    resumed: bool
    """Whether it continues an interrupted one."""

    def arrived(self, entry: OutboxEntry) -> dict[str, tuple[str, str]]:
        """The files that are already in the upload's own folder: (object, digest) by path."""
        if not self.resumed or entry.name is None:
            return {}
        _, folder = NamedFolders(self.catalog).begin(entry.name, entry.nonce)
        sizes = {info.path: info.size for info in self.catalog.storage.list(folder)}
        # An object appears whole or not at all.
        found = [file for file in entry.files if sizes.get(f"{folder}/{file.path}") == file.size]
        return {
            file.path: (f"{folder}/{file.path}", digest)
            for file, digest in zip(found, digests(entry, found), strict=True)
        }

    def forget(self) -> None:
        """Delete the record: the upload is committed, or was not needed."""
        self.record.unlink(missing_ok=True)


@contextlib.contextmanager
def sending(cache: Path, catalog: Catalog, entry: OutboxEntry) -> Iterator[tuple[Upload, OutboxEntry]]:
    """Upload an entry, as the only process of this machine that uploads this dataset.

    Yields the upload, and the entry with its nonce.
    """
    record = cache / "sending" / f"{store_token(catalog)}-{entry.name}.json"
    looks = _looks(entry)
    with exclusive(record.with_suffix(".lock"), f"is uploading the dataset {entry.name!r}"):
        nonce, known = _read(record)
        resumed = known == looks
        if not resumed:
            if nonce and entry.name:
                _delete_arrived(catalog, entry.name, nonce)
            nonce = secrets.token_hex(16)
            write_whole(record, encode_record({"nonce": nonce, "looks": looks}))
        yield Upload(catalog, record, resumed), dataclasses.replace(entry, nonce=nonce)


def digests(entry: OutboxEntry, files: list[AcceptedFile]) -> list[str]:
    """The digests of files of an entry."""
    (found,) = in_threads(lambda file: file_digest(entry.local_path(file)), (files, HASHES_AT_ONCE))
    return found


def store_token(catalog: Catalog) -> str:
    """A short name for the store, in paths of this machine."""
    return hashlib.sha256(catalog.storage.url.encode()).hexdigest()[:12]


def _delete_arrived(catalog: Catalog, name: str, nonce: str) -> None:
    key, folder = NamedFolders(catalog).begin(name, nonce)  # the one that it has claimed
    if not NamedFolders(catalog).holds(key):
        catalog.storage.delete([info.path for info in catalog.storage.list(folder)])


def _looks(entry: OutboxEntry) -> str:
    files = [dataclasses.asdict(file) for file in entry.files]
    return hashlib.sha256(encode_record({"home": str(entry.home), "files": files})).hexdigest()


def _read(record: Path) -> tuple[str, str]:
    try:
        found = decode_record(record.read_bytes(), "record of an upload")
    except (OSError, ManifestError):
        return "", ""
    return str(found.get("nonce", "")), str(found.get("looks", ""))
