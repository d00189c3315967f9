"""Small trainings that use public names only: an old commit made `tests/data/recorded` with them, and the current one resumes it.

Each draws random numbers for its order and its dropout, so that a resume that is not exact ends with different weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import hf_cloudtrain as ct

ROWS, BATCH, EPOCHS = 22, 4, 2
"""Six batches an epoch, the last one short."""
STEPS = 12

Seen = list[tuple[int, list[int]]]
"""(step, ids of its samples) of each batch that was trained on."""


class Rows(Dataset):
    """`ROWS` samples of three numbers."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.tensor([index / ROWS, (index * 7 % ROWS) / ROWS, 1.0])
        return {"x": x, "labels": x.sum(0, keepdim=True), "ids": torch.tensor(index)}


class SmallConfig(PretrainedConfig):
    """A config that is small on disk."""

    model_type = "recorded-small"


class SmallModel(PreTrainedModel):
    """81 numbers, with dropout."""

    config_class = SmallConfig

    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, 16), torch.nn.Dropout(0.3), torch.nn.ReLU(), torch.nn.Linear(16, 1)
        )
        self.ids: list[list[int]] = []
        self.post_init()

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor | None = None
    ) -> dict[str, Any]:
        if self.training and ids is not None:
            self.ids.append(ids.tolist())
        answer = self.layers(x)
        return {"loss": ((answer - labels) ** 2).mean(), "logits": answer}


class After(TrainerCallback):
    """Calls `what` after a step and its save."""

    def __init__(self, step: int, what: Callable[[], None]) -> None:
        self.step, self.what = step, what

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.what()


def trainer(
    run_url: str | None,
    output_dir: Path,
    *,
    seen: Seen | None = None,
    after: dict[int, Callable[[ct.CloudTrainCallback], object]] | None = None,
) -> dict[str, torch.Tensor]:
    """One attempt with the Trainer: its weights at the end.

    Args:
        run_url: None trains without hf_cloudtrain.
        seen: receives the batches.
        after: what is called when a step and its save are done, by step.
    """
    set_seed(7)
    model = SmallModel(SmallConfig())
    cloud = ct.CloudTrainCallback(run_url) if run_url is not None else None
    args = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=0.05,
        warmup_steps=2,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
        logging_steps=1,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=7,
    )
    made = Trainer(
        model=model,
        args=args,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        data_collator=default_data_collator,
        callbacks=[
            *(After(step, partial(what, cloud)) for step, what in (after or {}).items()),
            *([cloud] if cloud is not None else []),
        ],
    )
    folder = cloud.restore(args) if cloud is not None else None
    made.train(resume_from_checkpoint=folder)
    first = made.state.global_step - len(model.ids)
    if seen is not None:
        seen += [(first + at, ids) for at, ids in enumerate(model.ids, 1)]
    if cloud is not None:
        made.save_model(str(output_dir / "final-model"))
        cloud.save(output_dir / "final-model", name="final")
    return weights_of(model)


def loop(
    run_url: str,
    output_dir: Path,
    *,
    seen: Seen | None = None,
    inside: Callable[[ct.TrainLoop], None] = lambda loop: None,
) -> dict[str, torch.Tensor]:
    """One attempt with the TrainLoop: its weights at the end.

    Args:
        seen: receives the batches as they come.
        inside: called in the body of each batch.
    """
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    set_seed(7)
    accelerator = Accelerator(cpu=True)
    model: Any = SmallModel(SmallConfig())
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
    batches: Any = DataLoader(Rows(), batch_size=BATCH, shuffle=True)
    model, optimizer, scheduler, batches = accelerator.prepare(model, optimizer, scheduler, batches)
    training = ct.TrainLoop(
        accelerator,
        run_url,
        num_epochs=EPOCHS,
        save_steps=2,
        output_dir=output_dir,
        metric_for_best_model="loss",
        logging_steps=1,
        script_args={"learning_rate": 0.05, "hub_token": "hf_notstored"},
        save_total_limit=1,
    )
    for _ in training.epochs():
        model.train()
        total = 0.0
        for batch in training.steps(batches):
            loss = model(**batch)["loss"] * (1 + 0.1 * random.random())
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            training.log(loss=loss)
            total += loss.item()
            if seen is not None:
                seen.append((training.global_step + 1, batch["ids"].tolist()))
            inside(training)
        training.end_epoch({"loss": total})
    return weights_of(accelerator.unwrap_model(model))


def functions(
    run_url: str,
    checkpoint_dir: Path,
    *,
    seen: Seen | None = None,
    inside: Callable[[int], None] = lambda step: None,
) -> dict[str, torch.Tensor]:
    """One attempt with the functions and a ResumableSampler: its weights at the end.

    Args:
        seen: receives the batches as they come.
        inside: called in the middle of each step, with its number.
    """
    set_seed(7)
    model = SmallModel(SmallConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    data = Rows()
    sampler = ct.ResumableSampler(data, num_replicas=1, rank=0, seed=7)
    file = checkpoint_dir / "checkpoint.pt"
    ct.init(total_train_steps=STEPS, run_url=run_url, checkpoint_dir=checkpoint_dir)
    if ct.restore() is not None:
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        sampler.load_state_dict(state["sampler"])
        torch.set_rng_state(state["random"])
    for epoch in range(sampler.epoch, EPOCHS):
        sampler.set_epoch(epoch)
        # Its own generator: a DataLoader draws a number when its iteration begins, which is not where a resume begins.
        batches = DataLoader(data, batch_size=BATCH, sampler=sampler, generator=torch.Generator())
        for batch in batches:
            step = ct.processed_steps() + 1
            with ct.train_step():
                loss = model(**batch)["loss"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                sampler.advance(len(batch["ids"]))
                inside(step)
            ct.metric({"loss": loss})
            if seen is not None:
                seen.append((step, batch["ids"].tolist()))
            if step % 4 == 0:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "sampler": sampler.state_dict(),
                    "random": torch.get_rng_state(),
                }
                checkpoint_dir.mkdir(parents=True, exist_ok=True)
                torch.save(state, file)
                ct.upload_checkpoint()
    return weights_of(model)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
