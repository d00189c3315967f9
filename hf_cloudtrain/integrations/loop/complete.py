"""A run that `TrainLoop.stop(complete=True)` ended: the next attempt trains nothing, unless more epochs are planned."""

from __future__ import annotations

import logging

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.completion import HOW_TO_TRAIN_ON, Completion
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle

logger = logging.getLogger(__name__)


def is_complete(lifecycle: AttemptLifecycle, epoch: int, num_epochs: int) -> bool:
    """Whether nothing is left to train: all epochs are done, or an attempt ended the run and no more are planned. On all ranks."""
    checkpointer, restored = lifecycle.checkpointer, lifecycle.restored
    ranks, storage = checkpointer.ranks, checkpointer.storage
    if epoch >= num_epochs:
        if ranks.is_main:
            logger.warning("The run is complete: %d of %d epochs. Nothing is trained.", epoch, num_epochs)
        return True
    if restored is None:
        return False
    found = ranks.agree(lambda: Completion.of(storage, restored), "read whether the run is complete")
    if found is None or not found.holds_for({"num_epochs": num_epochs}):
        return False
    if ranks.is_main:
        text = "The run is complete: stop(complete=True) ended it at step %d. Nothing is trained. %s"
        logger.warning(text, found.global_step, HOW_TO_TRAIN_ON)
    return True


def end_run(checkpointer: Checkpointer, step: int, num_epochs: int) -> None:
    """Record that the run is over after a step, although more epochs were planned. On all ranks."""
    attempt = checkpointer.attempt
    assert attempt is not None
    found = Completion(attempt.number, step, {"num_epochs": num_epochs})
    checkpointer.ranks.agree(lambda: found.write(checkpointer.storage), "record that the run is complete")
