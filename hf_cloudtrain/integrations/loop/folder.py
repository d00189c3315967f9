"""The local folder of a loop: how its state gets into a checkpoint folder, out of it again, and into `best/` and `last/`.

save    every rank writes into `_cloudtrain/saving-…`; when all have, it is renamed to `checkpoint-<step>`, the
        Checkpointer takes it over, and the previous one is removed. In a staged save the writer does it, when it has written
        the tensors
load    what the Checkpointer restored and verified is set on the live objects, on every rank
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.download import download
from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.checkpoints.manifest import Manifest, Position
from hf_cloudtrain.checkpoints.restore import Restored
from hf_cloudtrain.errors import ManifestError
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle
from hf_cloudtrain.integrations.loop import topology
from hf_cloudtrain.integrations.loop.state import (
    TRAINING_STATE,
    LoopState,
    is_for_people,
    publish,
    read_state,
    repair,
    repair_state,
    wanted_by,
    write_state,
)
from hf_cloudtrain.integrations.staged_saves import StagedSaves, checkpoint_size, may_stage
from hf_cloudtrain.resume.data_position import DataPosition
from hf_cloudtrain.resume.random_state import RandomState
from hf_cloudtrain.resume.topology import Conversion
from hf_cloudtrain.runtime.files import temp_suffix
from hf_cloudtrain.runtime.threads import Background, before_exit
from hf_cloudtrain.staging.pickling import FAST_PICKLE
from hf_cloudtrain.storage.names import LOCAL

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 10.0
"""How long the end of a process waits for what is deleted; the next start deletes the rest."""
_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Kinds of training in which every rank writes a part of the model, by code of its own."""


@dataclass(frozen=True)
class Cursor:
    """Where this process stands in the data and in its random numbers."""

    position: dict[str, Any] | None
    """In the epoch's data; None between two epochs."""
    random_state: RandomState
    seed: int | None = None
    """Of Accelerate's seedable sampler."""
    exactness: Exactness = EXACT
    gradients: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    """That wait for the next step of an optimizer, by its number among the prepared ones."""

    @classmethod
    def of(cls, data: DataPosition, *, between_epochs: bool) -> Cursor:
        """Where this process is now; an epoch that is over needs no position in its data."""
        if between_epochs:
            return cls(None, data.random_state(), data.seed)
        reason = data.inexact_reason
        exactness = Exactness.no(reason) if reason else EXACT
        return cls(data.state_dict(), data.random_state(), data.seed, exactness)


@dataclass(frozen=True)
class Resumed:
    """The part of a checkpoint that concerns this process."""

    state: LoopState
    cursor: Cursor
    manifest: Manifest
    topology: Position
    """What decides the meaning of a step, as it is now."""


class LoopFolder:
    """The newest checkpoint, `best/` and `last/`.

    Args:
        processing_class: saved beside the model.
        async_save: whether saves are staged; None: where a checkpoint is large enough.
    """

    def __init__(
        self,
        accelerator: Any,
        lifecycle: AttemptLifecycle,
        processing_class: Any,
        async_save: bool | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._lifecycle = lifecycle
        self._checkpointer = lifecycle.checkpointer
        self._ranks = self._checkpointer.ranks
        self._output_dir = self._checkpointer.output_dir
        self._processing_class = processing_class
        self._async_save = async_save
        self._ours: list[Path] = []
        """The checkpoint that was restored or saved last, and older ones that may not be removed yet."""
        self._token = ""
        self._staged: StagedSaves | None = None
        self._background = Background("What keeps the output folder up to date")
        self._removal = Background("The removal of checkpoints that were replaced")
        before_exit(self._end)
        self._gone: list[Path] = []
        """Folders that are to be deleted, which takes longer for gigabytes than a save may."""

    def begin(self) -> None:
        """An attempt begins: see which of its saves can be staged. On all ranks."""
        size = checkpoint_size(self._accelerator._models)
        may = may_stage(self._checkpointer, self._async_save, size, self._refusal)
        self._staged = StagedSaves(self._checkpointer, size) if may else None

    def load(self) -> Resumed | None:
        """Restore the newest checkpoint and set it on the live objects; None if the run has no checkpoint.

        Raises:
            PositionError: its position cannot be converted to the new number of processes, batch size or accumulation.
        """
        self._ranks.each_leader(lambda: repair(self._output_dir), f"tidy {str(self._output_dir)!r}")
        # Processes that did not exist take the position from the files of process 0.
        wanted = wanted_by([0, *self._ranks.neighbours])
        found = self._lifecycle.restore(wanted, lambda manifest: topology.plan(self._accelerator, manifest))
        if found is None:
            return None
        restored, conversion = found
        if conversion is not None and self._ranks.is_main:
            more = (conversion.now.world_size or 1) > (conversion.saved.world_size or 1)
            logger.warning("%s", conversion.story(derived=more))
        return self._ranks.here(lambda: self._set(restored, conversion), f"load {restored.path.name}")

    def save(
        self,
        state: LoopState,
        cursor: Cursor,
        position: Position,
        *,
        metrics: dict[str, float],
        best: bool,
        last: bool = False,
    ) -> None:
        """Save everything as `checkpoint-<step>`.

        Args:
            cursor: where a resume continues.
            last: whether training ends after it: it is not staged, because the script reads its files next.
        """
        # Named after rank 0's process: the folder of a killed process can be removed, and that of a live one is kept.
        self._token = self._token or self._ranks.agree(temp_suffix, "name a folder")
        folder = self._output_dir / f"checkpoint-{state.step}"
        beside = self._output_dir / LOCAL / f"saving-{state.step}-{self._token}"
        staged = self._staged
        if staged is not None:
            staged.settle()
        self._finish()  # it reads the folder that is removed now, and waits for the same files
        self._ours = [path for path in self._ours if path.exists()]
        try:
            if staged is not None and not last:
                staged.open(beside, folder, [path for path in self._ours if path != folder])
            self._ranks.here(lambda: self._write(beside, cursor), f"write {folder.name}")
            self._ranks.here(
                lambda: self._move_in(beside, folder, state), f"move {folder.name} into the output folder"
            )
        except BaseException:
            if staged is not None:
                staged.forget()
            shutil.rmtree(beside, ignore_errors=True)  # the disk may be full
            raise
        self._checkpointer.save(
            folder,
            position,
            exactness=cursor.exactness,
            metrics={**metrics, **({"best_metric": state.best_metric or 0.0} if best else {})},
            best=best,
            all_written=True,
        )
        if self._ranks.is_main:
            self._publish_later(state, folder, ("last", "best") if best else ("last",))
        self._removal.add(self._delete)

    def complete(self, state: LoopState) -> None:
        """At the end: write `last/`, `best/` and `log.json`, where a different machine saved what they show."""
        self._ranks.agree(lambda: self._complete(state), "download the best checkpoint")
        for background in (self._removal, self._background):
            background.close()

    def _complete(self, state: LoopState) -> None:
        self._finish()
        if self._ours and _nonce_in(self._output_dir / "last") != state.nonce:
            self._publish(self._ours[-1], "last")
        self._write_log(state)
        if state.best_step is not None and _nonce_in(self._output_dir / "best") != state.best_nonce:
            self._download_best(state.best_step, state.best_nonce)
        if self._staged is not None:
            self._staged.end()
        self._removal.add(self._delete)

    def _publish_later(self, state: LoopState, folder: Path, names: tuple[str, ...]) -> None:
        """Write what people look at: within an epoch while training continues, at its end before the script does."""

        def publish_all() -> None:
            if self._staged is not None:
                self._staged.settle_here()
            for name in names:
                self._publish(folder, name)
            self._write_log(log)
            self._removal.add(self._delete)

        log = dataclasses.replace(state, log=list(state.log))
        self._background.add(publish_all)
        if state.batches == 0 and folder.exists():
            self._finish()

    def _finish(self) -> None:
        self._background.settle(threading.TIMEOUT_MAX)

    def _end(self) -> None:
        self._finish()
        self._removal.settle(SETTLE_SECONDS)

    def _download_best(self, step: int, nonce: str) -> None:
        catalog = self._checkpointer.catalog
        manifests = (catalog.read(key) for key in reversed(catalog.checkpoints()) if key.step == step)
        # Where several hosts saved the step again, the nonce ends with a number.
        best = next((found for found in manifests if f"{found.nonce}-".startswith(f"{nonce}-")), None)
        if best is None:
            logger.warning(
                "The best checkpoint (step %d) is not on storage, so 'best' cannot be written.", step
            )
            return
        work = self._output_dir / LOCAL / f"best-{temp_suffix()}"
        download(catalog, best, work / "files", wanted=is_for_people)
        self._publish(work / "files", "best")
        shutil.rmtree(work, ignore_errors=True)

    def _publish(self, folder: Path, name: str) -> None:
        if not folder.exists():  # the writer could not write it, and has said so
            return
        try:
            self._gone.append(publish(folder, self._output_dir / name))
        except OSError as error:
            logger.error(
                "%r could not be written; training continues. %s", str(self._output_dir / name), error
            )

    def _write_log(self, state: LoopState) -> None:
        try:
            if state.log:
                state.write_log(self._output_dir)
        except OSError as error:
            logger.error("'log.json' could not be written; training continues. %s", error)

    def _set(self, restored: Restored, conversion: Conversion | None) -> Resumed:
        manifest = restored.manifest
        state = LoopState.read(restored.path)
        if state.step != manifest.step:
            raise ManifestError(f"{TRAINING_STATE!r} of {manifest.key} is of step {state.step}.")
        read_state(self._accelerator, restored.path)
        self._ours = [restored.path]
        if conversion is None:
            record = _record_of(restored.path, self._ranks.rank)
            cursor = Cursor(
                record["place"],
                RandomState.from_record(record["now"]),
                record["seed"],
                gradients=record.get("gradients") or {},
            )
            return Resumed(state, cursor, manifest, manifest.position)
        return self._set_converted(restored, state, conversion)

    def _set_converted(self, restored: Restored, state: LoopState, conversion: Conversion) -> Resumed:
        rank = self._ranks.rank
        main = _record_of(restored.path, 0)
        own = _record_of(restored.path, rank) if rank < (conversion.saved.world_size or 1) else None
        topology.move_schedules(self._accelerator, conversion)
        position, random = topology.convert_cursor(main, own, conversion, state.seed, rank)
        state = topology.convert_state(state, conversion)
        # Where an accumulation ends is counted from here, and processes that did not exist have loaded no count.
        self._accelerator.step = state.batches
        return Resumed(state, Cursor(position, random, main["seed"]), restored.manifest, conversion.now)

    def _write(self, folder: Path, cursor: Cursor) -> None:
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        write_state(self._accelerator, folder)
        record: dict[str, Any] = {
            "place": cursor.position,
            "now": cursor.random_state.to_record(),
            "seed": cursor.seed,
        }
        if cursor.gradients:
            record["gradients"] = cursor.gradients
        torch.save(record, folder / f"loop_state_{self._ranks.rank}.pt", pickle_module=FAST_PICKLE)

    def _move_in(self, beside: Path, folder: Path, state: LoopState) -> None:
        if not self._ranks.is_leader:
            return
        if self._ranks.is_main:
            repair_state(self._accelerator, beside, self._processing_class)
            (beside / TRAINING_STATE).write_text(state.encode())
        if self._staged is not None and self._staged.close():
            self._ours.append(folder)  # the writer moves it, and then removes the others
            return
        if folder.exists():
            self._move_away(folder)
        os.rename(beside, folder)
        for path in self._ours:
            if path != folder:
                self._move_away(path)
        self._ours = [folder]

    def _move_away(self, folder: Path) -> None:
        gone = folder.parent / LOCAL / f"gone-{temp_suffix()}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, gone)
        self._gone.append(gone)

    def _delete(self) -> None:
        while self._gone:
            shutil.rmtree(self._gone.pop(), ignore_errors=True)

    def _refusal(self) -> str | None:
        kind = str(getattr(self._accelerator.distributed_type, "value", ""))
        return f"{kind} writes the model" if kind in _SHARDED else None


def _record_of(folder: Path, rank: int) -> dict[str, Any]:
    import torch

    path = folder / f"loop_state_{rank}.pt"
    record: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return record


def _nonce_in(folder: Path) -> str | None:
    """The nonce of the save that a published folder comes from; None where there is no such folder."""
    try:
        return LoopState.read(folder).nonce
    except (OSError, ManifestError):
        return None
