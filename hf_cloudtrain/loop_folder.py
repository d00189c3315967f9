"""How a loop's state gets into a checkpoint folder, out of it again, and into `best/` and `last/`.

save    every rank writes into `.cloudtrain/saving-…`; when all have, it is renamed to `checkpoint-<step>`, the
        Checkpointer takes it over, and the one before goes
load    what the Checkpointer restored and verified is set on the live objects, on every rank
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpointer import Checkpointer, Restored
from hf_cloudtrain.data_position import DataPosition
from hf_cloudtrain.downloader import download
from hf_cloudtrain.errors import ManifestError
from hf_cloudtrain.loop_state import (
    TRAINING_STATE,
    LoopState,
    is_for_people,
    publish,
    put_right,
    read_state,
    wanted_by,
    write_state,
)
from hf_cloudtrain.manifest import META, Manifest, Position
from hf_cloudtrain.process import half_made_by
from hf_cloudtrain.random_state import RandomState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Here:
    """Where this process stands in the data and in its random numbers."""

    place: dict[str, Any] | None
    """Position in the epoch's data; None between two epochs."""
    now: RandomState
    inexact_reason: str | None = None

    @classmethod
    def of(cls, place: DataPosition, *, between_epochs: bool) -> Here:
        """The present; an epoch that is over needs no place in its data."""
        if between_epochs:
            return cls(None, place.random_state())
        return cls(place.state_dict(), place.random_state(), place.inexact_reason)


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint says of this process."""

    state: LoopState
    here: Here
    manifest: Manifest


class LoopFolder:
    """The local folder of a loop: the newest checkpoint, `best/` and `last/`.

    Args:
        processing_class: saved beside the model.
    """

    def __init__(self, accelerator: Any, checkpointer: Checkpointer, processing_class: Any) -> None:
        self._accelerator = accelerator
        self._checkpointer = checkpointer
        self._world = checkpointer.world
        self._output_dir = checkpointer.output_dir
        self._processing_class = processing_class
        self._newest: Path | None = None

    def load(self, accept: Callable[[Manifest], None]) -> Resumed | None:
        """Bring the newest checkpoint here and set it on the live objects; None where the run has none."""
        self._world.each_leader(lambda: put_right(self._output_dir), f"tidy {str(self._output_dir)!r}")
        restored = self._checkpointer.restore(wanted=wanted_by(self._world.neighbours), accept=accept)
        if restored is None:
            return None
        return self._world.here(lambda: self._set(restored), f"load {restored.path.name}")

    def save(
        self,
        state: LoopState,
        here: Here,
        position: Position,
        *,
        metrics: dict[str, float],
        best: bool,
    ) -> None:
        """Save everything as `checkpoint-<step>`. `here` is where a resume goes on."""
        attempt = self._checkpointer.attempt
        assert attempt is not None, "begin() first"
        folder = self._output_dir / f"checkpoint-{state.step}"
        beside = self._output_dir / META / f"saving-{attempt.number}-{state.step}"
        self._world.here(lambda: self._write(beside, state, here), f"write {folder.name}")
        self._world.each_leader(lambda: self._move_in(beside, folder), f"put {folder.name} into its place")
        self._checkpointer.save(
            folder,
            position,
            inexact_reason=here.inexact_reason,
            metrics={**metrics, **({"best_metric": state.best_metric or 0.0} if best else {})},
            best=best,
        )
        if self._world.is_main:
            publish(folder, self._output_dir / "last")
            if best:
                publish(folder, self._output_dir / "best")

    def complete(self, state: LoopState) -> None:
        """What was reached on another machine is brought here: `last/`, `best/`, and `log.json`. On one rank."""
        if self._newest is not None and _step_in(self._output_dir / "last") != state.step:
            publish(self._newest, self._output_dir / "last")
        if not (self._output_dir / "log.json").exists() and state.log:
            state.write_log(self._output_dir)
        self._bring_best(state.best_step)

    def _bring_best(self, best_step: int | None) -> None:
        here = self._output_dir / "best"
        if best_step is None or _step_in(here) == best_step:
            return
        catalog = self._checkpointer.catalog
        keys = [key for key in catalog.checkpoints() if key.step == best_step]
        if not keys:
            logger.warning(
                "The best checkpoint (step %d) is not on storage, so there is no %r.", best_step, here.name
            )
            return
        work = self._output_dir / META / f"best-{half_made_by()}"
        download(catalog, catalog.read(keys[-1]), work / "files", wanted=is_for_people)
        publish(work / "files", here)
        shutil.rmtree(work, ignore_errors=True)

    def _set(self, restored: Restored) -> Resumed:
        import torch

        state = LoopState.read(restored.path)
        if state.step != restored.manifest.step:
            raise ManifestError(f"{TRAINING_STATE!r} of {restored.manifest.key} is of step {state.step}.")
        read_state(self._accelerator, restored.path)
        own = restored.path / f"loop_state_{self._world.rank}.pt"
        record = torch.load(own, map_location="cpu", weights_only=True)
        self._newest = restored.path
        here = Here(record["place"], RandomState.from_record(record["now"]))
        return Resumed(state, here, restored.manifest)

    def _write(self, folder: Path, state: LoopState, here: Here) -> None:
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        write_state(self._accelerator, folder, self._processing_class)
        record = {"place": here.place, "now": here.now.to_record()}
        torch.save(record, folder / f"loop_state_{self._world.rank}.pt")
        if self._world.is_main:
            (folder / TRAINING_STATE).write_text(state.encode())

    def _move_in(self, beside: Path, folder: Path) -> None:
        if folder.exists():
            _remove_later(folder)
        os.rename(beside, folder)
        if self._newest is not None and self._newest != folder:
            _remove_later(self._newest)
        self._newest = folder


def _step_in(folder: Path) -> int | None:
    """The step of a published folder; None where there is none."""
    try:
        return LoopState.read(folder).step
    except (OSError, ManifestError):
        return None


def _remove_later(folder: Path) -> None:
    """Give the space back in a thread: gigabytes take the disk longer than a save may."""
    gone = folder.parent / META / f"gone-{half_made_by()}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, gone)
    threading.Thread(target=shutil.rmtree, args=(gone, True), name="cloudtrain-rm", daemon=True).start()
