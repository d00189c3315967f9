"""The datasets of a store: folders of files in versions, with the same manifests, claims and commits as checkpoints.

    create      digests of files that the newest version may have -> claim -> copy on the storage or upload -> commit
    local_copy  verified and read-only, one for all processes of a machine (`cache`)
    delete      the manifest first, then the files

On storage, below `<store>/datasets/`, a version is a named folder like those of `cloud.save`:

    glue/…, glue.2/…                        the files of versions 1 and 2, unchanged
    .cloudtrain/folders/glue-000002.json    the manifest of version 2: the commit

Each version is a complete folder, so that any tool can copy it; docs/decisions/0009 says what that costs.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import LARGE_AT_ONCE, SMALL_AT_ONCE, check_space
from hf_cloudtrain.checkpoints.folder_upload import send_folder
from hf_cloudtrain.checkpoints.frozen import AcceptedFile, OutboxEntry
from hf_cloudtrain.checkpoints.manifest import (
    MAX_FILES,
    CheckpointKey,
    Manifest,
    Position,
    check_paths,
    folder_name,
    parse_folder_key,
)
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.datasets.cache import LocalCopy
from hf_cloudtrain.datasets.upload import Upload, digests, sending, store_token
from hf_cloudtrain.errors import (
    ConfigurationError,
    CorruptCheckpointError,
    ManifestError,
    NoCheckpointError,
    NoDatasetError,
)
from hf_cloudtrain.runtime.files import boot_id, is_left_over, temp_suffix
from hf_cloudtrain.runtime.progress import Progress
from hf_cloudtrain.runtime.provenance import origin
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.runtime.tracebacks import short_traceback
from hf_cloudtrain.storage.backend import PART_SIZE
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.folder_files import LeftOut, fresh_files, tell_left_out
from hf_cloudtrain.storage.names import META, clean_path
from hf_cloudtrain.storage.urls import is_local, local_path, normal_url, shown_url

logger = logging.getLogger(__name__)

_CHANGED = "changed during the upload; nothing was stored. Retry once no process is writing to it."


@dataclass(frozen=True)
class Dataset:
    """One version of a dataset."""

    name: str
    version: int
    manifest: Manifest

    def __str__(self) -> str:
        return f"{self.name!r} (version {self.version})"


class DatasetStore:
    """The datasets of one store.

    Args:
        store: any URL or folder; None takes `HF_CLOUDTRAIN_STORE`, or a folder in the home folder.
        storage_options: for fsspec; None takes `HF_CLOUDTRAIN_STORAGE_OPTIONS`.

    Example:
        >>> store = DatasetStore("s3://bucket/store")
        >>> dataset, sent = store.create("glue", "data/glue")
        >>> print(dataset, store.local_copy(dataset))
        'glue' (version 1) /home/me/.cache/hf_cloudtrain/datasets/4f0c3c3a1b2d/glue-000001-9d2f41aa/glue
    """

    def __init__(self, store: str | None = None, *, storage_options: dict[str, Any] | None = None) -> None:
        self.url = normal_url(env.store(store))
        self._options = env.storage_options(storage_options)
        self.catalog = Catalog(Storage(f"{self.url.removesuffix('/')}/datasets", self._options))
        self._folders = NamedFolders(self.catalog)

    @short_traceback
    def create(
        self, name: str, source: str | Path, *, progress: Progress | None = None
    ) -> tuple[Dataset, int | None]:
        """Store a folder or a file as the newest version of a dataset.

        Files that the newest version has are copied on the storage and not uploaded. Links are followed.

        Args:
            source: a local path, or any URL, whose files are downloaded first.

        Returns:
            The version, and how many bytes were uploaded; None if the newest version has exactly these files.

        Raises:
            ConfigurationError: the name or the source cannot be used. StorageError
            CorruptCheckpointError: a file changed during the upload.
        """
        name = dataset_name(name)
        progress = progress or Progress()
        text = os.fspath(source)
        text = text if os.path.exists(text) else normal_url(text)
        self.catalog.storage.check()
        with _local(text, self._options, progress) as folder:
            self._check_without_store(folder)
            entry = _entry(self.catalog.storage.url, name, folder, text)
            with sending(Path(env.cache(None)), self.catalog, entry) as (upload, entry):
                stored = self._store(entry, upload, progress)
                upload.forget()
                return stored

    def versions(self) -> dict[str, list[int]]:
        """The versions of each dataset, ascending, by its name; from one LIST."""
        found: dict[str, list[int]] = {}
        for name, version in sorted(filter(None, map(parse_folder_key, self._folders.keys()))):
            found.setdefault(name, []).append(version)
        return found

    @short_traceback
    def find(self, name: str, version: int | None = None) -> Dataset:
        """A version of a dataset; None finds the newest. Raises NoDatasetError, ManifestError."""
        known = self.versions()
        if name not in known:
            raise self._missing(name, list(known))
        wanted = known[name][-1] if version is None else version
        if wanted not in known[name]:
            raise NoDatasetError(
                f"Dataset {name!r} in {self.catalog.storage.url!r} has no version {wanted}. Choose one of: "
                f"{', '.join(map(str, known[name]))}."
            )
        try:
            return Dataset(name, wanted, self._folders.read(key_of(name, wanted)))
        except NoCheckpointError:  # deleted since the listing
            raise self._missing(name, []) from None

    @short_traceback
    def delete(self, name: str, version: int) -> None:
        """Delete one version. Raises NoDatasetError, ManifestError, StorageError."""
        try:
            self._folders.retire(key_of(name, version))
        except NoCheckpointError:
            raise self._missing(name, []) from None

    def half_deleted(self, name: str) -> list[int]:
        """Versions whose deletion was interrupted, ascending; `delete` completes it."""
        found = map(parse_folder_key, self._folders.retiring())
        return sorted(item[1] for item in found if item and item[0] == name)

    @short_traceback
    def local_copy(
        self,
        dataset: Dataset,
        *,
        cache: str | Path | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> Path:
        """The folder with a version's files on this machine, verified and read-only.

        One process downloads it; the others wait.

        Args:
            cache: folder of the local copies; None takes `HF_CLOUDTRAIN_CACHE`, or a folder in the home folder.
            on_bytes: called with the number of bytes that arrived.

        Raises:
            CorruptCheckpointError: a file on storage differs from its manifest. StorageError
        """
        copy = f"{dataset.manifest.key}-{dataset.manifest.nonce[:8]}"
        home = Path(env.cache(cache), "datasets", store_token(self.catalog), copy)
        try:
            return LocalCopy(self.catalog, dataset.manifest, dataset.name, home).ensure(on_bytes)
        except PermissionError as error:
            if error.filename is None:
                raise
            raise ConfigurationError(
                f"Cannot write to {error.filename!r} ({error.strerror}). Set {env.CACHE} to a writable folder."
            ) from None

    def _store(self, entry: OutboxEntry, upload: Upload, progress: Progress) -> tuple[Dataset, int | None]:
        assert entry.name is not None
        before = self._newest_whole(entry.name)
        there = _bytes_there(self.catalog, entry, before.manifest) if before else {}
        if before is not None and _is_same(entry, before.manifest, there):
            return before, None
        try:
            manifest = send_folder(self.catalog, entry, progress, {**there, **upload.arrived(entry)})
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{entry.origin['source']!r} {_CHANGED} ({error})") from error
        found = parse_folder_key(manifest.key)
        assert found is not None
        return Dataset(*found, manifest), progress.done

    def _newest_whole(self, name: str) -> Dataset | None:
        """The newest version; None if there is none or its manifest is unreadable."""
        try:
            return self.find(name)
        except NoDatasetError:
            return None
        except ManifestError as error:
            logger.warning("%s Uploading every file.", error)
            return None

    def _check_without_store(self, folder: Path) -> None:
        url = self.catalog.storage.url
        if is_local(url) and Path(local_path(url)).resolve().is_relative_to(folder.resolve()):
            raise ConfigurationError(
                f"{str(folder)!r} contains the store {self.url!r} itself. Choose a folder in it, or set {env.STORE} to a "
                "different location."
            )

    def _missing(self, name: str, known: list[str]) -> NoDatasetError:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return NoDatasetError(
            f"Dataset {name[:100]!r} does not exist in {self.catalog.storage.url!r}.{hint} `cloudtrain data list` lists the "
            "datasets."
        )


@short_traceback
def local_copy(name: str, version: int | None = None, *, store: str | None = None) -> Path:
    """The folder with a dataset's files on this machine, verified, read-only and shared by its processes.

    Args:
        version: None takes the newest.
        store: see `DatasetStore`.

    Example:
        >>> load_dataset(str(local_copy("glue")))
    """
    datasets = DatasetStore(store)
    return datasets.local_copy(datasets.find(name, version))


def dataset_name(name: str) -> str:
    """The name, if it is valid for a dataset; raises ConfigurationError."""
    try:
        return folder_name(name)
    except ConfigurationError:
        raise ConfigurationError(
            f"{name[:100]!r} is not a valid dataset name. Use up to 64 letters, digits, '.', '_' and '-', for example 'glue'; "
            "it must not begin with 'checkpoint-'."
        ) from None


class _Source(OutboxEntry):
    """The source files in their own folder, not in an outbox; `check_unchanged` detects a process that writes to them."""

    def local_path(self, file: AcceptedFile) -> Path:
        return self.home / file.path


def _entry(url: str, name: str, folder: Path, source: str) -> OutboxEntry:
    paths: list[str] = []
    left_out: LeftOut = {}
    for path in fresh_files(folder, 0, left_out) if folder.is_dir() else (folder.name,):
        paths.append(path)
        if len(paths) > MAX_FILES:
            raise ConfigurationError(
                f"{str(folder)!r} contains more than {MAX_FILES} files, the limit for a dataset. Pack them, for example as "
                "parquet."
            )
    if not paths:
        raise ConfigurationError(f"{str(folder)!r} contains no files. Choose the folder or file to store.")
    check_paths([clean_path(path) for path in (*paths, *left_out)], f"folder {str(folder)!r}")
    tell_left_out(folder, left_out)
    home = folder if folder.is_dir() else folder.parent
    return _Source(
        run_url=url,
        key=CheckpointKey(0, 0),
        nonce="",  # `upload.sending` sets it
        position=Position(global_step=0),
        created=time.time(),
        name=name,
        origin={**origin(), "source": shown_url(source)},
        boot=boot_id(),
        files=tuple(AcceptedFile.of(home, path) for path in sorted(paths)),
        home=home,
    )


def _bytes_there(catalog: Catalog, entry: OutboxEntry, before: Manifest) -> dict[str, tuple[str, str]]:
    """The files of the entry that a version has, under any name: (object, digest) by path.

    Only files with the size of an object are read.
    """
    # The objects that exist, not those in the manifest: creating a dataset again repairs a damaged version.
    sizes_there = {info.path: info.size for info in catalog.storage.list(before.folder)}
    whole = [file for file in before.files if sizes_there.get(before.object_path(file)) == file.size]
    by_digest = {(file.size, file.digest): before.object_path(file) for file in whole}
    sizes = {file.size for file in whole}
    candidates = [file for file in entry.files if file.size in sizes]
    return {
        file.path: (by_digest[file.size, digest], digest)
        for file, digest in zip(candidates, digests(entry, candidates), strict=True)
        if (file.size, digest) in by_digest
    }


def _is_same(entry: OutboxEntry, before: Manifest, there: dict[str, tuple[str, str]]) -> bool:
    here = {(file.path, there[file.path][1]) for file in entry.files if file.path in there}
    return len(here) == len(entry.files) and here == {(file.path, file.digest) for file in before.files}


@contextlib.contextmanager
def _local(source: str, options: dict[str, Any], progress: Progress) -> Iterator[Path]:
    """The local folder or file that a path names, or a temporary folder with the files that a URL names."""
    if is_local(source):
        path = Path(local_path(source))
        if not path.is_dir() and not path.is_file():
            raise ConfigurationError(f"{source!r} is neither a folder nor a file of this machine, nor a URL.")
        yield path
        return
    fetched = Path(env.cache(None), "fetched")
    fetched.mkdir(parents=True, exist_ok=True)
    for left in fetched.iterdir():
        if is_left_over(left.name):
            shutil.rmtree(left, ignore_errors=True)
    work = fetched / f"fetch-{temp_suffix()}"
    work.mkdir()
    try:
        _fetch(source, options, work, progress)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch(source: str, options: dict[str, Any], work: Path, progress: Progress) -> None:
    """Download what a URL names: everything below it, or a single object."""
    storage, prefix = Storage(source, options), ""
    sizes = _sizes(storage, prefix)
    above, _, name = source.rpartition("/")
    if not sizes and name and not above.endswith("/"):
        storage, prefix = Storage(above, options), name
        sizes = {path: size for path, size in _sizes(storage, prefix).items() if path == name}
    shown = shown_url(source)
    if not sizes:
        raise ConfigurationError(f"No files found at {shown!r}. Check the URL.")
    check_paths([clean_path(path) for path in sizes], f"listing of {shown!r}")
    total = sum(sizes.values())
    check_space(work, total, work)
    progress.begin(f"Fetching {shown}", total)

    def fetch(path: str) -> None:
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        storage.download(path, str(work / path), sizes[path], on_bytes=progress.add)

    large = [path for path, size in sizes.items() if size > PART_SIZE]
    small = [path for path, size in sizes.items() if size <= PART_SIZE]
    in_threads(fetch, (large, LARGE_AT_ONCE), (small, SMALL_AT_ONCE))
    if _sizes(storage, prefix) != sizes:  # an object that grew was cut off at its old size
        raise CorruptCheckpointError(f"{shown!r} {_CHANGED}")


def _sizes(storage: Storage, prefix: str) -> dict[str, int]:
    return {info.path: info.size for info in storage.list(prefix) if not info.path.startswith(f"{META}/")}


def key_of(name: str, version: int) -> str:
    """The key of a version's manifest."""
    return f"{name}-{version:06d}"
