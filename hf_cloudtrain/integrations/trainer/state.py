"""trainer_state.json of a restored checkpoint, adapted to this machine: its paths, its best checkpoint, its step numbers.

The file as it was saved is kept under `_cloudtrain/originals`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.local_folders import parse_renumbered
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.checkpoints.restore import Restored
from hf_cloudtrain.errors import StorageError
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle
from hf_cloudtrain.resume.topology import Conversion
from hf_cloudtrain.runtime.files import write_whole

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
Record = dict[str, Any]


class RestoredState:
    """The trainer_state.json of a restored checkpoint. All ranks call `localize`.

    Args:
        conversion: to new steps, where those differ.
    """

    def __init__(
        self, lifecycle: AttemptLifecycle, restored: Restored, conversion: Conversion | None
    ) -> None:
        self._lifecycle = lifecycle
        self._checkpointer = lifecycle.checkpointer
        self._restored = restored
        self._conversion = conversion
        self._path = restored.path / TRAINER_STATE
        self._original = self._checkpointer.local.originals(restored.manifest) / TRAINER_STATE

    def localize(
        self, *, load_best: bool, adjust: Callable[[Record], Record] = lambda record: record
    ) -> None:
        """Adapt the file to this machine, and download the best checkpoint: without its folder, Trainer forgets which one it is.

        Args:
            load_best: whether Trainer loads it at the end; if not, training can do without it.
            adjust: changes the record in everything but the best checkpoint.
        """
        ranks = self._checkpointer.ranks
        best = ranks.agree(self._find_best, "find the best checkpoint")
        if best is not None:
            manifest, number = best
            self._lifecycle.number(manifest, self._conversion, number)
            self._download(manifest, load_best=load_best)
        folder = None if best is None else self._checkpointer.local.folder(best[0]).name
        ranks.each_leader(lambda: self._rewrite(folder, adjust), f"adjust {TRAINER_STATE}")

    def _download(self, best: Manifest, *, load_best: bool) -> None:
        ranks, fetch = self._checkpointer.ranks, self._checkpointer.restorer.fetcher(best)

        def fetch_if_possible() -> str | None:
            try:
                return fetch()
            except StorageError as error:  # the disk has no room for it, say
                if load_best:
                    raise
                return str(error)

        outcomes = ranks.each_leader(fetch_if_possible, "download the best checkpoint")
        problem = next((problem for problem in outcomes if problem), None)
        if problem is not None and ranks.is_main:
            logger.warning(
                "The best checkpoint %s cannot be restored, so Trainer forgets that it is the best. %s",
                best.key,
                problem,
            )

    def _find_best(self) -> tuple[Manifest, int | None] | None:
        """The best checkpoint that the state names, in the history that led to it, and its number in the steps of the state."""
        record, catalog = self._as_saved(), self._checkpointer.catalog
        newest = CheckpointKey(self._restored.manifest.attempt, self._restored.manifest.step)
        name = _last_part(record.get("best_model_checkpoint"))
        renumbered, plain = parse_renumbered(name), re.fullmatch(r"checkpoint-(\d{1,15})", name)
        # Trainer notes the step of the best metric, too, which may never have been saved.
        step = int(plain[1]) if plain else None
        if renumbered is not None:  # it was the best already when steps had a different size
            step = renumbered[1].step
            keys = [key for key in catalog.checkpoints() if key == renumbered[1]]
        elif step:
            keys = [key for key in catalog.checkpoints() if key.step == step and key <= newest]
        else:
            return None
        if not keys:
            logger.warning(
                "The best checkpoint (step %s) is not on storage, so Trainer forgets that it is the best.",
                step,
            )
            return None
        return catalog.read(keys[-1]), renumbered[0] if renumbered else None

    def _rewrite(self, best_folder: str | None, adjust: Callable[[Record], Record]) -> None:
        """Args: best_folder: name of the local folder of the best checkpoint, if that was found on storage."""
        record = self._as_saved()
        if not record:
            return
        changed = adjust(record)
        name = best_folder or _last_part(record.get("best_model_checkpoint"))
        if name:
            best = self._checkpointer.output_dir / name
            if best.is_dir() and best != self._restored.path:
                # Trainer deletes the oldest by modification time first; the best must not look newer than this one.
                moment = time.time() - 60
                os.utime(best, (moment, moment))
            changed = {**changed, "best_model_checkpoint": str(best)}
        if self._conversion is not None and self._conversion.is_renumbered:
            # It is an old step number: Trainer would take the checkpoint with that new number for the best.
            changed = {**changed, "best_global_step": None}
        if changed != _read(self._path):
            if not self._original.exists():
                self._original.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._original, self._path.read_bytes())
            write_whole(self._path, (json.dumps(changed, indent=2, sort_keys=True) + "\n").encode())

    def _as_saved(self) -> Record:
        """The record of the checkpoint: the local file may have been changed already, even for a different topology."""
        return _read(self._original if self._original.is_file() else self._path)


def _last_part(path: Any) -> str:
    return re.split(r"[/\\]", str(path or ""))[-1]


def _read(path: Path) -> Record:
    record = json.loads(path.read_text()) if path.is_file() else {}
    return record if isinstance(record, dict) else {}
