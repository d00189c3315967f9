"""What is checked at both ends of an attempt.

start    the checkpoint that it resumes from; a start at step 0 on a run that has checkpoints is refused (law 9)
end      a training that ends without an error has its last checkpoint on storage (law 5)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.local_folders import LocalFolders
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.errors import NotCommittedError, RunHasCheckpointsError
from hf_cloudtrain.runtime.provenance import facts
from hf_cloudtrain.runtime.redaction import redact
from hf_cloudtrain.runtime.threads import answer_in_time

logger = logging.getLogger(__name__)

LATE = 0.5
"""Seconds that a bounded wait may take longer: for an answer that arrived in the last moment."""


@dataclass(frozen=True)
class Advice:
    """What errors tell the user to do, in terms of the API that the user calls."""

    resume: str
    save: str


TRAINER_ADVICE = Advice(
    resume=(
        "Continue it with `trainer.train(resume_from_checkpoint=cloud.restore(args))`, or start over with "
        "`CloudTrainCallback(url, fresh=True)` or another URL."
    ),
    save="Set save_strategy and save_steps so that it saves.",
)


class AttemptChecks:
    """The checks of one process, made by rank 0.

    Args:
        local: knows the steps of restored checkpoints under the new settings.
        fresh: whether the user wants to start at step 0 although the run has checkpoints.
    """

    def __init__(self, catalog: Catalog, local: LocalFolders, advice: Advice, *, fresh: bool) -> None:
        self.fresh = fresh
        self.restored: CheckpointKey | None = None
        """What this process, or its launcher, has restored."""
        self._catalog = catalog
        self._local = local
        self._advice = advice

    def take_attempt(self, global_step: int, *, started_over: bool) -> Attempt:
        """Take the next attempt number for a training that begins after `global_step`.

        Args:
            started_over: the framework starts over by itself.

        Raises:
            RunHasCheckpointsError: training starts at step 0 on a run that has checkpoints.
        """
        storage = self._catalog.storage
        if storage.exclusive is None:
            storage.check()
        if storage.exclusive is False and not started_over:
            logger.warning(
                "%r does not honour exclusive create, so two processes that train this run at once are told apart only "
                "by best effort. Checkpoints stay safe: each attempt writes its own folders.",
                storage.url,
            )
        resumed_from = self.restored
        if resumed_from is None or self._local.number_of(resumed_from) != global_step:
            resumed_from = self._checkpoint_at(global_step, from_zero=self.fresh or started_over)
        group = env.experiment()
        known = {**facts(), "output_dir": redact(str(self._local.output_dir))}
        if group is not None:
            known["experiment"] = redact(group)
        return self._catalog.attempts.begin(time.time(), global_step, resumed_from, known)

    def check_stored(self, saved: CheckpointKey | None, save_error: Exception | None) -> None:
        """Raise NotCommittedError unless the last checkpoint is on storage.

        Args:
            save_error: why the last save failed, if it did.
        """
        url = self._catalog.storage.url
        last = saved or self.restored
        if last is None:
            raise NotCommittedError(
                f"Training ended without saving any checkpoint, so {url!r} holds nothing of it. {self._advice.save}"
            )
        if last not in self._catalog.checkpoints() and not self._catalog.holds(last):
            reason = f" {save_error}" if save_error else ""
            raise NotCommittedError(f"The last checkpoint, {last}, is not on {url!r}.{reason}")

    def _checkpoint_at(self, global_step: int, *, from_zero: bool) -> CheckpointKey | None:
        keys = self._catalog.known_checkpoints()
        url = self._catalog.storage.url
        if global_step == 0 and keys and not from_zero:
            raise RunHasCheckpointsError(
                f"The run {url!r} has {len(keys)} checkpoints, the newest at step {keys[-1].step}, but training starts at "
                f"step 0. {self._advice.resume}"
            )
        at_step = [key for key in keys if key.step == global_step]
        if global_step and keys and (not at_step or at_step[-1] != keys[-1]):
            logger.warning(
                "Training resumes at step %d, but the newest checkpoint of %r is %s. Use restore() to resume from that.",
                global_step,
                url,
                keys[-1].title,
            )
        return at_step[-1] if at_step else None


def bounded(work: Callable[[], None], seconds: float, url: str, output_dir: Path) -> Callable[[], None]:
    """`work` that gives up the requests under way after some seconds, counted from now; raises NotCommittedError then."""
    deadline = time.monotonic() + seconds + LATE

    def call() -> None:
        try:
            answer_in_time(work, lambda: time.monotonic() > deadline)
        except TimeoutError:
            raise NotCommittedError(
                f"The storage {url!r} does not answer whether the last checkpoint is there. What is not there is kept on "
                f"this machine; finish with `cloudtrain checkpoint flush {output_dir}`."
            ) from None

    return call
