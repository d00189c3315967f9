"""From a run URL to a verified local folder, the same checkpoint on all ranks.

one LIST          rank 0 chooses the newest by (attempt, step), not by step alone (law 9)
manifest          the caller looks at it, and may refuse it before anything is downloaded
local copy        used if it is whole
download          once a disk; each file is verified against its digest, and again if it differs
damaged           all ranks together take the checkpoint before
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.frozen import ALL_FILES, Wanted
from hf_cloudtrain.checkpoints.local_folders import LocalFolders
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.errors import CorruptCheckpointError, ManifestError, NewerFormatError, NoCheckpointError
from hf_cloudtrain.runtime.progress import Bar, Progress
from hf_cloudtrain.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

Accept = Callable[[Manifest], None]
"""Looks at a manifest before anything is downloaded, and raises if it does not fit."""
ANY_MANIFEST: Accept = lambda manifest: None  # noqa: E731


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was restored to this machine."""

    path: Path
    manifest: Manifest


class Restorer:
    """Restores checkpoints of one run. All ranks call its methods.

    Example:
        >>> restored = Restorer(catalog, LocalFolders(Path("out")), Ranks.current()).newest()
        >>> restored.path
        PosixPath('out/checkpoint-500')
    """

    def __init__(self, catalog: Catalog, local: LocalFolders, ranks: Ranks) -> None:
        self._catalog = catalog
        self._local = local
        self._ranks = ranks

    def newest(self, *, wanted: Wanted = ALL_FILES, accept: Accept = ANY_MANIFEST) -> Restored | None:
        """The newest whole checkpoint; None if the run has none.

        Args:
            wanted: which files this process's disk needs, by path (it does not need other ranks' rng files).
            accept: looks at the manifest before anything is downloaded, and raises if it does not fit.

        Raises:
            CorruptCheckpointError: there are checkpoints, and all of them are damaged.
            StorageError: the storage does not answer.
        """
        tried: set[CheckpointKey] = set()
        while True:
            # Listed again after a damaged one: it may be gone because a newer one was committed since.
            keys = self._ranks.agree(self._catalog.known_checkpoints, "list the checkpoints")
            key = max((key for key in keys if key not in tried), default=None)
            if key is None:
                break
            tried.add(key)
            restored, problem = self._restore(key, wanted, accept)
            if restored is not None:
                self._report(restored.manifest)
                return restored
            if self._ranks.is_main:
                logger.warning("%s is damaged; trying the one before. %s", key.title, problem)
        if tried:
            raise CorruptCheckpointError(
                f"All {len(tried)} checkpoints of {self._catalog.storage.url!r} are damaged. `cloudtrain checkpoint "
                "verify` shows how; fresh=True starts at step 0."
            )
        return None

    def saved_at(self, step: int) -> Manifest | None:
        """The newest committed checkpoint of that step, on all ranks; None if there is none, or a damaged one."""

        def find() -> Manifest | None:
            keys = [key for key in self._catalog.checkpoints() if key.step == step]
            manifest = _read_or_reason(self._catalog, keys[-1]) if keys else None
            return manifest if isinstance(manifest, Manifest) else None

        return self._ranks.agree(find, f"find the checkpoint of step {step}")

    def fetcher(self, manifest: Manifest, wanted: Wanted = ALL_FILES) -> Callable[[], str | None]:
        """Work for one rank of a disk: fetch a checkpoint, unless it is here. Returns what is damaged, if anything."""

        def fetch() -> str | None:
            if self._local.has(manifest, wanted):
                return None
            progress = Progress()
            try:
                with Bar(progress, hidden=not self._ranks.is_main):
                    progress.begin(f"Downloading {manifest.folder}", manifest.size)
                    self._local.fetch(self._catalog, manifest, wanted, progress.add)
            except CorruptCheckpointError as error:
                return str(error)
            return None

        return fetch

    def _restore(self, key: CheckpointKey, wanted: Wanted, accept: Accept) -> tuple[Restored | None, str]:
        """The restored checkpoint, or what is damaged."""
        before: Manifest | None = None
        problem = ""
        while True:
            manifest = self._ranks.agree(
                partial(_read_or_reason, self._catalog, key), f"read the manifest of {key}"
            )
            if isinstance(manifest, str) or manifest == before:
                return None, problem or str(manifest)
            accept(manifest)
            fetch = self.fetcher(manifest, wanted)
            problems = [found for found in self._ranks.each_leader(fetch, f"download {key}") if found]
            if not problems:
                return Restored(self._local.folder(manifest), manifest), ""
            # A digest in the manifest itself may have changed on its way here: read it once more.
            before, problem = manifest, problems[0]

    def _report(self, manifest: Manifest) -> None:
        if not self._ranks.is_main:
            return
        url = self._catalog.storage.url
        # The first line of the training says it to users.
        logger.debug("Resuming from %s (attempt %d) of %r.", manifest.folder, manifest.attempt, url)
        if not manifest.exact:
            logger.log(manifest.exactness.level, "%s: %s", manifest.folder, manifest.exactness.sentence)


def _read_or_reason(catalog: Catalog, key: CheckpointKey) -> Manifest | str:
    """A manifest, or why there is none. Raises NewerFormatError, StorageError."""
    reason = ""
    for _ in range(2):  # going back to an older checkpoint costs hours; one wrong answer is not enough for it
        try:
            return catalog.read(key)
        except NoCheckpointError as error:
            reason = str(error)  # retired since the listing
        except NewerFormatError:
            raise  # the checkpoint before would silently lose work
        except ManifestError as error:
            reason = str(error)
    return reason
