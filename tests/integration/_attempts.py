"""What one training process does: a tiny BERT with dropout under the real Trainer. Imports take five seconds."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

import hf_cloudtrain.integrations.trainer.callbacks  # noqa: F401 - paid for before the fork
from hf_cloudtrain import (
    CheckpointUploadCallback,
    CloudTrainCallback,
    EmergencySaveCallback,
    StepTrackerCallback,
    env,
)
from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.preemption import agreement
from hf_cloudtrain.preemption.preemption import Preemption
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking import tracker
from hf_cloudtrain.tracking.records import StepRecords

torch.set_num_threads(1)  # sums in one order
agreement.INTERVAL_SECONDS = (
    0.0  # vote after each step, although steps take milliseconds, so that the deciding step is known
)
disable_progress_bar()
tracker.SAVE_FLUSH_SECONDS = 0.0  # a training of milliseconds stores its records with each save

PATIENCE = 60.0
"""Seconds a condition may take to come true on a slow and busy machine."""
SAMPLES = 22
"""With batches of 4: 6 a epoch, the last one short."""
WORDS, LENGTH, FIRST_ID = 128, 12, 64
ARGUMENTS: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 4,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


class Sentences(torch.utils.data.Dataset):
    """Random sentences; the first word of each is its number, so that a model's input tells which they are."""

    def __init__(self, count: int = SAMPLES) -> None:
        chance = torch.Generator().manual_seed(7)
        words = torch.randint(0, FIRST_ID, (count, LENGTH), generator=chance)
        words[:, 0] = FIRST_ID + torch.arange(count) % (WORDS - FIRST_ID)
        labels = torch.randint(0, 2, (count,), generator=chance)
        self.rows = [{"input_ids": row, "labels": label} for row, label in zip(words, labels, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return self.rows[at]


class Stream(torch.utils.data.IterableDataset):
    """The same without a length."""

    def __iter__(self) -> Any:
        while True:
            yield from Sentences().rows


class KillAt(TrainerCallback):
    """SIGKILL to this process at a step, once all checkpoints up to step `committed` and their records are on storage."""

    def __init__(self, step: int, run_url: str, committed: int) -> None:
        self.step, self.run_url, self.committed = step, run_url, committed

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.committed:
                wait_until(lambda: committed_step(self.run_url) >= self.committed)
                # The newest is uploaded first.
                waiting = Outbox(Path(args.output_dir)).folder.glob
                wait_until(lambda: all(_step_of(entry) > self.committed for entry in waiting("[0-9]*-*")))
                wait_until(lambda: has_records(self.run_url))
            os.kill(os.getpid(), signal.SIGKILL)


def _step_of(entry: Path) -> int:
    """The step of an entry of the outbox, `<attempt>-<step>`."""
    return int(entry.name.split("-")[1])


class SaveAt(TrainerCallback):
    """Asks for a save, as a user's own callback may."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True


class StopAt(TrainerCallback):
    """Ends the training, as early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


class Jolt(TrainerCallback):
    """Moves the weights at random: other code that draws from these generators changes the weights."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        chance = random.random() + np.random.random() + torch.rand(()).item()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + 1e-3 * chance)


class FailAt(TrainerCallback):
    """A bug in the user's code."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise ZeroDivisionError("a bug of the user")


class SignalAt(TrainerCallback):
    """A signal to this process, where it is rank `rank`, at an event of a step; `times` how often."""

    def __init__(
        self,
        step: int,
        *,
        signal: int = signal.SIGTERM,
        rank: int = 0,
        times: int = 1,
        event: str = "on_step_end",
    ) -> None:
        self.step, self.signal, self.rank, self.times = step, signal, rank, times
        setattr(self, event, self._send)

    def _send(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == self.rank:
            for _ in range(self.times):
                os.kill(os.getpid(), self.signal)


class InterruptAt(SignalAt):
    """Ctrl-C, as the terminal sends it."""

    def __init__(self, step: int, *, times: int = 1) -> None:
        super().__init__(step, signal=signal.SIGINT, times=times)


class SignalLauncherAt(TrainerCallback):
    """SIGTERM from rank 0 to the launcher, and on each rank a wait until it has come from there."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.came = threading.Event()

    def on_train_begin(self, args, state, control, **kwargs):
        receive = Preemption.receive

        def note(preemption: Preemption, notice: Any) -> None:
            receive(preemption, notice)
            self.came.set()

        Preemption.receive = note

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if args.process_index == 0:
                os.kill(os.getppid(), signal.SIGTERM)
            wait_until(self.came.is_set)


class HoldAt(TrainerCallback):
    """Waits at a step to be killed from outside."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            threading.Event().wait(PATIENCE)


class CallAt(TrainerCallback):
    """Calls something after a step."""

    def __init__(self, step: int, call: Callable[[], Any]) -> None:
        self.step, self.call = step, call

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.call()


class Litter(TrainerCallback):
    """A file of an earlier training on more ranks, in the folder of a checkpoint to come."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            path = Path(args.output_dir, self.path)
            path.parent.mkdir()
            path.write_bytes(b"left over")


EXTRA = {
    kind.__name__: kind
    for kind in (
        SaveAt,
        StopAt,
        Jolt,
        FailAt,
        InterruptAt,
        SignalAt,
        SignalLauncherAt,
        HoldAt,
        Litter,
        EarlyStoppingCallback,
    )
}


def train(
    output_dir: str,
    *,
    run_url: str | None = None,
    result: str | None = None,
    parts: str = "cloud",
    restore: str = "passed",
    fresh: bool = False,
    kill_at: int | None = None,
    committed: int = 0,
    before: list[Any] | None = None,
    after: list[Any] | None = None,
    seen: str | None = None,
    lora: bool = False,
    stream: bool = False,
    masks: bool = False,
    waiting: int = 1_000,
    samples: int = SAMPLES,
    on_storage: int | None = None,
    callbacks: list[TrainerCallback] | None = None,
    prepare: Callable[[Trainer], None] = lambda trainer: None,
    **arguments: Any,
) -> dict[str, Any]:
    """One attempt of a run, or plain training without a run URL.

    Args:
        result: file for the final weights.
        parts: which of our callbacks: `cloud`, `uploads`, `steps`, `both` or `none`.
        restore: `passed` to train(), `dropped` (called, its answer not passed) or `forgotten`.
        kill_at: step of a SIGKILL, once step `committed` is on storage.
        before, after: callbacks of the user in front of ours and behind it, as [name, {argument: value}].
        seen: file that each batch is appended to before it is used; `{rank}` in its name is replaced.
        waiting: checkpoints that may wait for their upload; many, because steps of milliseconds outrun any.
        samples: length of the training data.
        on_storage: how many checkpoints stay there.
        masks: leave words out by chance, as a collator for masked language models does.
        arguments: for TrainingArguments.
    """
    upload_queue.MAX_WAITING = waiting
    args = TrainingArguments(output_dir=output_dir, **{**ARGUMENTS, **arguments})
    set_seed(args.seed)
    ours = make_ours(parts if run_url else "none", run_url, fresh=fresh)
    if on_storage is not None:
        ours = [CloudTrainCallback(run_url, save_total_limit=on_storage)]
    extra = list(callbacks or [])
    if kill_at is not None:
        extra.append(KillAt(kill_at, run_url or "", committed))
    trainer = Trainer(
        model=make_model(lora=lora),
        args=args,
        train_dataset=Stream() if stream else Sentences(samples),
        eval_dataset=Sentences(10),
        callbacks=[*make_extra(before), *ours, *make_extra(after), *extra],
    )
    trainer.compute_metrics = lambda _: {"nearness": float(-abs(trainer.state.global_step - 6))}
    if masks:
        trainer.data_collator = mask_words
    if seen:
        record_batches(trainer, seen.format(rank=args.process_index))
    prepare(trainer)
    checkpoint = None
    if restore != "forgotten":
        added = [*ours, *trainer.callback_handler.callbacks]
        restoring = next((callback for callback in added if hasattr(callback, "restore")), None)
        checkpoint = restoring.restore(args) if restoring else None
    trainer.train(resume_from_checkpoint=checkpoint if restore == "passed" else None)
    if result and args.process_index == 0:
        save_weights(trainer, result)
    return {
        "restored": checkpoint,
        "step": trainer.state.global_step,
        "best": trainer.state.best_model_checkpoint,
        "log": [clean(record) for record in trainer.state.log_history if "train_loss" not in record],
    }


def warm_up() -> None:
    """What each process would do once, and may do before the fork: no gradients, they start threads."""
    with tempfile.TemporaryDirectory() as folder:
        make_model().save_pretrained(folder)
        make_model(lora=True).save_pretrained(folder)


def make_ours(parts: str, run_url: str | None, *, fresh: bool) -> list[TrainerCallback]:
    kinds: dict[str, list[type]] = {
        "cloud": [CloudTrainCallback],
        "uploads": [CheckpointUploadCallback],
        "steps": [StepTrackerCallback],
        "uploads first": [CheckpointUploadCallback, StepTrackerCallback, EmergencySaveCallback],
        "emergency first": [EmergencySaveCallback, StepTrackerCallback, CheckpointUploadCallback],
        "both": [CheckpointUploadCallback, StepTrackerCallback],
        "none": [],
    }
    return [kind(run_url if env.RUN_URL not in os.environ else None, fresh=fresh) for kind in kinds[parts]]


def make_extra(given: list[Any] | None) -> list[TrainerCallback]:
    return [EXTRA[name](**arguments) for name, arguments in given or []]


def make_model(*, lora: bool = False) -> torch.nn.Module:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
    )
    model = BertForSequenceClassification(config)
    if lora:
        targets = ["query", "value"]
        return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets))
    return model


def mask_words(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = default_data_collator(rows)
    words = batch["input_ids"]
    left = torch.rand(words.shape) < 0.8
    left[:, 0] = True  # the number of the sample
    return {**batch, "input_ids": words * left}


def record_batches(trainer: Trainer, path: str) -> None:
    """Note the samples of each training batch, with the step they belong to, before the model sees them."""

    def note(model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            numbers = (kwargs["input_ids"][:, 0] - FIRST_ID).tolist()
            with open(path, "a") as file:
                file.write(json.dumps([trainer.state.global_step + 1, numbers]) + "\n")

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)


def save_weights(trainer: Trainer, path: str) -> None:
    weights = {name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)


def clean(record: dict[str, Any]) -> dict[str, Any]:
    """A log record without what depends on the clock. (`train_loss` covers one attempt alone.)"""
    return {name: value for name, value in record.items() if "second" not in name and "runtime" not in name}


def committed_step(run_url: str) -> int:
    """The highest committed step; -1 where there is none."""
    keys = Catalog(Storage(run_url, env.storage_options(None))).checkpoints()
    return max((key.step for key in keys), default=-1)


def has_records(run_url: str) -> bool:
    """Whether the newest attempt has stored what it logged; only one that tracks steps ever does."""
    catalog = Catalog(Storage(run_url, env.storage_options(None)))
    attempt = catalog.attempts.numbers()[-1]
    return catalog.attempts.read_progress(attempt) is None or bool(
        StepRecords(catalog.storage).read().get(attempt)
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("a condition did not come true")
        time.sleep(0.01)


if __name__ == "__main__":
    print(json.dumps(train(**json.loads(sys.argv[1]))))
