"""Any PyTorch loop, function by function. All ranks call everything.

    import hf_cloudtrain as ct

    ct.init(total_train_steps=1_000, run_url="s3://bucket/runs/cifar", checkpoint_dir="ckpt")
    folder = ct.restore()                       # None on the first start
    while ct.processed_steps() < 1_000:
        with ct.train_step():
            ...
        ct.metric({"loss": loss})
        if ct.processed_steps() % 100 == 0 or ct.is_emergency_save():
            if rank == 0:
                torch.save(state, "ckpt/checkpoint.pt")
            ct.upload_checkpoint()

Names, meaning and order are those of the PeriFlow SDK, so a script written for it needs to change only its import.
"""

from __future__ import annotations

import logging
import operator
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.errors import ConfigurationError, RunCompleteError
from hf_cloudtrain.integrations.functions.modes import LocalRun, Mode, RemoteRun
from hf_cloudtrain.integrations.messages import show_messages
from hf_cloudtrain.report import live
from hf_cloudtrain.runtime.threads import before_exit
from hf_cloudtrain.runtime.tracebacks import short_traceback
from hf_cloudtrain.tracking.exit_record import Outcome

logger = logging.getLogger(__name__)


@short_traceback
def init(
    total_train_steps: int | None,
    run_url: str | os.PathLike[str] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    local_log_name: str | os.PathLike[str] | None = None,
    *,
    save_total_limit: int | None = None,
    keep_every_n_steps: int | None = None,
    async_save: bool | None = None,
    page: bool | None = None,
) -> None:
    """Name the run; the first of these functions. It may come before or without a process group.

    Without a run URL it is in local mode: metrics go to a file, and nothing is uploaded or restored.

    Args:
        total_train_steps: steps of the whole run; None if unknown. In local mode -1 is unknown too, which is the
            `max_steps` of Trainer unless it is set.
        run_url: any fsspec URL; None takes `HF_CLOUDTRAIN_RUN_URL`.
        checkpoint_dir: the folder that the script saves into; None takes `HF_CLOUDTRAIN_CHECKPOINT_DIR`.
        local_log_name: file for the metrics of local mode; None: `hf_cloudtrain_<time>[_<rank>].log`.
        save_total_limit: how many checkpoints stay on storage, the newest ones of the run; None keeps all. In addition the
            pinned and the one that was resumed from stay.
        keep_every_n_steps: checkpoints of steps that are a multiple of this stay too.
        async_save: whether a process of its own writes what is saved inside `async_writes`. None takes
            `HF_CLOUDTRAIN_ASYNC_SAVE`, else where a save has 64 MB or more.
        page: whether a page lives with the run: `index.html` beside it, renewed while it trains. None takes
            `HF_CLOUDTRAIN_PAGE`. Needs `hf_cloudtrain[report]`.

    Raises:
        RunCompleteError: all steps are done already.
        ConfigurationError: an argument that cannot work.

    Example:
        >>> init(total_train_steps=1_000, run_url="s3://bucket/runs/cifar", checkpoint_dir="ckpt")
    """
    url = env.run_url_or_none(run_url)
    total = _checked_total(total_train_steps, is_local=url is None)
    policy = Policy(save_total_limit, keep_every_n_steps)
    if _Current.run is not None:
        _Current.run.close()
        _Current.run = None
    if url is None:
        _Current.run = _Run(total, LocalRun(local_log_name), 0)
        return
    show_messages()
    restored = _restored_by_launcher()
    folder = env.checkpoint_dir(checkpoint_dir) or env.periflow_checkpoint_dir()
    mode = RemoteRun(url, folder, total, restored, policy, async_save, has_page=live.is_wanted(page))
    _Current.run = _Run(total, mode, restored.step if restored else 0)


@short_traceback
def restore() -> str | None:
    """Put the newest committed checkpoint back into the checkpoint folder; call it after `init`, before the first step.

    Returns:
        The folder; None on the first start of a run, and in local mode.

    Raises:
        RunCompleteError: that checkpoint is the end of the run.
        CorruptCheckpointError: all checkpoints are damaged.
        StorageError: the storage does not answer.

    Example:
        >>> if (folder := restore()) is not None:
        ...     state = torch.load(f"{folder}/checkpoint.pt")
    """
    return _opened("restore").restore()


@short_traceback
def start_step() -> None:
    """Begin a training step.

    Raises:
        ConfigurationError: the previous step has not ended.
        RunHasCheckpointsError: the first step is step 1 of a run that has checkpoints.
    """
    _opened("start_step").start_step()


@short_traceback
def end_step() -> None:
    """End the training step, which counts as done.

    Raises:
        ConfigurationError: no step was started.
    """
    _opened("end_step").end_step()


@contextmanager
def train_step() -> Iterator[None]:
    """`start_step` and `end_step` around a block; a step whose block raises does not count.

    Example:
        >>> with train_step():
        ...     loss.backward()
        ...     optimizer.step()
    """
    run = _opened("train_step")
    run.start_step()
    try:
        yield
    except BaseException:
        run.give_up_step()
        raise
    run.end_step()


@contextmanager
def async_writes(folder: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Around a save, right before `upload_checkpoint`: training waits for a copy in memory, and no longer for the disk.

    Files of `torch.save`, `save_file` and `save_pretrained` below the checkpoint folder are written in the background. They appear
    under their names when they are whole; do not rename or read them in the block. The next block waits until then. The
    first block of a training is an ordinary save.

    Args:
        folder: the checkpoint folder, or one in it; None is the checkpoint folder.

    Raises:
        ConfigurationError: a different folder, which is not uploaded.

    Example:
        >>> with async_writes():
        ...     torch.save(state, "ckpt/checkpoint.pt")
        >>> upload_checkpoint()
    """
    with _opened("async_writes").async_writes(folder):
        yield


@short_traceback
def upload_checkpoint() -> None:
    """Upload the checkpoint folder, which was just written for this step, in the background.

    It returns when the folder is copied (blocks are shared where the file system can), so it may be written again. It does not
    wait for files of `async_writes`.
    `_cloudtrain/` and temporary files are left out. After the last step it returns when the checkpoint is committed.

    Raises:
        NotCommittedError: after the last step: the storage did not take it in time; it is kept on this machine.
        OvertakenError: a newer attempt of the run has begun, and only that one may write.
        ConfigurationError: the checkpoint folder is not known.
    """
    _opened("upload_checkpoint").upload_checkpoint()


@short_traceback
def metric(msg: dict[str, Any]) -> None:
    """Record metrics of the current step: in the run, those of rank 2 as `rank2/…`; in local mode in a file of JSON lines.

    Tensors of one value are kept as they are and read every ten calls, so that not every step waits for the device.

    Example:
        >>> metric({"loss": loss, "learning_rate": 0.1})
    """
    _opened("metric").metric(msg)


def is_emergency_save() -> bool:
    """Whether to save this step at once, because the machine is being preempted: the same answer on all ranks.

    The first call installs handlers for SIGTERM, SIGUSR1, SIGUSR2, SIGHUP and Ctrl-C, and watches for notices of the cloud. Call it
    once a step, on all ranks; the `upload_checkpoint` that follows waits until the checkpoint is committed or the time is
    up, and ends the process. In local mode it is always False.

    Raises:
        PreemptedExit: from `upload_checkpoint`; a SystemExit with the code 75, in a notebook a PreemptedError.

    Example:
        >>> if step % 100 == 0 or is_emergency_save():
        ...     torch.save(state, "ckpt/checkpoint.pt")
        ...     upload_checkpoint()
    """
    return _opened("is_emergency_save").is_emergency_save()


@short_traceback
def tracker_environment(*services: str) -> dict[str, str]:
    """Variables with which trackers that the script starts go on in one tracker run; after `restore`, and for rank 0 only.

    Args:
        services: such as `wandb` or `mlflow`. One that takes no variables has `tracker_arguments`.

    Example:
        >>> os.environ.update(tracker_environment("mlflow"))
        >>> mlflow.start_run()
    """
    return _opened("tracker_environment").trackers(services, arguments=False)


@short_traceback
def tracker_arguments(service: str) -> dict[str, Any]:
    """The same as arguments of its start, such as `wandb.init`, `trackio.init`, `mlflow.start_run` or `SummaryWriter`.

    Example:
        >>> wandb.init(project="glue", **tracker_arguments("wandb"))
    """
    return _opened("tracker_arguments").trackers((service,), arguments=True)


def processed_steps() -> int:
    """Steps that are done, including those of earlier attempts."""
    return _opened("processed_steps").done


class _Run:
    """The steps of one run in this process: which functions were called, and which may follow."""

    def __init__(self, total: int | None, mode: Mode, done: int) -> None:
        self.done = done
        self._total = total
        self._mode = mode
        self._started = False
        self._begun = False
        self._check_not_complete(done)

    @property
    def is_remote(self) -> bool:
        """Whether it has a run URL."""
        return not isinstance(self._mode, LocalRun)

    @property
    def step(self) -> int:
        """The step under way, else the last one."""
        return self.done + self._started

    def restore(self) -> str | None:
        if self._begun:
            raise ConfigurationError(
                "restore() was called after training began. Call it right after init(), and load what it returns."
            )
        found = self._mode.restore()
        if found is None:
            return None
        folder, step = found
        self._check_not_complete(step)
        self.done = step
        return folder

    def start_step(self) -> None:
        if self._started:
            raise ConfigurationError(
                f"start_step() was called twice: step {self.step} has not ended. Call end_step() after each step, or use "
                "`with train_step():`."
            )
        self._begin()
        if self.done == self._total:
            logger.warning("Training continues after step %d, the last one according to init().", self.done)
        self._started = True
        self._mode.begin_step()

    def end_step(self) -> None:
        if not self._started:
            raise ConfigurationError(
                "end_step() was called without start_step(). Call start_step() before each step, or use `with train_step():`."
            )
        self._started = False
        self.done += 1
        self._mode.end_step(self.done)

    def give_up_step(self) -> None:
        self._started = False
        self._mode.end_step(None)

    def async_writes(self, folder: str | os.PathLike[str] | None) -> AbstractContextManager[None]:
        return self._mode.async_writes(folder)

    def upload_checkpoint(self) -> None:
        self._begin()
        self._mode.upload(self.step, last=self._total is not None and self.step >= self._total)

    def metric(self, msg: dict[str, Any]) -> None:
        self._mode.metric(self.step, msg)

    def trackers(self, services: tuple[str, ...], *, arguments: bool) -> dict[str, Any]:
        return self._mode.trackers(self.done, services, arguments=arguments)

    def is_emergency_save(self) -> bool:
        self._begin()
        return self._mode.is_emergency(self.step)

    def close(self) -> None:
        """The end of this run in this process: by a second `init`, or with the process."""
        complete = self._total is not None and self.done >= self._total
        error = getattr(sys, "last_value", None)  # set where an exception ends the process
        outcome: Outcome
        if error is not None and not isinstance(error, KeyboardInterrupt):
            outcome = "failed"
        else:
            outcome = "finished" if complete or (error is None and self._total is None) else "stopped"
        self._mode.close(self.done, outcome)

    def _begin(self) -> None:
        """At the first step, or an upload before it: by now a process group exists, if there will be one."""
        if not self._begun:
            self._mode.begin(self.done)
            self._begun = True
            before_exit(self.close)

    def _check_not_complete(self, done: int) -> None:
        if self._total is not None and done >= self._total:
            raise RunCompleteError(
                f"total_train_steps={self._total} is not above the {done} steps that are done. Use the checkpoint as it "
                "is, or raise total_train_steps."
            )


class _Current:
    """The run of this process."""

    run: _Run | None = None


def is_open() -> bool:
    """Whether the script has called `init` with a run URL: it then cares for its checkpoints itself."""
    return _Current.run is not None and _Current.run.is_remote


def _opened(function: str) -> _Run:
    if _Current.run is None:
        raise ConfigurationError(f"Call hf_cloudtrain.init(total_train_steps=…) before {function}().")
    return _Current.run


def _checked_total(total: Any, *, is_local: bool) -> int | None:
    if total is None or (is_local and total == -1):
        return None
    try:
        number = operator.index(total)
    except TypeError:
        number = 0
    if number < 1 or isinstance(total, bool):
        raise ConfigurationError(
            f"total_train_steps={total!r} must be a positive integer, or None if unknown. (Trainer's max_steps is -1 unless "
            "it is set.)"
        )
    return number


def _restored_by_launcher() -> CheckpointKey | None:
    text = env.restored_checkpoint()
    if text is None:
        return None
    key = CheckpointKey.named(text)
    if key is None:
        raise ConfigurationError(
            f"{env.RESTORED_CHECKPOINT}={text!r} is not a checkpoint key, such as 000003-0000000500."
        )
    return key
