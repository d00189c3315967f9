"""The messages of a training, on stderr: its first line, its last one, and warnings.

Python alone would show warnings and nothing below. Where the user has configured logging, the user's handlers show the
messages, and ours is silent, so that no line comes twice.
"""

from __future__ import annotations

import logging
import sys

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.runtime.ranks import rank_and_size
from hf_cloudtrain.runtime.threads import at_exit
from hf_cloudtrain.storage.urls import shown_url

logger = logging.getLogger(__name__)
_root = logging.getLogger("hf_cloudtrain")


class _Stderr(logging.Handler):
    """Shows what no handler of the user shows; above the bars of tqdm, not within them."""

    chosen = logging.NOTSET
    """The level that we gave the logger; a user who sets a different one is right."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers or any(other is not self for other in _root.handlers):
            return
        try:
            text = f"[hf_cloudtrain] {self.format(record)}"
            tqdm = sys.modules.get("tqdm")
            if tqdm is None:
                sys.stderr.write(f"{text}\n")
            else:
                tqdm.tqdm.write(text, file=sys.stderr)
        except Exception:  # noqa: BLE001 - as any handler: a closed stderr must not end a training
            self.handleError(record)


_handler = _Stderr()


def show_messages() -> None:
    """Show the messages from now on; called where a training is set up and where it begins, as verbosity may change."""
    if _handler not in _root.handlers:
        _root.addHandler(_handler)
    if _root.level in (logging.NOTSET, _handler.chosen):
        _handler.chosen = env.log_level() or _level_of_transformers()
        _root.setLevel(_handler.chosen)


def first_line(
    checkpointer: Checkpointer, *, step: int, total: int | None, restored: Manifest | None, saves: str
) -> None:
    """Log what an attempt begins with, on rank 0.

    Args:
        saves: how often it saves, as in "saves every 100 steps".
    """
    attempt = checkpointer.attempt
    if attempt is None or not checkpointer.ranks.is_main:
        return
    where = f"step {step}" if total is None else f"step {step} of {total}"
    key = None if restored is None else CheckpointKey(restored.attempt, restored.step)
    if restored is not None and key is not None and checkpointer.local.number_of(key) == step:
        what = f"resumes from {restored.folder} (attempt {restored.attempt}, exact: {restored.exactness.answer}) at {where}"
    elif step:
        what = f"resumes at {where}, from a checkpoint that restore() did not choose"
    elif attempt.number == 1:
        what = f"starts at {where}, because the run is new"
    else:
        what = f"starts at {where}, with nothing restored"
    then = saves if total is None or step < total else "nothing is left to train"
    logger.info(
        "Run %s, attempt %d: %s; %s.", shown_url(checkpointer.storage.url), attempt.number, what, then
    )


def last_line(checkpointer: Checkpointer) -> None:
    """Log what is on storage when training has ended well, and where to look, on rank 0."""
    if not checkpointer.ranks.is_main or not _root.isEnabledFor(logging.INFO):
        return
    url = shown_url(checkpointer.storage.url)
    try:
        keys = checkpointer.catalog.checkpoints()
    except CloudTrainError:  # everything is committed, so nothing depends on this answer
        return
    found = (
        "no checkpoint is committed"
        if not keys
        else f"{_count(keys)} committed, the newest at step {keys[-1].step}"
    )
    logger.info("Run %s: %s. Look at it with `cloudtrain run status %s`.", url, found, url)


_unused: dict[str, str] = {}
"""What was created for a run and not used yet: what to do, by run URL."""


def expect_use(run_url: str, advice: str) -> None:
    """Show messages, and warn when the process ends if nothing has been restored or trained for this run by then.

    Args:
        advice: what was created, and what to do with it.
    """
    show_messages()
    if not _unused:
        at_exit(_tell_unused)
    _unused[shown_url(run_url)] = advice


def used(run_url: str) -> None:
    """Note that something is restored or trained for this run."""
    _unused.pop(shown_url(run_url), None)


def _tell_unused() -> None:
    if getattr(sys, "last_value", None) is not None or rank_and_size()[0] != 0:
        return  # an error has ended the script, and is shown
    while _unused:
        url, advice = _unused.popitem()
        logger.warning("Nothing was trained for the run %s, so nothing was uploaded. %s", url, advice)


def _count(keys: list[CheckpointKey]) -> str:
    return "1 checkpoint is" if len(keys) == 1 else f"{len(keys)} checkpoints are"


def _level_of_transformers() -> int:
    """INFO, unless transformers was told to be quieter than usual, or to say everything."""
    module = sys.modules.get("transformers.utils.logging")
    level = logging.WARNING if module is None else int(module.get_verbosity())
    return logging.INFO if level == logging.WARNING else level
