"""What becomes of the calls of the function API: without a run URL a local log, with one an attempt of a run."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.in_place import InPlace
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Position
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.checkpoints.start import Advice
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.preemption.agreement import StopDecision
from hf_cloudtrain.preemption.preemption import Preemption, check_no_pending_notice
from hf_cloudtrain.runtime.ranks import rank_and_size
from hf_cloudtrain.tracking.exit_record import Outcome, forget_end, record_end
from hf_cloudtrain.tracking.tracker import StepTracker

logger = logging.getLogger(__name__)

TENSORS_KEPT = 10
"""Calls of `metric` after which tensors are read: one wait for the device in so many steps."""
ADVICE = Advice(
    resume=(
        "Call hf_cloudtrain.restore() after init() and load what it returns; to begin anew, use another run URL. A "
        f"launcher that restored the files before the script began sets {env.RESTORED_CHECKPOINT}."
    ),
    save="Call hf_cloudtrain.upload_checkpoint() after each save.",
)
RESERVED = ("kind", "step", "time")
"""Keys that a record of metrics has of its own."""


class Mode(Protocol):
    """What becomes of the calls."""

    def restore(self) -> tuple[str, int] | None:
        """Folder and step of the newest checkpoint."""

    def begin(self, step: int) -> None:
        """Training begins after `step`."""

    def begin_step(self) -> None:
        """A step begins."""

    def end_step(self, step: int | None) -> None:
        """A step is over; None: it was given up."""

    def upload(self, step: int, *, last: bool) -> None:
        """Take over the checkpoint folder; of the last step, until it is committed."""

    def metric(self, step: int, msg: dict[str, Any]) -> None:
        """Record metrics of a step."""

    def is_emergency(self, step: int) -> bool:
        """Whether to save at this step because the machine goes."""

    def close(self, step: int, state: Outcome) -> None:
        """It ended at `step`; `state` is `finished`, `failed` or `stopped` as far as the steps say."""


class LocalRun:
    """Without a run URL: metrics in a file, and nothing else."""

    def __init__(self, log_name: str | os.PathLike[str] | None) -> None:
        self._log_name = log_name
        self._made = int(time.time())
        self._announced = False
        self._metrics = _Metrics(self._write)

    def restore(self) -> None:
        self._announce()

    def begin(self, step: int) -> None: ...

    def begin_step(self) -> None: ...

    def end_step(self, step: int | None) -> None: ...

    def upload(self, step: int, *, last: bool) -> None:
        self._announce()

    def metric(self, step: int, msg: dict[str, Any]) -> None:
        self._metrics.add(step, msg)

    def is_emergency(self, step: int) -> bool:
        return False

    def close(self, step: int, state: Outcome) -> None:
        self._metrics.flush()

    def _announce(self) -> None:
        if not self._announced and rank_and_size()[0] == 0:
            logger.warning(
                "No run URL, so upload_checkpoint() and restore() do nothing. Pass run_url= to init(), or set %s.",
                env.RUN_URL,
            )
        self._announced = True

    def _write(self, step: int, values: dict[str, Any]) -> None:
        rank, size = rank_and_size()
        if self._log_name is None:
            self._log_name = f"hf_cloudtrain_{self._made}{f'_{rank}' if size > 1 else ''}.log"
        line = {"step": step, "rank": rank, **{name: _finite(value) for name, value in values.items()}}
        with open(self._log_name, "a") as file:
            # One write a line: ranks may share the file.
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


class RemoteRun:
    """With a run URL: an attempt of the run, its steps and its checkpoints."""

    def __init__(
        self,
        run_url: str,
        checkpoint_dir: str | None,
        total: int | None,
        restored: CheckpointKey | None,
        policy: Policy,
    ) -> None:
        self._run_url = run_url
        self._checkpoint_dir = checkpoint_dir
        self._total = total
        self._restored = restored
        self._policy = policy
        self._checkpointer: Checkpointer | None = None
        self._tracker: StepTracker | None = None
        self._preemption: Preemption | None = None
        self._leaving = self._finished = False
        self._metrics = _Metrics(self._log)
        self._closed = False

    def restore(self) -> tuple[str, int] | None:
        self._check_folder_given("restore()")
        restored = self._open().restore()
        if restored is None:
            return None
        self._restored = None
        return str(self._checkpoint_dir), restored.manifest.step

    def begin(self, step: int) -> None:
        checkpointer = self._open()
        now = checkpointer.ranks.group_size
        if now != checkpointer.ranks.size:
            raise ConfigurationError(
                f"The process group has {now} ranks, and restore() saw {checkpointer.ranks.size}: it was called before the "
                "group existed. Call torch.distributed.init_process_group before restore(), or start the script with "
                "torchrun."
            )
        if self._restored is not None:
            checkpointer.ranks.agree(self._check_restored, f"find {self._restored}")
        check_no_pending_notice(checkpointer)
        attempt = checkpointer.begin(step).number
        if checkpointer.ranks.is_main:
            self._tracker = StepTracker(
                checkpointer.catalog,
                attempt,
                first_step=step,
                total_steps=self._total,
                uploads=checkpointer.uploads,
                ownership=checkpointer.ownership,
            )
            self._tracker.start()

    def begin_step(self) -> None:
        if self._tracker is not None:
            self._tracker.begin_step()

    def end_step(self, step: int | None) -> None:
        if self._tracker is not None:
            if step is not None:
                self._tracker.end_step(step)
            self._tracker.pause()  # what comes until the next begins is no step time

    def upload(self, step: int, *, last: bool) -> None:
        self._check_folder_given("upload_checkpoint()")
        checkpointer = self._open()
        checkpointer.check_not_overtaken()
        self._metrics.flush()
        checkpointer.save(
            checkpointer.output_dir,
            Position(global_step=step, world_size=checkpointer.ranks.size, max_steps=self._total),
        )
        if self._tracker is not None:
            self._tracker.flush_soon()
        if last:
            self._finish(checkpointer)
        elif self._leaving:
            assert self._preemption is not None
            self._closed = True
            self._preemption.leave(step, self._close_tracker)

    def metric(self, step: int, msg: dict[str, Any]) -> None:
        if rank_and_size()[0] == 0:
            self._metrics.add(step, msg, hold=self._tracker is None)

    def is_emergency(self, step: int) -> bool:
        if self._closed or self._leaving:
            return self._leaving
        checkpointer = self._open()
        if self._preemption is None:
            self._preemption = Preemption(checkpointer)
            self._preemption.start()
        order = self._preemption.step_ended()
        if order is StopDecision.QUIT:
            self._preemption.quit(self._close_tracker)
        if order is StopDecision.SAVE:
            self._preemption.announce(step)
            self._leaving = True
        return self._leaving

    def close(self, step: int, state: Outcome) -> None:
        if self._preemption is not None:
            self._preemption.close()
        if self._closed:
            return
        self._closed = True
        checkpointer = self._checkpointer
        if checkpointer is None:
            return
        self._metrics.flush()
        checkpointer.drain()
        outcome = self._honest(checkpointer, step, state)
        self._close_tracker(outcome)
        if not self._finished:
            record_end(checkpointer, outcome)
        checkpointer.close()

    def _finish(self, checkpointer: Checkpointer) -> None:
        state: Outcome = "failed"
        try:
            checkpointer.finish()
            state = "finished"
        finally:
            if self._preemption is not None:
                self._preemption.close()  # not before: a signal must not cut off the last upload
            self._finished = True
            self._close_tracker(state)
            record_end(checkpointer, state)

    def _close_tracker(self, state: str) -> None:
        if self._tracker is not None:
            self._tracker.close(state)

    def _honest(self, checkpointer: Checkpointer, step: int, state: Outcome) -> Outcome:
        """What the run says of its end, given what is on storage; warns of steps that are in no checkpoint."""
        if checkpointer.overtaken_by is not None:
            return "overtaken"
        saved = checkpointer.last_saved
        if self._checkpoint_dir is None or state == "failed":
            return state
        if saved is None:
            logger.error("Training ended without uploading a checkpoint. %s", ADVICE.save)
            return "failed"
        if saved.step < step:
            logger.warning(
                "Training ended at step %d, and the last checkpoint that was uploaded is of step %d: the steps between "
                "are in none. Call upload_checkpoint() after the last step.",
                step,
                saved.step,
            )
        return state if _is_committed(checkpointer, saved) else "failed"

    def _open(self) -> Checkpointer:
        """Made when it is first needed: by then the process group exists, if there will be one."""
        if self._checkpointer is None:
            # Without a folder nothing is saved; what an attempt needs of a disk goes to the working folder.
            forget_end()
            made = Checkpointer(
                self._run_url, self._checkpoint_dir or Path.cwd(), advice=ADVICE, layout=InPlace
            )
            made.policy = self._policy
            if self._restored is not None:
                made.restored_before(self._restored)
            self._checkpointer = made
        return self._checkpointer

    def _check_restored(self) -> None:
        """What a launcher says may be wrong, or not the newest any more."""
        catalog = self._open().catalog
        keys = catalog.checkpoints()
        if self._restored not in keys:
            raise ConfigurationError(
                f"{env.RESTORED_CHECKPOINT}={str(self._restored)!r} is no checkpoint of {catalog.storage.url!r}. Unset it, "
                "and call hf_cloudtrain.restore() after init()."
            )
        if self._restored != keys[-1]:
            logger.warning(
                "Training goes on from %s, as %s says, but the newest checkpoint of %r is %s.",
                self._restored,
                env.RESTORED_CHECKPOINT,
                catalog.storage.url,
                keys[-1],
            )

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if self._tracker is not None:
            self._tracker.log(step, {name: value for name, value in values.items() if name not in RESERVED})

    def _check_folder_given(self, function: str) -> None:
        if self._checkpoint_dir is None:
            raise ConfigurationError(
                f"{function} needs to know the checkpoint folder. Pass checkpoint_dir= to init(), or set "
                f"{env.CHECKPOINT_DIR}."
            )


class _Metrics:
    """Metrics on their way; tensors wait here, so that the device is not waited for at each step."""

    def __init__(self, write: Callable[[int, dict[str, Any]], None]) -> None:
        self._write = write
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self._tensors = 0

    def add(self, step: int, msg: dict[str, Any], *, hold: bool = False) -> None:
        values = {name: _kept(name, value) for name, value in msg.items()}
        self._waiting.append((step, values))
        self._tensors += any(hasattr(value, "detach") for value in values.values())
        if not hold and (not self._tensors or len(self._waiting) >= TENSORS_KEPT):
            self.flush()

    def flush(self) -> None:
        waiting, self._waiting, self._tensors = self._waiting, [], 0
        for step, values in waiting:
            self._write(step, {name: _number(value) for name, value in values.items()})


def _kept(name: str, value: Any) -> Any:
    if not hasattr(value, "detach"):
        return value
    if value.numel() != 1:
        raise ConfigurationError(
            f"The metric {name!r} is a tensor of shape {tuple(value.shape)}. Pass one number, for example its mean()."
        )
    # A clone, because running sums are added to in place.
    return value.detach().clone()


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_committed(checkpointer: Checkpointer, key: CheckpointKey) -> bool:
    if key == checkpointer.uploads.last_committed:
        return True
    try:
        return checkpointer.catalog.holds(key)  # by another host
    except CloudTrainError:
        return False
