"""Attempts in which something goes wrong. Each ends in `_attempts.train`, and takes its arguments."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import Trainer, TrainingArguments, set_seed

from hf_cloudtrain import CloudTrainCallback
from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.upload_queue import UploadQueue
from hf_cloudtrain.integrations.trainer.evidence import EvidenceCallback
from hf_cloudtrain.runtime import patience
from hf_cloudtrain.storage import retries
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.names import LOCAL
from hf_cloudtrain.testing import FaultyDisk, FaultyStorage
from tests.faults.small_disk import fill, make_read_only, mount_small_disk
from tests.integration._attempts import (
    ARGUMENTS,
    CallAt,
    Sentences,
    committed_step,
    make_model,
    train,
    wait_until,
)


def slow_upload(until: int | None, run_url: str, **arguments: Any) -> Any:
    """No file of a checkpoint arrives before a step, or before the process waits for it, or ever (-1)."""
    gate = threading.Event()
    plain_wait = UploadQueue.wait

    def wait(self: UploadQueue, *arguments: Any, **options: Any) -> None:
        if until != -1:
            gate.set()
        plain_wait(self, *arguments, **options)

    UploadQueue.wait = wait  # type: ignore[method-assign]
    script = FaultyStorage(run_url)
    script.hold("upload", gate, path="checkpoint-*")
    callbacks = [CallAt(until, gate.set)] if until else []
    with script.everywhere():
        # Only `everywhere` ends here: the uploads under way wait for the gate.
        return train(run_url=run_url, callbacks=callbacks, **arguments)


def outage(first: int, last: int | None, run_url: str, **arguments: Any) -> Any:
    """Every request fails from one step until another, or for good."""
    retries.PAUSES = (0.01, 0.01)
    upload_queue.PAUSES = (0.01,)
    script = FaultyStorage(run_url)
    callbacks = [CallAt(first, lambda: script.fail("any", times=10**9))]
    if last is not None:
        callbacks.append(CallAt(last, lambda: (script.heal(), None)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(script.everywhere())
        try:
            value = train(run_url=run_url, callbacks=callbacks, **arguments)
        except SystemExit:
            stack.pop_all()  # the outage lasts to the end of the process
            raise
    assert any(call.path.startswith("checkpoint-") for call in script.calls)
    return value


def zombie(at: int, run_url: str, **arguments: Any) -> Any:
    """Sleeps after a step until a newer attempt has begun."""
    catalog = Catalog(Storage(run_url))
    callbacks = [CallAt(at, lambda: wait_until(lambda: catalog.attempts.overtaken_by(1) is not None))]
    return train(run_url=run_url, callbacks=callbacks, **arguments)


def ctrl_c(where: str, **arguments: Any) -> Any:
    """Ctrl-C while a checkpoint is restored (`restore`), or when the attempt has just begun (`begin`)."""
    thing, name = {"restore": (Storage, "download"), "begin": (EvidenceCallback, "gather")}[where]
    plain = getattr(thing, name)

    def interrupted(*given: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*given, **options)

    with mock.patch.object(thing, name, interrupted):
        return train(**arguments)


def out_of_memory(at: int, **arguments: Any) -> Any:
    """The n-th step runs out of memory, unless its batch has 2 samples or fewer."""
    calls = 0

    def prepare(trainer: Trainer) -> None:
        step = trainer.training_step

        def training_step(model: Any, inputs: Any, *rest: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return step(model, inputs, *rest)

        trainer.training_step = training_step

    return train(prepare=prepare, auto_find_batch_size=True, **arguments)


def search(**arguments: Any) -> Any:
    """A trial of a hyperparameter search."""

    def prepare(trainer: Trainer) -> None:
        plain = trainer.train
        trainer.train = lambda **given: plain(trial=object(), **given)

    # As if by optuna or another of the packages that search.
    with mock.patch("transformers.integrations.hp_params", return_value={"learning_rate": 1e-3}):
        return train(prepare=prepare, **arguments)


def trains_again(**arguments: Any) -> Any:
    """The same Trainer object trains a second time, from step 0."""

    def prepare(trainer: Trainer) -> None:
        plain = trainer.train

        def twice(**given: Any) -> Any:
            plain(**given)
            return plain()

        trainer.train = twice

    return train(prepare=prepare, **arguments)


def notebook(first: dict[str, Any], second: dict[str, Any], **arguments: Any) -> Any:
    """A cell that fails, and another in the same process; the notebook keeps the traceback and all it refers to."""
    kept = None
    try:
        train(**{**arguments, **first})
    except ZeroDivisionError as error:
        kept = error
    value = train(**{**arguments, **second})
    return {**value, "first": repr(kept)}


def restores_only(output_dir: str, run_url: str, **_: Any) -> Any:
    """`restore` before there is a Trainer."""
    cloud = CloudTrainCallback(run_url)
    return cloud.restore(TrainingArguments(output_dir=output_dir, **ARGUMENTS))


def saves_model(output_dir: str, run_url: str, times: int, **arguments: Any) -> Any:
    """Trains, then commits the final model under a name."""
    urls: list[str] = []

    def prepare(trainer: Trainer) -> None:
        plain = trainer.train
        (cloud,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, CloudTrainCallback))

        def train_and_save(**given: Any) -> Any:
            answer = plain(**given)
            trainer.save_model(f"{output_dir}/final-model")
            urls.extend(cloud.save(f"{output_dir}/final-model", name="final") for _ in range(times))
            return answer

        trainer.train = train_and_save

    value = train(output_dir=output_dir, run_url=run_url, prepare=prepare, **arguments)
    return {**value, "urls": urls}


def calls(run_url: str, **arguments: Any) -> dict[str, int]:
    """The requests that this process made, by kind."""
    script = FaultyStorage(run_url)
    with script.everywhere():
        train(run_url=run_url, **arguments)
    return dict(Counter(call.kind for call in script.calls))


def no_room_for_a_snapshot(output_dir: str, **arguments: Any) -> Any:
    """The disk takes what Trainer writes, but not the first copy of it."""
    with FaultyDisk(Path(output_dir, LOCAL, "outbox"), times=1) as disk:
        value = train(output_dir=output_dir, **arguments)
    assert disk.refused == 1
    return value


def bad_disk(trouble: str, at: int, committed: int, output_dir: str, run_url: str, **arguments: Any) -> Any:
    """A disk of 8 MiB, which is full or read-only after a step, once a checkpoint is on storage."""
    disk = Path(output_dir)
    mount_small_disk(disk, 2**23)

    def now() -> None:
        wait_until(lambda: committed_step(run_url) >= committed)
        if trouble == "full":
            fill(disk)
        else:
            wait_until(lambda: _done(lambda: make_read_only(disk)))  # busy while a file is open for writing

    return train(output_dir=output_dir, run_url=run_url, callbacks=[CallAt(at, now)], **arguments)


def _done(call: Callable[[], None]) -> bool:
    try:
        call()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def forgets_the_callback(
    output_dir: str, run_url: str, *, parts: str = "restore", **arguments: Any
) -> dict[str, Any]:
    """The callback is created, and perhaps restores; Trainer does not get it.

    Args:
        parts: `restore`: it restores for these arguments. `never`: it is not used. `elsewhere`: it restores, and something else is
            trained.
    """
    set_seed(0)
    args = TrainingArguments(
        output_dir=output_dir,
        **{
            **ARGUMENTS,
            **{name: value for name, value in arguments.items() if name not in ("result", "seen")},
        },
    )
    cloud = CloudTrainCallback(run_url)
    checkpoint = None if parts == "never" else cloud.restore(args)
    model = make_model()
    if parts == "elsewhere":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.step()
        args = TrainingArguments(output_dir=f"{output_dir}-other", **ARGUMENTS)
    Trainer(model=model, args=args, train_dataset=Sentences()).train(resume_from_checkpoint=checkpoint)
    return {}


def with_logging(level: str, **arguments: Any) -> Any:
    """The script has configured logging itself."""
    logging.basicConfig(format="mine %(levelname)s %(message)s", level=level)
    return train(**arguments)


def slow_check(**arguments: Any) -> Any:
    """The first look at the storage takes longer than a user waits without a word."""
    patience.PATIENCE = 0.05
    plain_check = Storage.check

    def check(self: Storage) -> None:
        wait_until(lambda: "cloudtrain-patience" not in {thread.name for thread in threading.enumerate()})
        plain_check(self)

    with mock.patch.object(Storage, "check", check):
        return train(**arguments)


def verbosity(**arguments: Any) -> Any:
    """`TRANSFORMERS_VERBOSITY` counts when transformers is imported, which was before the fork."""
    if name := os.environ.get("TRANSFORMERS_VERBOSITY"):
        transformers.logging.set_verbosity(getattr(logging, name.upper()))
    return train(**arguments)
