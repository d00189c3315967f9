"""Plain scripts without a word of this package, in a process that the hook has prepared. The zygote forks them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_cloudtrain import CloudTrainCallback, env
from hf_cloudtrain.launch import hooks
from tests.integration._attempts import (
    ARGUMENTS,
    FailAt,
    KillAt,
    Sentences,
    SignalAt,
    make_model,
    save_weights,
)


def train(
    output_dir: str,
    *,
    run_url: str | None = None,
    result: str | None = None,
    given: Any = None,
    kill_at: int | None = None,
    committed: int = 0,
    fail_at: int | None = None,
    signal_at: int | None = None,
    seen: str | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """A script with one Trainer; without a run URL it is not hooked.

    Args:
        given: what the script passes to `train`; "last" is what `get_last_checkpoint` finds.
    """
    hook(run_url)
    trainer = make(output_dir, run_url, kill_at=kill_at, committed=committed, **arguments)
    if fail_at is not None:
        trainer.add_callback(FailAt(fail_at))
    if signal_at is not None:
        trainer.add_callback(SignalAt(signal_at))
    trainer.train(resume_from_checkpoint=_given(given, output_dir))
    if result and trainer.args.process_index == 0:
        save_weights(trainer, result)
    return {"step": trainer.state.global_step, "callbacks": names(trainer)}


def two_stages(
    output_dir: str,
    *,
    run_url: str | None = None,
    result: str | None = None,
    kill_at: int | None = None,
    committed: int = 0,
    skips: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """A script with two Trainers and one model; it is killed in the second stage.

    Args:
        skips: whether it leaves the first stage out where that has written its model.
    """
    hook(run_url)
    first, second = Path(output_dir, "first"), Path(output_dir, "second")
    model = make_model()
    if not (skips and (first / "done").exists()):
        one = make(str(first), run_url, model=model, num_train_epochs=1)
        one.evaluate()
        one.train()
        (first / "done").touch()
    else:
        model = Trainer(model=model, args=TrainingArguments(output_dir=str(first), **ARGUMENTS)).model
    url = f"{run_url}/trainer-2"
    two = make(str(second), url, model=model, kill_at=kill_at, committed=committed)
    two.train()
    if result:
        save_weights(two, result)
    return {"step": two.state.global_step}


def several(output_dir: str, *, run_url: str, **_: Any) -> dict[str, Any]:
    """Trainers that the hook leaves alone, one after the other."""
    hook(run_url)
    silent = make(f"{output_dir}/silent", run_url, save_strategy="no")
    silent.train()
    own = make(f"{output_dir}/own", run_url, callbacks=[CloudTrainCallback(f"{run_url}-own")])
    own.train()
    make(f"{output_dir}/never", run_url).evaluate()
    return {"own": names(own)}


def retried(output_dir: str, *, run_url: str, **_: Any) -> dict[str, Any]:
    """A script that catches the error of its first try, and trains again."""
    hook(run_url)
    trainer = make(output_dir, run_url)
    trainer.add_callback(FailAt(6))
    try:
        trainer.train()
    except ZeroDivisionError:
        trainer = make(output_dir, run_url)
        trainer.train()
    return {"step": trainer.state.global_step}


class WithOwnTrain(Trainer):
    """A subclass as libraries write them."""

    def train(self, *args, **kwargs):
        print("my own train", flush=True)
        return super().train(*args, **kwargs)


def subclassed(output_dir: str, *, run_url: str, **_: Any) -> dict[str, Any]:
    hook(run_url)
    trainer = make(output_dir, run_url, kind=WithOwnTrain)
    trainer.train()
    return {"step": trainer.state.global_step}


def hook(run_url: str | None) -> None:
    if run_url is not None:
        os.environ[env.RUN_URL] = run_url
        hooks.install(sys.modules["transformers.trainer"])


def make(
    output_dir: str,
    run_url: str | None,
    *,
    model: Any = None,
    kind: type[Trainer] = Trainer,
    callbacks: list[Any] | None = None,
    kill_at: int | None = None,
    committed: int = 0,
    **arguments: Any,
) -> Trainer:
    args = TrainingArguments(output_dir=output_dir, **{**ARGUMENTS, **arguments})
    set_seed(args.seed)
    extra = list(callbacks or [])
    if kill_at is not None:
        extra.append(KillAt(kill_at, run_url or "", committed))
    return kind(
        model=model or make_model(),
        args=args,
        train_dataset=Sentences(),
        eval_dataset=Sentences(10),
        callbacks=extra,
    )


def names(trainer: Trainer) -> list[str]:
    return [type(one).__name__ for one in trainer.callback_handler.callbacks]


def _given(given: Any, output_dir: str) -> Any:
    if given == "last":
        return get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    return f"{output_dir}/{given}" if isinstance(given, str) else given
