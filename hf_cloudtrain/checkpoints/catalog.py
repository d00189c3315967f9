"""Which checkpoints exist in a run: the only module that decides it.

A checkpoint exists if and only if its manifest does. An attempt claims a folder before it writes the first byte there,
so no object of a committed checkpoint is ever overwritten; the manifest is created exclusively, last, and never changed.
The newest checkpoint is the highest by (attempt, step), so one LIST of names finds it. `paths.py` shows the records.
"""

from __future__ import annotations

import logging

from hf_cloudtrain.checkpoints.attempts import Attempts
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest, decode_record, encode_record
from hf_cloudtrain.checkpoints.paths import CHECKPOINTS, CLAIMS
from hf_cloudtrain.errors import (
    ManifestError,
    NoCheckpointError,
    ObjectNotFoundError,
    StorageUnavailableError,
)
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.names import META

logger = logging.getLogger(__name__)


class Catalog:
    """The checkpoints of one run, and its `attempts`.

    Example:
        >>> catalog = Catalog(Storage("s3://bucket/runs/mrpc"))
        >>> catalog.newest()
        CheckpointKey(attempt=3, step=500)
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.attempts = Attempts(storage)

    def checkpoints(self) -> list[CheckpointKey]:
        """All committed checkpoints, oldest first, by one LIST."""
        return self.keys_in(CHECKPOINTS)

    def known_checkpoints(self) -> list[CheckpointKey]:
        """As `checkpoints`, plus a newer one that a delayed listing lacks and the pointer `last` names.

        For decisions that would lose work. It costs one more small request.
        """
        keys = self.checkpoints()
        last = self.pointer("last")
        if last is not None and last > max(keys, default=CheckpointKey(0, 0)) and self.holds(last):
            logger.warning("The listing of %r lacks %s, which exists.", self.storage.url, last)
            keys.append(last)
        return keys

    def newest(self) -> CheckpointKey | None:
        """The newest committed checkpoint: the highest attempt that has one, and its highest step."""
        return max(self.checkpoints(), default=None)

    def read(self, key: CheckpointKey) -> Manifest:
        """The manifest of a checkpoint. Raises NoCheckpointError, ManifestError."""
        try:
            data = self.storage.read(_path(key))
        except ObjectNotFoundError:
            raise NoCheckpointError(
                f"There is no checkpoint {str(key)!r} in {self.storage.url!r}. `cloudtrain checkpoint list "
                f"{self.storage.url}` shows those that exist."
            ) from None
        return parse_manifest(key, data)

    def holds(self, key: CheckpointKey) -> bool:
        """Whether a checkpoint is committed; one small request, however many there are."""
        return self.exists(_path(key))

    def claim(self, key: CheckpointKey, nonce: str, *, exclusive: bool) -> str:
        """The folder that an attempt may write for a step, claimed before its first byte.

        Args:
            exclusive: whether the storage honours exclusive create; if not, only attempt 1 gets the plain name.
        """
        plain = f"checkpoint-{key.step}"
        suffixed = f"{plain}.a{key.attempt}"
        if not exclusive and key.attempt > 1:
            return suffixed
        record = encode_record({"attempt": key.attempt, "nonce": nonce})
        path = f"{CLAIMS}/{plain}.json"
        if self.storage.create(path, record):
            return plain
        try:
            owner = decode_record(self.storage.read(path), f"claim {path!r}")
        except (ManifestError, ObjectNotFoundError):
            owner = {}  # damaged, so it is not ours
        # The same attempt again: an interrupted upload continues in its own folder. The nonce tells two attempts apart
        # that have one number.
        same = owner.get("attempt") == key.attempt and _of_attempt(owner.get("nonce")) == _of_attempt(nonce)
        return plain if same else suffixed

    def commit(self, manifest: Manifest) -> bool:
        """Make a checkpoint exist. False if another save of the same (attempt, step) was committed before."""
        return self.commit_to(f"{CHECKPOINTS}/{manifest.key}.json", manifest)

    def commit_to(self, path: str, manifest: Manifest) -> bool:
        """Create a manifest, and check that the storage holds it. False if another save's manifest is there."""
        data = manifest.encode()
        Manifest.parse(data, manifest.key)  # what we cannot read back must not be committed
        try:
            created = self.storage.create(path, data)
        except StorageUnavailableError:
            # The object may be stored and the answer lost: check before reporting a failure.
            created = self._holds_nonce(path, manifest.nonce)
            if not created:
                raise
        if created:
            self._check_written(path, data)
        return created or self._holds_nonce(path, manifest.nonce)

    def point(self, name: str, key: CheckpointKey, metric: float | None = None) -> None:
        """Move the pointer `best` or `last`. For people and tools: of the two, decisions use only `best`."""
        self.storage.write(
            f"{META}/{name}.json", encode_record({"attempt": key.attempt, "step": key.step, "metric": metric})
        )

    def pointer(self, name: str) -> CheckpointKey | None:
        """Where the pointer `best` or `last` points; None if there is none, or a damaged one."""
        what = f"pointer {name!r}"
        try:
            return CheckpointKey.parse(decode_record(self.storage.read(f"{META}/{name}.json"), what), what)
        except ObjectNotFoundError:
            return None
        except ManifestError as error:
            logger.warning("%s Ignoring it.", error)
            return None

    # For the modules that build on this one

    def keys_in(self, folder: str) -> list[CheckpointKey]:
        """The checkpoints that have a record in a folder of records, oldest first, by one LIST."""
        return sorted(filter(None, map(CheckpointKey.named, self.names_in(folder))))

    def names_in(self, folder: str) -> list[str]:
        """Names of the records in a folder of records, by one LIST."""
        return [
            info.path[len(folder) + 1 : -len(".json")]
            for info in self.storage.list(folder)
            if info.path.endswith(".json") and "/" not in info.path[len(folder) + 1 :]
        ]

    def exists(self, path: str) -> bool:
        """Whether a record exists; one small request."""
        return self._read_or_none(path) is not None

    def _check_written(self, path: str, data: bytes) -> None:
        """Read back what was just created: no checkpoint could be restored by a record that changed on its way."""
        found = self._read_or_none(path)
        if found == data or (again := self._read_or_none(path)) == data:
            return
        if found is not None and again is not None:
            # It is ours and useless; left there, it would block the good one for ever.
            self.storage.delete([path])
        raise StorageUnavailableError(
            f"The storage {self.storage.url!r} does not hold what was written to {path!r}. Sending it again."
        )

    def _read_or_none(self, path: str) -> bytes | None:
        try:
            return self.storage.read(path)
        except ObjectNotFoundError:
            return None

    def _holds_nonce(self, path: str, nonce: str) -> bool:
        try:
            return decode_record(self.storage.read(path), f"record {path!r}").get("nonce") == nonce
        except (ObjectNotFoundError, ManifestError):
            return False


def parse_manifest(key: CheckpointKey, data: bytes) -> Manifest:
    """The manifest of a checkpoint from its bytes. Raises ManifestError, also if it is another checkpoint's."""
    manifest = Manifest.parse(data, str(key))
    if (manifest.attempt, manifest.step) != (key.attempt, key.step):
        raise ManifestError(
            f"The manifest {str(key)!r} is of attempt {manifest.attempt}, step {manifest.step}."
        )
    if not key.may_be_in(manifest.folder):
        raise ManifestError(
            f"The manifest {str(key)!r} names the folder {manifest.folder!r}, which belongs to another checkpoint."
        )
    return manifest


def _path(key: CheckpointKey) -> str:
    return f"{CHECKPOINTS}/{key}.json"


def _of_attempt(nonce: object) -> str:
    """The part that the nonces of all saves of one attempt share."""
    return str(nonce).partition("-")[0]
