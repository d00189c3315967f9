"""The start of an attempt: which checkpoint it resumes from, and which starts are refused (law 9)."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.errors import RunHasCheckpointsError
from hf_cloudtrain.runtime.provenance import facts

logger = logging.getLogger(__name__)


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


def take_attempt(
    catalog: Catalog,
    global_step: int,
    restored: CheckpointKey | None,
    *,
    fresh: bool,
    started_over: bool,
    advice: Advice,
) -> Attempt:
    """Take the next attempt number for a training that begins after `global_step`.

    Args:
        restored: the checkpoint of that step that was restored, if one was.
        fresh: the user wants to start at step 0 although the run has checkpoints.
        started_over: the framework starts over by itself.

    Raises:
        RunHasCheckpointsError: training starts at step 0 on a run that has checkpoints.
    """
    storage = catalog.storage
    if storage.exclusive is None:
        storage.check()
    if storage.exclusive is False and not started_over:
        logger.warning(
            "%r does not honour exclusive create, so two processes that train this run at once are told apart only "
            "by best effort. Checkpoints stay safe: each attempt writes its own folders.",
            storage.url,
        )
    if restored is None:
        restored = _checkpoint_at(catalog, global_step, fresh or started_over, advice)
    return catalog.attempts.begin(time.time(), global_step, restored, facts())


def _checkpoint_at(
    catalog: Catalog, global_step: int, from_zero: bool, advice: Advice
) -> CheckpointKey | None:
    keys = catalog.known_checkpoints()
    url = catalog.storage.url
    if global_step == 0 and keys and not from_zero:
        raise RunHasCheckpointsError(
            f"The run {url!r} has {len(keys)} checkpoints, the newest at step {keys[-1].step}, but training starts at "
            f"step 0. {advice.resume}"
        )
    at_step = [key for key in keys if key.step == global_step]
    if global_step and keys and (not at_step or at_step[-1] != keys[-1]):
        logger.warning(
            "Training resumes at step %d, but the newest checkpoint of %r is %s. Use restore() to resume from that.",
            global_step,
            url,
            keys[-1],
        )
    return at_step[-1] if at_step else None
