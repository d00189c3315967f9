"""What people call a checkpoint: its folder, such as `checkpoint-500` or `checkpoint-500.a3`.

A key alone does not tell the folder: its manifest does, which never changes, so each is read once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.errors import ManifestError, NoCheckpointError, StorageError
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.client import READS_AT_ONCE


class Titles:
    """The folders of the checkpoints of one run.

    Example:
        >>> titles = Titles(catalog)
        >>> titles.of("000003-0000000500")
        'checkpoint-500.a3'
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._known: dict[CheckpointKey, str] = {}

    def read(self, keys: Iterable[CheckpointKey | None]) -> None:
        """Read several at the same time."""
        missing = [key for key in dict.fromkeys(keys) if key is not None and key not in self._known]
        (found,) = in_threads(self._folder, (missing, READS_AT_ONCE))
        self._known |= {key: folder for key, folder in zip(missing, found, strict=True) if folder}

    def of(self, key: CheckpointKey | str) -> str:
        """The folder of a checkpoint; if its manifest cannot be read, step and attempt in the same form."""
        found = key if isinstance(key, CheckpointKey) else CheckpointKey.named(key)
        if found is None:
            return str(key)
        self.read([found])
        return self._known.get(found) or title_without_manifest(found)

    def in_text(self, text: str) -> str:
        """The text with folders in place of keys."""
        return re.sub(r"\b[0-9]{6,12}-[0-9]{10,15}\b", lambda match: self.of(match[0]), text)

    def _folder(self, key: CheckpointKey) -> str | None:
        try:
            return self._catalog.read(key).folder
        except (NoCheckpointError, ManifestError, StorageError):
            return None  # not committed yet, or deleted


def title_without_manifest(key: CheckpointKey) -> str:
    """Step and attempt in the form of a folder; the commands accept it for any checkpoint."""
    return f"checkpoint-{key.step}.a{key.attempt}"
