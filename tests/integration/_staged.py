"""Trainings whose saves are all staged, and troubles of a staged save. Runs in processes of the zygote."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hf_cloudtrain.checkpoints.local_home import own_writers
from hf_cloudtrain.staging import process, recorders, saves
from tests.integration._attempts import CallAt, FailAt, HoldAt, SignalAt, StopAt, train

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

WRITER = "writer"


def staged_train(output_dir: str, *, trouble: str = "", ends: str = "", **arguments: Any) -> dict[str, Any]:
    """`_attempts.train` with every save staged.

    Args:
        trouble: one of the functions below, without its `on_`; changes the arguments.
        ends: what the script does behind the training.
    """
    recorders.SMALL_FILE = 0
    os.environ["HF_CLOUDTRAIN_ASYNC_SAVE"] = "1"
    count = count_saves()
    if trouble:
        arguments = {**arguments, **TROUBLES[trouble](output_dir, arguments)}
    found = train(output_dir, **arguments)
    if ends == "no process group" and dist.is_initialized():
        dist.destroy_process_group()
    return {**found, "staged": len(count)}


def count_saves() -> list[str]:
    found: list[str] = []
    take = saves.AsyncSaves.take

    def counted(self: saves.AsyncSaves, folder: Path, *rest: Any) -> bool:
        taken = take(self, folder, *rest)
        if taken:
            found.append(folder.name)
        return taken

    saves.AsyncSaves.take = counted  # type: ignore[method-assign]
    return found


def the_writer() -> int:
    (found,) = own_writers.values()
    assert isinstance(found, saves.AsyncSaves)
    return found.writer_pid or 0


def callbacks(*made: TrainerCallback) -> dict[str, Any]:
    return {"callbacks": list(made)}


def hold(output_dir: str, _: dict[str, Any]) -> dict[str, Any]:
    """Step 4 is handed over to a writer that stands still, and the training waits to be killed."""

    def stop_writer() -> None:
        os.kill(the_writer(), signal.SIGSTOP)
        Path(output_dir, WRITER).write_text(str(the_writer()))

    return callbacks(CallAt(3, stop_writer), CallAt(5, Path(output_dir, "held").touch), HoldAt(5))


def user_saves(output_dir: str, _: dict[str, Any]) -> dict[str, Any]:
    """The model of the user writes a file of its own while it is saved, and one in the checkpoint; a thread saves, too."""
    own = Path(output_dir).with_name("own.pt")

    def prepare(trainer: Trainer) -> None:
        save = trainer.model.save_pretrained

        def save_more(folder: str, **options: Any) -> None:
            torch.save({"a": torch.ones(3)}, own)
            assert torch.load(own)["a"].sum() == 3
            thread = threading.Thread(target=torch.save, args=([1], Path(folder, "of-a-thread.pt")))
            thread.start()
            thread.join()
            save(folder, **options)
            torch.save({"b": torch.ones(3)}, Path(folder, "extra.pt"))

        trainer.model.save_pretrained = save_more

    return {"prepare": prepare}


def fails_in_a_save(_: str, __: dict[str, Any]) -> dict[str, Any]:
    """An exception after model and optimizer of step 8 were staged."""

    def prepare(trainer: Trainer) -> None:
        save = trainer._save_rng_state

        def fail(folder: str) -> None:
            if folder.endswith("checkpoint-8"):
                raise ZeroDivisionError("a bug in a save")
            save(folder)

        trainer._save_rng_state = fail

    return {"prepare": prepare}


def little_memory(_: str, __: dict[str, Any]) -> dict[str, Any]:
    saves.room = lambda: 0
    return {}


def full_disk(output_dir: str, _: dict[str, Any]) -> dict[str, Any]:
    """The outbox refuses the writer, which is the only one that uses it before the end."""
    process._START = process._START.replace(
        "main()",
        f"from hf_cloudtrain.testing import FaultyDisk\n"
        f"FaultyDisk({str(Path(output_dir, '_cloudtrain/outbox'))!r}).__enter__()\nmain()",
    )
    return callbacks(StopAt(10))


def sigterm_while_staging(_: str, __: dict[str, Any]) -> dict[str, Any]:
    def prepare(trainer: Trainer) -> None:
        save = trainer._save_optimizer_and_scheduler

        def killed(folder: str) -> None:
            if folder.endswith("checkpoint-4"):
                os.kill(os.getpid(), signal.SIGTERM)
            save(folder)

        trainer._save_optimizer_and_scheduler = killed

    return {"prepare": prepare}


def sigterm_while_writing(_: str, __: dict[str, Any]) -> dict[str, Any]:
    """The writer is still importing torch when step 5 ends."""
    return callbacks(SignalAt(5))


def preempted_while_the_best_is_written(_: str, __: dict[str, Any]) -> dict[str, Any]:
    """Step 6 is the best one. The writer stands still until after the emergency save of step 7."""

    def stop_for_a_while() -> None:
        os.kill(the_writer(), signal.SIGSTOP)
        threading.Timer(1.5, os.kill, [the_writer(), signal.SIGCONT]).start()

    return callbacks(CallAt(6, stop_for_a_while), SignalAt(6, event="on_save"))


def exits(_: str, __: dict[str, Any]) -> dict[str, Any]:
    return callbacks(CallAt(5, lambda: sys.exit(3)))


def raises(_: str, __: dict[str, Any]) -> dict[str, Any]:
    return callbacks(FailAt(5))


def kills_the_writer(_: str, __: dict[str, Any]) -> dict[str, Any]:
    return callbacks(CallAt(5, lambda: os.kill(the_writer(), signal.SIGKILL)))


TROUBLES = {
    function.__name__.replace("_", " "): function
    for function in (
        *(hold, user_saves, fails_in_a_save, little_memory, full_disk, exits, raises, kills_the_writer),
        *(sigterm_while_staging, sigterm_while_writing, preempted_while_the_best_is_written),
    )
}


def two_trainings(output_dir: str, run_url: str, result: str, **_: Any) -> dict[str, Any]:
    """One within the other, each with its own run, in one process."""
    inner: dict[str, Any] = {}

    def train_inside() -> None:
        inner.update(
            train(f"{output_dir}-inner", run_url=f"{run_url}-inner", result=f"{result}-inner", max_steps=8)
        )

    recorders.SMALL_FILE = 0
    os.environ["HF_CLOUDTRAIN_ASYNC_SAVE"] = "1"
    count = count_saves()
    train(output_dir, run_url=run_url, result=result, callbacks=[CallAt(5, train_inside)])
    return {"staged": len(count), "inner": inner["step"]}
