"""Folders of a run that are saved by name, such as `final`: the same manifests and the same order as of checkpoints.

Each save of a name is a new version: `final`, `final.2`, `final.3`. Datasets are stored in this way, too.
"""

from __future__ import annotations

from collections.abc import Callable

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import delete_files
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.manifest import FileEntry, Manifest, encode_record, parse_folder_key
from hf_cloudtrain.checkpoints.ownership import Ownership
from hf_cloudtrain.checkpoints.paths import CLAIMS, FOLDERS, RETIRING
from hf_cloudtrain.errors import ManifestError, NoCheckpointError, ObjectNotFoundError


class NamedFolders:
    """The named folders of one run. A key is name and version, such as `final-000001`.

    Example:
        >>> named = NamedFolders(catalog)
        >>> named.keys()
        ['final-000001', 'final-000002']
        >>> named.read("final-000002").folder
        'final.2'
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._storage = catalog.storage

    def begin(self, name: str, nonce: str, attempt: int = 0) -> tuple[str, str]:
        """(key, folder) for a new version of a named folder, claimed before its first byte.

        Args:
            attempt: the attempt that saves it; 0 for a process that has begun none.
        """
        version = 1
        record = encode_record({"attempt": attempt, "nonce": nonce})
        while True:
            folder = _folder(name, version)
            if self._storage.create(f"{CLAIMS}/{folder}.json", record):
                return f"{name}-{version:06d}", folder
            version += 1

    def commit(self, manifest: Manifest) -> bool:
        """Make a named folder exist. False if another save's manifest has its key."""
        return self._catalog.commit_to(_path(manifest.key), manifest)

    def upload(
        self, entry: OutboxEntry, send_files: Callable[[str], list[FileEntry]], ownership: Ownership | None
    ) -> Manifest | None:
        """Upload and commit an entry that has a name; None if another save's manifest has its key.

        Args:
            send_files: sends the files to a folder; see `EntrySender`, as `ownership`.
        """
        assert entry.name is not None
        key, folder = self.begin(entry.name, entry.nonce, entry.key.attempt)
        if self.holds(key):
            return self.read(key)
        manifest = entry.manifest(key, folder, send_files(folder))
        if ownership is not None:
            ownership.check()
        return manifest if self.commit(manifest) else None

    def keys(self) -> list[str]:
        """Keys of all named folders, sorted."""
        return [key for key in self._catalog.names_in(FOLDERS) if parse_folder_key(key)]

    def folders(self) -> set[str]:
        """Where the committed named folders have their files."""
        return {_folder_of(key) for key in self.keys()}

    def read(self, key: str) -> Manifest:
        """The manifest of a named folder. Raises NoCheckpointError, ManifestError."""
        try:
            return _parse(key, self._storage.read(_path(key)))
        except ObjectNotFoundError:
            raise NoCheckpointError(f"There is no folder {key!r} in {self._storage.url!r}.") from None

    def holds(self, key: str) -> bool:
        """Whether a named folder is committed."""
        return self._catalog.exists(_path(key))

    def retire(self, key: str) -> None:
        """Delete a named folder in the order of `deletion.py`; calling it again completes an interrupted deletion.

        Its claim stays, so that no other folder ever gets its version.

        Raises:
            NoCheckpointError, ManifestError, StorageError
        """
        record = f"{RETIRING}/{key}.json"
        try:
            manifest = self.read(key)
        except NoCheckpointError:
            if key not in self.retiring():
                raise
            manifest = _parse(key, self._storage.read(record))
        else:
            self._storage.write(record, manifest.encode())
            self._storage.delete([_path(key)])
        delete_files(self._catalog, key, manifest)

    def retiring(self) -> list[str]:
        """Keys of named folders whose deletion has begun and is not complete, sorted."""
        return [key for key in self._catalog.names_in(RETIRING) if parse_folder_key(key)]

    def half_deleted(self) -> dict[str, str]:
        """Where named folders whose deletion has begun have the rest of their files: keys by folder."""
        return {_folder_of(key): key for key in self.retiring()}


def _parse(key: str, data: bytes) -> Manifest:
    manifest = Manifest.parse(data, key)
    if manifest.folder != _folder_of(key):
        raise ManifestError(
            f"The manifest {key!r} names the folder {manifest.folder!r}, which belongs to another key."
        )
    return manifest


def _path(key: str) -> str:
    return f"{FOLDERS}/{key}.json"


def _folder(name: str, version: int) -> str:
    return name if version == 1 else f"{name}.{version}"


def _folder_of(key: str) -> str:
    return _folder(*(parse_folder_key(key) or (key, 0)))
