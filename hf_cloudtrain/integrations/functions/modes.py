"""The two modes of the function API: without a run URL a local log, with one the attempts of a run."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.attempt_checks import Advice
from hf_cloudtrain.checkpoints.exactness import Exactness
from hf_cloudtrain.checkpoints.in_place import InPlace
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest, Position
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.integrations.functions.async_writes import AsyncWrites
from hf_cloudtrain.integrations.functions.trackers import continued, known_services
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle
from hf_cloudtrain.runtime.ranks import rank_and_size
from hf_cloudtrain.runtime.values import finite, utf8
from hf_cloudtrain.storage.urls import normal_url
from hf_cloudtrain.tracking.exit_record import Outcome

logger = logging.getLogger(__name__)
_SCRIPT_DECIDES = Exactness.not_verified("the script decides what a checkpoint holds and how it is loaded")

TENSORS_KEPT = 10
"""Calls of `metric` after which tensors are read, so that one step of ten waits for the device."""
ADVICE = Advice(
    resume=(
        "Call hf_cloudtrain.restore() after init() and load what it returns; to start over, use a different run URL. A "
        f"launcher that restored the files before the script began sets {env.RESTORED_CHECKPOINT}."
    ),
    save="Call hf_cloudtrain.upload_checkpoint() after each save.",
)


class Mode:
    """What the functions do; without a run URL, most of them do nothing."""

    def restore(self) -> tuple[str, int] | None:
        """Restore the newest checkpoint; its folder and step."""

    def begin(self, step: int) -> None:
        """Training begins after `step`."""

    def begin_step(self) -> None:
        """A step begins."""

    def end_step(self, step: int | None) -> None:
        """A step is over; None: the script gave it up."""

    def async_writes(self, folder: str | os.PathLike[str] | None) -> AbstractContextManager[None]:
        """Stage what is saved in a block, where that is possible."""
        return nullcontext()

    def upload(self, step: int, *, last: bool) -> None:
        """Take over the checkpoint folder; that of the last step until it is committed."""

    def metric(self, step: int, msg: dict[str, Any]) -> None:
        """Record metrics of a step."""

    def trackers(self, step: int, services: tuple[str, ...], *, arguments: bool) -> dict[str, Any]:
        """What lets services go on in the tracker runs of the run: arguments of their start, else variables."""
        return {}

    def is_emergency(self, step: int) -> bool:
        """Whether to save at this step because the machine is preempted."""
        return False

    def close(self, step: int, outcome: Outcome) -> None:
        """Training ended at `step`, as far as the steps tell with this outcome: `finished`, `failed` or `stopped`."""


class LocalRun(Mode):
    """Without a run URL: metrics in a file, and nothing else."""

    def __init__(self, log_name: str | os.PathLike[str] | None) -> None:
        self._log_name = log_name
        self._created = int(time.time())
        self._warned = False
        self._dropped = False
        """Whether metrics were named that cannot be written."""
        self._metrics = _Metrics(self._write)

    def restore(self) -> None:
        self._warn_once()

    def upload(self, step: int, *, last: bool) -> None:
        self._warn_once()

    def metric(self, step: int, msg: dict[str, Any]) -> None:
        self._metrics.add(step, msg)

    def close(self, step: int, outcome: Outcome) -> None:
        self._metrics.flush()

    def _warn_once(self) -> None:
        if not self._warned and rank_and_size()[0] == 0:
            logger.warning(
                "No run URL, so upload_checkpoint() and restore() do nothing. Pass run_url= to init(), or set %s.",
                env.RUN_URL,
            )
        self._warned = True

    def _write(self, step: int, values: dict[str, Any]) -> None:
        rank, size = rank_and_size()
        if self._log_name is None:
            self._log_name = f"hf_cloudtrain_{self._created}{f'_{rank}' if size > 1 else ''}.log"
        try:
            line = {"step": step, "rank": rank, **finite(values)}
            text = utf8(json.dumps(line, ensure_ascii=False, allow_nan=False, default=str)) + "\n"
        except (ValueError, RecursionError) as error:
            say = logger.debug if self._dropped else logger.warning
            say("The metrics of step %d are not written to %r: %s", step, self._log_name, error)
            self._dropped = True
            return
        with open(self._log_name, "a", encoding="utf-8") as file:
            # One write a line: ranks may share the file.
            file.write(text)


class RemoteRun(Mode):
    """With a run URL: an attempt of the run, its steps and its checkpoints."""

    def __init__(
        self,
        run_url: str,
        checkpoint_dir: str | None,
        total: int | None,
        restored: CheckpointKey | None,
        policy: Policy,
        async_save: bool | None = None,
        *,
        has_page: bool = False,
    ) -> None:
        self._run_url = normal_url(run_url)
        self._checkpoint_dir = checkpoint_dir
        self._total = total
        self._restored = restored
        self._policy = policy
        self._async_save = async_save
        self._has_page = has_page
        self._writes: AsyncWrites | None = None
        """Of the rank that moves bytes, once training has begun."""
        self._lifecycle: AttemptLifecycle | None = None
        self._metrics = _Metrics(self._log)
        self._closed = False

    def restore(self) -> tuple[str, int] | None:
        self._check_folder_given("restore()")
        found = self._open().restore()
        if found is None:
            return None
        self._restored = None
        return str(self._checkpoint_dir), found[0].manifest.step

    def begin(self, step: int) -> None:
        lifecycle = self._open()
        ranks = lifecycle.checkpointer.ranks
        if ranks.group_size != ranks.size:
            raise ConfigurationError(
                f"The process group has {ranks.group_size} ranks, but restore() saw {ranks.size}: it was called before the "
                "group existed. Call torch.distributed.init_process_group before restore(), or start the script with "
                "torchrun."
            )
        if self._restored is not None:
            lifecycle.restored = ranks.agree(partial(self._find, self._restored), f"find {self._restored}")
        lifecycle.begin(step, total=self._total, saves="saves at each upload_checkpoint()")
        if (queue := lifecycle.checkpointer.upload_queue) is not None:
            self._writes = queue.late = AsyncWrites(lifecycle.checkpointer, self._async_save)

    def begin_step(self) -> None:
        if self._writes is not None:
            self._writes.write_rest()
        if (tracker := self._open().tracker) is not None:
            tracker.begin_step()

    def end_step(self, step: int | None) -> None:
        if (tracker := self._open().tracker) is not None:
            if step is not None:
                tracker.end_step(step)
            tracker.pause()  # the time until the next step begins does not count as a step

    def async_writes(self, folder: str | os.PathLike[str] | None) -> AbstractContextManager[None]:
        self._check_folder_given("async_writes()")
        whole = Path(str(self._checkpoint_dir)).absolute()
        if folder is not None and not Path(folder).absolute().is_relative_to(whole):
            raise ConfigurationError(
                f"async_writes({os.fspath(folder)!r}) is not in the checkpoint folder {str(whole)!r}, which is what "
                "upload_checkpoint() uploads. Save there, or leave async_writes() out."
            )
        if self._writes is None or self._lifecycle is None:
            return nullcontext()
        return self._writes.window(last=self._lifecycle.is_leaving)

    def upload(self, step: int, *, last: bool) -> None:
        self._check_folder_given("upload_checkpoint()")
        lifecycle = self._open()
        checkpointer = lifecycle.checkpointer
        checkpointer.check_not_overtaken()
        self._metrics.flush()
        checkpointer.save(
            checkpointer.output_dir,
            Position(global_step=step, world_size=checkpointer.ranks.size, max_steps=self._total),
            exactness=_SCRIPT_DECIDES,
        )
        lifecycle.flush_soon()
        if last:
            lifecycle.finish()
        elif lifecycle.is_leaving:
            self._closed = True
            lifecycle.leave(step)

    def metric(self, step: int, msg: dict[str, Any]) -> None:
        begun = self._lifecycle is not None and self._lifecycle.checkpointer.attempt is not None
        self._metrics.add(step, msg, hold=not begun)

    def trackers(self, step: int, services: tuple[str, ...], *, arguments: bool) -> dict[str, Any]:
        lifecycle, found = self._open(), {}
        for service in known_services(services, arguments=arguments):
            if lifecycle.checkpointer.ranks.is_main:
                tracker_id, settings = continued(lifecycle.checkpointer, service, step, arguments=arguments)
                found.update(settings)
                lifecycle.tracker_pages[service.name] = tracker_id
        return found

    def is_emergency(self, step: int) -> bool:
        lifecycle = self._open()
        if self._closed or lifecycle.is_over or lifecycle.is_leaving:
            return lifecycle.is_leaving  # after the last upload, signals do again what they did before
        if lifecycle.preemption is None:
            lifecycle.listen()
        if lifecycle.must_stop():
            lifecycle.announce(step)
        return lifecycle.is_leaving

    def close(self, step: int, outcome: Outcome) -> None:
        lifecycle = self._lifecycle
        if lifecycle is None or self._closed:
            return
        self._closed = True
        lifecycle.stop_listening()
        self._metrics.flush()
        if self._writes is not None:
            self._writes.end()
        lifecycle.checkpointer.drain()
        if not lifecycle.is_over:
            lifecycle.end(self._honest_outcome(lifecycle, step, outcome))
        lifecycle.close()

    def _honest_outcome(self, lifecycle: AttemptLifecycle, step: int, outcome: Outcome) -> Outcome:
        """How the attempt ended, given what is on storage; warns of steps that are in no checkpoint."""
        checkpointer = lifecycle.checkpointer
        if checkpointer.overtaken_by is not None:
            return "overtaken"
        saved = checkpointer.last_saved
        if self._checkpoint_dir is None or outcome == "failed":
            return outcome
        if saved is None:
            logger.error("Training ended without uploading a checkpoint. %s", ADVICE.save)
            return "failed"
        if saved.step < step:
            logger.warning(
                "Training ended at step %d, but the last uploaded checkpoint is of step %d: the steps in between are in no "
                "checkpoint. Call upload_checkpoint() after the last step.",
                step,
                saved.step,
            )
        if saved == checkpointer.uploads.last_committed:
            return outcome
        try:
            return outcome if checkpointer.catalog.holds(saved) else "failed"  # committed by another host
        except CloudTrainError:
            return "failed"

    def _open(self) -> AttemptLifecycle:
        """Opened when it is first needed: by then the process group exists, if there will be one."""
        if self._lifecycle is None:
            # Without a checkpoint folder nothing is saved; the few files that an attempt needs go to the working folder.
            folder = Path(self._checkpoint_dir or Path.cwd()).absolute()
            self._lifecycle = AttemptLifecycle.of(self._run_url, folder, layout=InPlace, advice=ADVICE)
            self._lifecycle.checkpointer.policy = self._policy
            self._lifecycle.has_page = self._has_page
            if self._restored is not None:
                self._lifecycle.checkpointer.restored_before(self._restored)
        return self._lifecycle

    def _find(self, key: CheckpointKey) -> Manifest:
        """What the launcher has restored. Its key may be wrong, or not the newest any more."""
        catalog = self._open().checkpointer.catalog
        keys = catalog.checkpoints()
        if key not in keys:
            raise ConfigurationError(
                f"{env.RESTORED_CHECKPOINT}={str(key)!r} is not a checkpoint of {catalog.storage.url!r}. Unset "
                "it, and call hf_cloudtrain.restore() after init()."
            )
        if key != keys[-1]:
            logger.warning(
                "Training resumes from %s, which %s names, but the newest checkpoint of %r is %s.",
                key,
                env.RESTORED_CHECKPOINT,
                catalog.storage.url,
                keys[-1],
            )
        return catalog.read(key)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if self._lifecycle is not None:
            self._lifecycle.log(step, values)

    def _check_folder_given(self, function: str) -> None:
        if self._checkpoint_dir is None:
            raise ConfigurationError(
                f"{function} needs to know the checkpoint folder. Pass checkpoint_dir= to init(), or set "
                f"{env.CHECKPOINT_DIR}."
            )


class _Metrics:
    """Metrics before they are written; tensors are kept here, so that not every step waits for the device."""

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
