"""`Trainer.train` below `cloudtrain launch`: the callback joins, and training resumes from what it restores.

Joined     at the beginning of `train()`, after all callbacks that the script and its libraries have added; it leaves at the end
Left alone a Trainer that never saves, that has a callback of this package, or that searches hyperparameters
Resumed    from the newest checkpoint of the run where the script names none, or names "the newest of this output folder" (True,
           or what `get_last_checkpoint` finds): that folder is on one disk, which may be behind the run, and its newest
           checkpoint may be half-written. A different checkpoint that the script names is used as it is
Limited    by the `save_total_limit` of the script, on storage as on its disk: it has no other line to say it in
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar

from hf_cloudtrain import env
from hf_cloudtrain.integrations.messages import show_messages
from hf_cloudtrain.integrations.trainer.checks import check_all_processes_train_together
from hf_cloudtrain.integrations.trainer.cloud_callback import CloudTrainCallback
from hf_cloudtrain.integrations.trainer.state import TRAINER_STATE
from hf_cloudtrain.launch.notes import note
from hf_cloudtrain.launch.numbering import Numbers
from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.runtime.tracebacks import short_traceback
from hf_cloudtrain.storage.urls import shown_url

logger = logging.getLogger(__name__)


class HookedTraining:
    """One call of `Trainer.train`. A context manager around it.

    Example:
        >>> with HookedTraining.of(trainer) as training:
        ...     trainer.train(training.checkpoint(None))
    """

    _under_way: ClassVar[list[Any]] = []
    """The Trainers whose `train` is running: a subclass may call that of its parent."""

    def __init__(self, trainer: Any, numbers: Numbers) -> None:
        check_all_processes_train_together(trainer.args)
        self._trainer = trainer
        self._numbers = numbers
        self._ranks, folder = Ranks.current(), os.path.abspath(str(trainer.args.output_dir))
        found = self._ranks.agree(lambda: numbers.begin(folder), "find the run of this training")
        self._training = numbers.began(found)
        self._url = numbers.url_of(self._training.number)
        self._limit = trainer.args.save_total_limit if (trainer.args.save_total_limit or 0) > 0 else None
        self._cloud = CloudTrainCallback(self._url, save_total_limit=self._limit)

    @classmethod
    @short_traceback
    def of(cls, trainer: Any, *, trial: Any = None) -> HookedTraining | None:
        """The hook of a `train()` that begins now; None where it is left alone."""
        if any(trainer is one for one in cls._under_way):
            return None
        run_url = env.run_url_or_none(None)
        reason = "there is no run URL" if run_url is None else why_left_alone(trainer, trial)
        if run_url is None or reason is not None:
            show_messages()
            note("left-alone", f"{type(trainer).__name__}: {reason}")
            if trainer.is_world_process_zero():
                logger.warning("`cloudtrain launch` leaves %s alone: %s.", type(trainer).__name__, reason)
            return None
        return cls(trainer, Numbers.of_this_process(run_url))

    @short_traceback
    def checkpoint(self, given: Any) -> Any:
        """What to resume from. On all ranks, which may be on hosts with different disks.

        Args:
            given: what the script passes as `resume_from_checkpoint`.
        """
        self._tell_joined()
        args = self._trainer.args
        # Only events after `__init__` reach the callback; this one tells it which model is trained.
        self._cloud.on_init_end(args, self._trainer.state, self._trainer.control)
        newest = newest_in(str(args.output_dir))
        path = os.path.realpath(str(given)) if given and given is not True else None
        if any(self._ranks.each(lambda: path not in (None, newest), "look at resume_from_checkpoint")):
            self._warn("The script names the checkpoint %r, so training resumes from it.", str(given))
            return given
        restored = self._cloud.restore(args)
        if restored is not None:
            if path not in (None, os.path.realpath(restored)):
                self._warn(
                    "The script names %r, the newest checkpoint in its output folder; the run has a different one, from "
                    "which training resumes: %r.",
                    str(given),
                    restored,
                )
            return restored
        if given and newest is not None:
            unfinished = any(self._ranks.each(lambda: not _is_finished(newest), f"read {newest!r}"))
            if unfinished:
                self._warn(
                    "%r is not whole, as a kill leaves it, and the run has no checkpoint; starting at step 0.",
                    newest,
                )
                return None
        return given

    def __enter__(self) -> HookedTraining:  # noqa: PYI034 - typing.Self needs Python 3.11
        self._under_way.append(self._trainer)
        self._trainer.add_callback(self._cloud)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._under_way.remove(self._trainer)
        self._trainer.remove_callback(self._cloud)
        self._training.is_over = kind is None

    def _warn(self, text: str, *values: str) -> None:
        if self._ranks.is_main:
            logger.warning(text, *values)

    def _tell_joined(self) -> None:
        self._numbers.tell(self._training)
        if not self._ranks.is_main:
            return
        number = self._training.number
        logger.info(
            "`cloudtrain launch` has hooked the train() of %s%s: its checkpoints go to %s%s.",
            type(self._trainer).__name__,
            "" if number == 1 else f", training {number} of this launch",
            shown_url(self._url),
            "" if self._limit is None else f", where save_total_limit={self._limit} holds, too",
        )


def why_left_alone(trainer: Any, trial: Any) -> str | None:
    """Why a Trainer is not hooked, as the end of a sentence; None if it is."""
    from transformers.trainer_utils import SaveStrategy

    if trial is not None:
        return "it searches hyperparameters, and each trial would need a run of its own"
    if trainer.args.save_strategy == SaveStrategy.NO:
        return "its save_strategy is 'no', so there is no checkpoint to upload"
    ours = [one for one in trainer.callback_handler.callbacks if _is_ours(one)]
    if ours:
        return f"the script uses {type(ours[0]).__name__} itself"
    functions = sys.modules.get("hf_cloudtrain.integrations.functions.api")
    if functions is not None and functions.is_open():
        return "the script calls hf_cloudtrain.init() itself"
    return None


def newest_in(folder: str) -> str | None:
    """The checkpoint that a script finds in an output folder, absolute and without symbolic links, which scripts resolve or not."""
    from transformers import trainer_utils

    find: Callable[[str], str | None] = trainer_utils.get_last_checkpoint
    newest = find(folder) if os.path.isdir(folder) else None
    return None if newest is None else os.path.realpath(newest)


def _is_finished(checkpoint: str) -> bool:
    """Whether Trainer has written a checkpoint to its end."""
    try:
        with open(os.path.join(checkpoint, TRAINER_STATE)) as file:  # the last file of a save
            return isinstance(json.load(file), dict)
    except (OSError, ValueError):
        return False


def _is_ours(callback: Any) -> bool:
    return any(one.__module__.startswith("hf_cloudtrain.integrations.") for one in type(callback).__mro__)
