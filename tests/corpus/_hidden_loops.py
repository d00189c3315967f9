"""Loops with Accelerate whose state hides: in loader processes, helper functions, counters, generators, adapters."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import peft
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import DataCollatorForSeq2Seq

from hf_cloudtrain import TrainLoop
from tests.corpus import _models as models
from tests.corpus._attempt import SAVED, Attempt, setup
from tests.corpus._loops import COUNT, DATA, Parts, loss_of, net, with_parts


class OwnGenerator(Dataset):
    """Draws from a generator that it holds."""

    def __init__(self) -> None:
        self.chance = np.random.default_rng(1)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = DATA[number]
        return x * float(self.chance.uniform(0.5, 1.5)), y


class Unasked(OwnGenerator):
    """Could save its state, but no loader asks for that of such a dataset."""

    def state_dict(self) -> dict[str, Any]:
        return {"chance": self.chance.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chance.bit_generator.state = state["chance"]


class Drawing(IterableDataset):
    """A stream with noise."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for x, y in (DATA[number] for number in range(COUNT)):
            yield x + 0.1 * torch.randn(4), y


class HiddenBuffer(torch.nn.Module):
    """A buffer that changes, and that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)
        self.mean.lerp_(result.detach().mean(), 0.1)
        return result + self.mean


class Annealed(torch.nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = net(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        result: torch.Tensor = self.net(x) * min(1.0, self.calls / 20)
        return result


def of(model: Any, data: Any = DATA, **loader: Any) -> Parts:
    """A loop that trains this model."""
    parts = Parts(data, **loader)
    parts.model = model
    parts.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    parts.scheduler = torch.optim.lr_scheduler.LambdaLR(parts.optimizer, lambda step: 1.0)
    return parts


LOOPS: dict[str, tuple[Callable[[], Parts], dict[str, Any], int]] = {
    "loop with a generator of the dataset's own in two loader processes": (
        lambda: Parts(OwnGenerator(), num_workers=2),
        {},
        SAVED,
    ),
    "loop with a generator of the dataset's own in two loader processes, resumed from an epoch's end": (
        lambda: Parts(OwnGenerator(), num_workers=2),
        {"save_steps": None},
        6,
    ),
    "loop over a dataset whose state_dict is not asked for": (lambda: Parts(Unasked()), {}, SAVED),
    "loop over a stream with noise in two loader processes": (
        lambda: Parts(Drawing(), num_workers=2),
        {},
        SAVED,
    ),
    "loop with a buffer that changes and is not persistent": (lambda: of(HiddenBuffer()), {}, SAVED),
    "loop with a model that counts its calls": (lambda: of(Annealed()), {}, SAVED),
}
for _name, (_parts, _arguments, _saved) in LOOPS.items():
    setup(_name, saved=_saved)(with_parts(_parts, _arguments))


def evaluated(attempt: Attempt, *, prepared: bool) -> None:
    parts = Parts().prepare()
    held_out: Any = DataLoader(DATA, batch_size=16, num_workers=1, persistent_workers=True)
    if prepared:
        held_out = parts.accelerator.prepare(held_out)
    loop = attempt.loop(parts.accelerator, num_epochs=3)
    for _ in loop.epochs():
        parts.model.train()
        for x, y in loop.steps(parts.batches):
            attempt.die_at(loop.global_step + 1)
            parts.step(x, y)
        parts.model.eval()
        with torch.no_grad():
            batches = held_out if prepared else loop.eval_batches(held_out)
            losses = [float(loss_of(parts.model, x, y)) for x, y in batches]
        loop.end_epoch({"loss": sum(losses) / len(losses)})
    parts.finish(attempt)


@setup("loop with an evaluation in persistent processes")
def prepared_evaluation(attempt: Attempt) -> None:
    evaluated(attempt, prepared=True)


@setup("loop with an evaluation in persistent processes that is not prepared")
def plain_evaluation(attempt: Attempt) -> None:
    evaluated(attempt, prepared=False)


def optimized(parts: Parts, loss: torch.Tensor) -> None:
    parts.accelerator.backward(loss)
    parts.optimizer.step()
    parts.scheduler.step()
    parts.optimizer.zero_grad()


class Script:
    """A script in a class."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt, self.parts, self.calls = attempt, Parts(collate_fn=self.collate).prepare(), 0
        self.loop: TrainLoop = attempt.loop(self.parts.accelerator)
        self.best, self.epoch, self.history = float("inf"), 0, list[float]()

    def collate(self, samples: Any) -> Any:
        return torch.utils.data.default_collate(samples)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss_of(self.parts.model, x, y)

    def train(self) -> None:
        for epoch in self.loop.epochs():
            self.epoch, losses = epoch, []
            for x, y in self.loop.steps(self.parts.batches):
                self.attempt.die_at(self.loop.global_step + 1)
                loss = self.loss(x, y)
                optimized(self.parts, loss)
                losses.append(float(loss.detach()))
            self.best = min(self.best, sum(losses))
            self.history.append(sum(losses))
        self.parts.finish(self.attempt)


class Counting(Script):
    """Counts in a method, and weighs a term of the loss by it."""

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().loss(x, y) + min(1.0, self.calls / 20) * self.parts.model(x).square().mean()


@setup("loop in a class")
def in_a_class(attempt: Attempt) -> None:
    Script(attempt).train()


@setup("loop in a class whose method counts")
def counting(attempt: Attempt) -> None:
    Counting(attempt).train()


def weighted(attempt: Attempt, weigh: Callable[[Parts, torch.Tensor], torch.Tensor]) -> None:
    parts = Parts().prepare()
    loop = attempt.loop(parts.accelerator)
    for _ in loop.epochs():
        for x, y in loop.steps(parts.batches):
            attempt.die_at(loop.global_step + 1)
            optimized(parts, loss_of(parts.model, x, y) + weigh(parts, x))
    parts.finish(attempt)


@setup("loop with a generator in a variable")
def generator(attempt: Attempt) -> None:
    chance = random.Random(3)
    weighted(attempt, lambda parts, x: chance.random() * parts.model(x).square().mean())


@setup("loop with a second loader that is never begun again")
def second_loader(attempt: Attempt) -> None:
    others = iter(DataLoader(DATA, batch_size=3))
    weighted(attempt, lambda parts, x: loss_of(parts.model, *next(others)))


@setup("loop with a memory of batches")
def memory(attempt: Attempt) -> None:
    last: deque[torch.Tensor] = deque(maxlen=3)

    def weigh(parts: Parts, x: torch.Tensor) -> torch.Tensor:
        last.append(x)
        return torch.stack([parts.model(old).square().mean() for old in last]).sum()

    weighted(attempt, weigh)


MEANS: dict[str, torch.Tensor] = {}


@setup("loop with an average that only a helper function knows")
def helper(attempt: Attempt) -> None:
    def weigh(parts: Parts, x: torch.Tensor) -> torch.Tensor:
        values = dict(parts.accelerator.unwrap_model(parts.model).named_parameters())
        for name, value in values.items():
            MEANS.setdefault(name, value.detach().clone()).lerp_(value.detach(), 0.1)
        return torch.stack([(value - MEANS[name]).square().sum() for name, value in values.items()]).sum()

    weighted(attempt, weigh)


@setup("loop with a factor that falls")
def factor(attempt: Attempt) -> None:
    parts = Parts().prepare()
    loop, weight = attempt.loop(parts.accelerator), 1.0
    for _ in loop.epochs():
        for x, y in loop.steps(parts.batches):
            attempt.die_at(loop.global_step + 1)
            weight = max(0.1, weight * 0.9)
            optimized(parts, loss_of(parts.model, x, y) + weight * parts.model(x).square().mean())
    parts.finish(attempt)


@setup("loop that unfreezes a layer at a step", saved=4)
def unfreezes(attempt: Attempt) -> None:
    parts = of(net())
    parts.model[0].requires_grad_(False)
    parts.prepare()
    loop = attempt.loop(parts.accelerator)
    for _ in loop.epochs():
        for x, y in loop.steps(parts.batches):
            attempt.die_at(loop.global_step + 1)
            if loop.global_step == 3:
                parts.accelerator.unwrap_model(parts.model)[0].requires_grad_(True)
            optimized(parts, loss_of(parts.model, x, y))
    parts.finish(attempt)


def on_batches(attempt: Attempt, parts: Parts) -> None:
    """Trains a model of transformers."""
    parts.prepare()
    loop = attempt.loop(parts.accelerator)
    for _ in loop.epochs():
        for batch in loop.steps(parts.batches):
            attempt.die_at(loop.global_step + 1)
            optimized(parts, parts.model(**batch).loss)
    parts.finish(attempt)


def adapted(attempt: Attempt, *, head: bool) -> None:
    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    model = peft.get_peft_model(models.bert(), config)
    model.base_model.model.classifier.requires_grad_(head)
    rows = [{name: torch.tensor(value) for name, value in row.items()} for row in models.rows()]
    on_batches(attempt, of(model, rows))


@setup("loop with LoRA")
def lora(attempt: Attempt) -> None:
    adapted(attempt, head=False)


@setup("loop with LoRA and a head that is trained beside it")
def lora_and_head(attempt: Attempt) -> None:
    adapted(attempt, head=True)


@setup("loop with a collator that knows the model")
def collator(attempt: Attempt) -> None:
    model = models.t5()
    data = [{**row, "labels": row["input_ids"][:5]} for row in models.rows()]
    on_batches(attempt, of(model, data, collate_fn=DataCollatorForSeq2Seq(models.tokenizer(), model)))
