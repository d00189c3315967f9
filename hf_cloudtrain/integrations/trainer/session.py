"""What the callbacks of one run share: one lifecycle, what was restored, and what the training does at this step."""

from __future__ import annotations

import os
import re
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle
from hf_cloudtrain.integrations.trainer import topology
from hf_cloudtrain.integrations.trainer.checks import (
    check_all_processes_train_together,
    check_no_jit_checkpoint,
)
from hf_cloudtrain.integrations.trainer.position import EpochLength
from hf_cloudtrain.integrations.trainer.state import RestoredState
from hf_cloudtrain.preemption.preemption import Preemption
from hf_cloudtrain.resume.topology import Conversion
from hf_cloudtrain.storage.urls import normal_url

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments


@dataclass(frozen=True)
class LastSave:
    """The emergency save, which is the last thing that a training does."""

    is_here: bool
    """Whether it saves at this step, rather than after the evaluation at the end of the epoch."""
    inexact_reason: str | None = None
    """Why a resume from that save cannot equal an uninterrupted run, if so."""


class Session:
    """The session of one run in this process; `of` finds it. Callbacks that name the same URL are one attempt.

    Example:
        >>> Session.of("s3://bucket/runs/mrpc", None, fresh=False).restore(args)
    """

    _sessions: ClassVar[weakref.WeakValueDictionary[tuple[str, int], Session]] = weakref.WeakValueDictionary()

    def __init__(self, run_url: str, storage_options: dict[str, Any] | None, *, fresh: bool) -> None:
        self.run_url = run_url
        self._options: dict[str, Any] = {"storage_options": storage_options, "fresh": fresh}
        self._policy = Policy()
        self.listens = False
        """Whether a callback of this session waits for notices."""
        self.last_save: LastSave | None = None
        """The emergency save, once it is decided (`leave`)."""
        self._uploads = False
        self._lifecycle: AttemptLifecycle | None = None
        self._restored: tuple[Manifest, Conversion | None] | None = None
        self._begun: TrainerState | None = None
        self._ended = False

    @classmethod
    def of(
        cls,
        run_url: str | os.PathLike[str] | None,
        storage_options: dict[str, Any] | None,
        *,
        fresh: bool,
        policy: Policy | None = None,
        listens: bool = False,
    ) -> Session:
        """The session of a run in this process, with what one more callback adds to it.

        Args:
            policy: what stays on storage.
            listens: whether the callback waits for notices.
        """
        url = normal_url(env.run_url(run_url))
        key = (url, os.getpid())
        session = cls._sessions.get(key)
        if session is None or session._ended or session._options["fresh"] != fresh:
            session = cls._sessions[key] = cls(url, storage_options, fresh=fresh)
        session._policy = policy or session._policy
        session.listens |= listens
        return session

    @property
    def lifecycle(self) -> AttemptLifecycle:
        """The lifecycle that `open` made."""
        if self._lifecycle is None:
            raise ConfigurationError(
                "Nothing was trained or restored yet: call restore(args) or trainer.train() first."
            )
        return self._lifecycle

    @property
    def checkpointer(self) -> Checkpointer:
        """Of the lifecycle."""
        return self.lifecycle.checkpointer

    @property
    def is_leaving(self) -> bool:
        """Whether the training was cut short: the emergency callback waits for the uploads within the time there is."""
        return self._lifecycle is not None and self._lifecycle.is_leaving

    @property
    def preemption(self) -> Preemption | None:
        """What waits for notices while it trains; None before and after, and where no callback of this session waits for them."""
        return None if self._lifecycle is None else self._lifecycle.preemption

    def open(self, args: TrainingArguments) -> AttemptLifecycle:
        """The lifecycle for the output folder, once the process group exists: TrainingArguments creates it."""
        _ = args.device  # creates the process group
        check_all_processes_train_together(args)
        output_dir = Path(str(args.output_dir)).absolute()
        if self._lifecycle is None or self._lifecycle.checkpointer.output_dir != output_dir:
            self._lifecycle = AttemptLifecycle.of(self.run_url, output_dir, **self._options)
        self._lifecycle.checkpointer.policy = self._policy
        return self._lifecycle

    def restore(self, args: TrainingArguments) -> Path | None:
        """Put the newest whole checkpoint into the output folder, as Trainer needs it; None on the first start."""
        lifecycle = self.open(args)
        ranks = lifecycle.checkpointer.ranks
        found = lifecycle.restore(
            _needed_by(ranks.neighbours), lambda manifest: topology.plan(args, manifest)
        )
        if found is None:
            self._restored = None
            return None
        restored, conversion = found
        self._restored = restored.manifest, conversion
        state = RestoredState(lifecycle, restored, conversion)
        if conversion is None:
            state.localize(needs_best=args.load_best_model_at_end)
        else:
            state.localize(
                needs_best=args.load_best_model_at_end,
                adjust=lambda record: topology.convert_state(record, conversion, args),
            )
            topology.repair(restored, conversion, args, ranks)
        return restored.path

    def check_resumed(
        self, args: TrainingArguments, state: TrainerState, epoch: EpochLength, live: dict[str, Any]
    ) -> None:
        """Compare the position that was restored with the live data, and move the live schedule to it.

        Args:
            live: what Trainer passes to callbacks.
        """
        manifest, conversion = self._restored or (None, None)
        if manifest is None or state.global_step != (conversion or manifest.position).global_step:
            # Resumed from a path that the user chose, if at all.
            found = self.checkpointer.restorer.saved_at(state.global_step) if state.global_step else None
            if found is not None:
                topology.check_converted(found, args)
            return
        topology.check(manifest, args, state, epoch)
        if conversion is not None:
            topology.move_schedule(conversion, state, live)

    def begin(
        self, args: TrainingArguments, state: TrainerState, *, uploads: bool = False
    ) -> AttemptLifecycle:
        """Start an attempt, for the first callback that calls it. Each TrainerState is one start: `auto_find_batch_size` creates a new one.

        Args:
            uploads: whether the callback uploads checkpoints.
        """
        self._uploads |= uploads
        lifecycle = self.open(args)
        if self._begun is not state:
            if self.listens:
                check_no_jit_checkpoint(args)
            interrupted = self._begun is not None and not self._ended and not lifecycle.is_leaving
            lifecycle.begin(
                state.global_step,
                started_over=interrupted and args.auto_find_batch_size,
                check_notices=self.listens,
                interrupted="failed",
            )
            self._begun, self._ended = state, False
            self.last_save = None
        return lifecycle

    def leave(self, last_save: LastSave) -> None:
        """Note that the training is cut short by an emergency save."""
        self.last_save, self.lifecycle.is_leaving = last_save, True

    def end(self) -> None:
        """Wait for the uploads, once, and record the end; not where the emergency callback does."""
        if not self._ended and not self.is_leaving:
            self._ended = True
            self.lifecycle.finish(uploads=self._uploads)


def _needed_by(ranks: list[int]) -> Any:
    """Everything but the random states of ranks on other disks."""

    def wanted(path: str) -> bool:
        match = re.fullmatch(r"rng_state_(\d+)\.pth", path)
        return match is None or int(match[1]) in ranks

    return wanted
