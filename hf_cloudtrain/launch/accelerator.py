"""`Accelerator.save_state` and `load_state` of a plain script below `cloudtrain launch`.

    first step   refused where the run has a state and the script has loaded none (law 9)
    load_state   a folder that is missing is restored from the run; the attempt begins at its step
    save_state   the framework writes the folder, rank 0 takes it over as a checkpoint, the upload is in the background
    end          waits for the uploads; after SIGTERM as long as there is time

Scripts may call `save_state` on rank 0 only, so the ranks agree on nothing here: rank 0 does everything, and the others leave
marks. Whether a resume is exact is the script's affair, and not verified.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.attempt_checks import Advice
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import is_whole
from hf_cloudtrain.checkpoints.exactness import Exactness
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest, Position
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, PreemptedExit, RunHasCheckpointsError
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle, is_used
from hf_cloudtrain.integrations.messages import show_messages
from hf_cloudtrain.launch.marks import Marks
from hf_cloudtrain.launch.notes import note, read_notes
from hf_cloudtrain.launch.numbering import Numbers
from hf_cloudtrain.launch.state_folders import (
    FOLDER,
    StateFolders,
    home_of,
    name_of,
    named_like,
    put,
    unshare,
)
from hf_cloudtrain.launch.steps import OptimizerSteps
from hf_cloudtrain.runtime.threads import before_exit
from hf_cloudtrain.runtime.tracebacks import short_traceback
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.urls import shown_url

logger = logging.getLogger(__name__)

NOT_VERIFIED = Exactness.not_verified(
    "the script decides what save_state() holds, and what it does after load_state()"
)
HOW_TO_LOAD = (
    "Start it with its own option that names the folder to load: `cloudtrain launch --resume-option --resume_from_checkpoint` "
    "adds that option once there is a checkpoint. To start over, use a different run URL."
)
ADVICE = Advice(resume=HOW_TO_LOAD, save="Make the script call save_state().")
LEAVING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
RESERVE = 2.0
"""Seconds of the grace time that are left for the end of the process."""


class SavedStates:
    """What this process saves and loads with one Accelerator.

    Example:
        >>> states = SavedStates(accelerator, "s3://bucket/runs/mrpc", steps)
        >>> with states.saving("step_100") as save:
        ...     save.folder = accelerator.save_state("step_100")
    """

    @short_traceback
    def __init__(self, accelerator: Any, run_url: str, steps: OptimizerSteps, folder: Path) -> None:
        """`folder` is the first one that is saved or loaded, absolute."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)
        if accelerator.num_processes > here:
            raise ConfigurationError(
                "`cloudtrain launch` stores what save_state() writes on one machine, and this script runs on several. Use "
                f"TrainLoop, or set {env.LAUNCH}=off."
            )
        show_messages()
        self._accelerator, self._steps = accelerator, steps
        self._is_main = bool(accelerator.is_main_process)
        project = accelerator.project_configuration
        # Accelerate deletes folders of the script where it names them.
        limit = (project.automatic_checkpoint_naming and project.total_limit) or 0
        self._limit = limit if limit > 0 else None
        self._home = home_of(folder)
        numbers = Numbers.of_this_process(run_url)
        training = numbers.began(numbers.begin(str(self._home)))
        self._url = numbers.url_of(training.number)
        self._catalog = Catalog(Storage(self._url, env.storage_options(None)))
        self._marks = Marks(self._home, int(accelerator.process_index), here)
        self._lifecycle: AttemptLifecycle | None = None
        """Of the attempt, once it has begun, on rank 0."""
        self._base = 0
        """The step at which the steps that are counted here begin."""
        self._deadline: float | None = None
        if self._is_main:
            numbers.tell(training)
            logger.info(
                "`cloudtrain launch` has hooked save_state() and load_state() of Accelerator: what they save goes to %s.",
                shown_url(self._url),
            )

    @contextlib.contextmanager
    def saving(self, folder: Path | None) -> Iterator[_Save]:
        """Around `save_state`.

        Args:
            folder: as the script names it, absolute; None where Accelerate chooses it.
        """
        if self._is_main:
            self._begin(None)
            if folder is not None:
                unshare(folder)
        save = _Save()
        with self._marks.saving(folder):
            yield save
            if self._is_main and save.folder is not None:
                self._keep(Path(save.folder).absolute())

    @short_traceback
    def before_loading(self, folder: Path) -> None:
        """Restore a folder that is missing on this machine, if the run has it. On every rank."""
        if folder.is_dir():
            return
        manifest = self._find(folder)
        if manifest is None:
            if self._is_main:
                logger.warning("The run %r has no state named %r.", self._catalog.storage.url, folder.name)
        elif put(self._catalog, manifest, folder, self._home) and self._is_main:
            logger.warning("Restored %s from %s of %r.", folder, manifest.folder, self._catalog.storage.url)

    @short_traceback
    def loaded(self, folder: Path) -> None:
        """Begin the attempt at the step of what `load_state` has loaded first, on rank 0."""
        if not self._is_main or self._lifecycle is not None:
            return
        manifest = self._find(folder)
        if manifest is not None and is_whole(folder, manifest):
            self._base = manifest.step - self._steps.of(self._accelerator)
        else:
            manifest = None
            logger.warning("%s is not a checkpoint of the run %r.", folder, self._catalog.storage.url)
        self._begin(manifest)

    def _find(self, folder: Path) -> Manifest | None:
        """The newest checkpoint that was saved under the name of a folder."""
        found = map(self._catalog.read, reversed(self._catalog.checkpoints()))
        return next((manifest for manifest in found if named_like(manifest, folder)), None)

    @short_traceback
    def _begin(self, loaded: Manifest | None) -> None:
        if self._lifecycle is not None:
            return
        lifecycle = AttemptLifecycle.of(self._url, self._home, layout=StateFolders, advice=ADVICE)
        lifecycle.checkpointer.policy = Policy(self._limit)
        step = 0
        if loaded is not None:
            step, lifecycle.restored = loaded.step, loaded
            lifecycle.checkpointer.restored_before(CheckpointKey(loaded.attempt, loaded.step))
        lifecycle.begin(step, saves="saves when the script calls save_state()")
        self._lifecycle = lifecycle
        self._steps.on_step = self._track
        self._listen()
        before_exit(self._close)

    @short_traceback
    def _keep(self, folder: Path) -> None:
        """Take over a folder that was just written."""
        assert self._lifecycle is not None, "begun before the save"
        checkpointer = self._lifecycle.checkpointer
        assert checkpointer.attempt is not None, "begun before the save"
        self._marks.wait()
        checkpointer.check_not_overtaken()
        step, last = self._step(), checkpointer.last_saved
        if last is not None and not self._steps.of(self._accelerator):
            step = last.step + 1  # the steps of this optimizer cannot be counted
        checkpointer.attempt.trained[FOLDER] = name_of(folder)
        checkpointer.save(
            folder,
            Position(global_step=step, world_size=int(self._accelerator.num_processes)),
            exactness=NOT_VERIFIED,
            all_written=True,
        )
        if self._lifecycle.tracker is not None:
            self._lifecycle.tracker.flush_soon()

    def _step(self) -> int:
        return self._base + self._steps.of(self._accelerator)

    def _track(self, optimizer: Any) -> None:
        tracker = None if self._lifecycle is None else self._lifecycle.tracker
        if tracker is not None and self._steps.counts_for(self._accelerator, optimizer):
            tracker.begin_step()
            tracker.end_step(self._step())

    def _listen(self) -> None:
        """Let a signal that would kill the script raise an exception in it instead, so that uploads are finished first."""
        if threading.current_thread() is threading.main_thread():
            for number in LEAVING:
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, self._leave)

    def _leave(self, number: int, _frame: FrameType | None) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + max(0.0, env.grace(None) - RESERVE)
            logger.warning("%s: leaving, after the uploads.", signal.Signals(number).name)
            raise PreemptedExit

    def _close(self) -> None:
        """At the end of the process: what was saved is committed by then, or named."""
        lifecycle = self._lifecycle
        if lifecycle is None or lifecycle.is_over:
            return
        self._steps.on_step = None
        error = getattr(sys, "last_value", None)
        try:
            if self._deadline is not None:
                lifecycle.checkpointer.wait(max(0.0, self._deadline - time.monotonic()), in_time=True)
                lifecycle.end("preempted")
            elif error is None:
                lifecycle.finish()
            else:
                lifecycle.finish("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
        except CloudTrainError as problem:
            note("not-stored", str(problem))
            logger.error("%s", problem)
        lifecycle.close()
        self._marks.close()


class _Save:
    """One call of `save_state`."""

    folder: Any = None
    """What it has written."""


def why_left_alone(run_url: str | None) -> str | None:
    """Why the states of a script are left alone, as the end of a sentence; None if they are taken care of."""
    if run_url is None:
        return "there is no run URL"
    functions = sys.modules.get("hf_cloudtrain.integrations.functions.api")
    is_open = functions is not None and functions.is_open()
    if is_open or (is_used() and not Numbers.of_this_process(run_url).any_here):
        return "the script uses hf_cloudtrain itself"
    return None


def check_loaded(run_url: str) -> None:
    """Refuse the first step of a script that has loaded nothing, where the run has something to load. On every rank."""
    for one in read_notes(env.launch_notes()):
        if one.what == "restored":
            note("refused")
            raise RunHasCheckpointsError(
                f"The run {shown_url(run_url)!r} has a checkpoint, {one.value!r}, but the script trains from step 0. {HOW_TO_LOAD}"
            )
